"""`passes.lower.linear`: on the CPU a fused graph computes what it computed before, with one call a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.aot_autograd import aot_function
from torch._functorch.compilers import nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from lotion_fx.passes.attach.attach import smooth
from lotion_fx.passes.attach.probe import Layout
from lotion_fx.passes.curvature.resolve import resolve_curvature
from lotion_fx.passes.lower.linear import match_full_curvature

Function = Callable[..., Tensor]


def run(function: Function, weights: list[Tensor], data: list[Tensor], fuse: bool, table: Any) -> Any:
    """Loss, gradients and probes; how many were fused; and what ops the joint graph has."""
    layouts = [Layout("full", tuple(w.shape), 1, len(w)) for w in weights]
    weights = [w.clone().requires_grad_() for w in weights]
    probes = [torch.zeros(layout.size, requires_grad=True) for layout in layouts]
    seen: dict[str, Any] = {"fused": 0}

    def partition(joint: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        resolve_curvature(joint.graph)
        if fuse:
            seen["fused"] = match_full_curvature(joint.graph)
        assert all("val" in node.meta for node in joint.graph.nodes if node.op == "call_function")
        seen["ops"] = [node.target for node in joint.graph.nodes]
        joint.recompile()
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    def smoothed(weights: list[Tensor], probes: list[Tensor], *data: Tensor) -> Tensor:
        used = [
            smooth(w, probe, "latent", "int4", 1, "full", 1, layout.rows)
            for w, probe, layout in zip(weights, probes, layouts, strict=True)
        ]
        return function(*used, *data)

    loss = aot_function(smoothed, nop, partition_fn=partition, decompositions=table)(weights, probes, *data)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in (*weights, *probes))], seen["fused"], seen["ops"]


def data(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


def mlp(w1: Tensor, w2: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(F.linear(F.gelu(F.linear(x, w1)), w2)).square().sum()


def attention(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Three layers of one input, whose gradients and sums share an operand."""
    y = F.scaled_dot_product_attention(*(F.linear(x, w)[:, None] for w in (q, k, v)))
    return y.square().sum()


def used_twice(w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(F.linear(torch.tanh(F.linear(x, w)), w)).sum()


CASES: dict[str, tuple[Function, list[tuple[int, ...]], tuple[int, ...], int]] = {
    "mlp": (mlp, [(11, 7), (5, 11)], (3, 4, 7), 2),
    "attention": (attention, [(6, 6)] * 3, (2, 5, 6), 3),
    "used twice": (used_twice, [(6, 6)], (9, 6), 2),
    "x @ w": (lambda w, x: torch.tanh(x @ w).sum(), [(7, 5)], (9, 7), 1),
}


@pytest.mark.parametrize("table", [{}, select_decomp_table()], ids=["none", "inductor"])
@pytest.mark.parametrize("case", CASES)
def test_computes_the_same(case: str, table: Any) -> None:
    function, shapes, x, count = CASES[case]
    torch.manual_seed(0)
    tensors = data(*shapes, x)
    before, _, _ = run(function, tensors[:-1], tensors[-1:], False, table)
    after, fused, ops = run(function, tensors[:-1], tensors[-1:], True, table)
    assert fused == ops.count(torch.ops.lotion_fx.curvature_linear.default) == count
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(dtype: torch.dtype) -> None:
    """The gradient is the same; of bfloat16 the full curvature is nearer the exact one than the graph's own."""
    torch.manual_seed(0)
    tensors = data((11, 7), (5, 11), (3, 4, 7), dtype=dtype)
    before, _, _ = run(mlp, tensors[:-1], tensors[-1:], False, {})
    after, fused, ops = run(mlp, tensors[:-1], tensors[-1:], True, {})
    assert fused == 2 and torch.ops.aten.mm.default not in ops[-20:]
    for a, b in zip(after[:-2], before[:-2], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(after[-2:], before[-2:], strict=True):
        torch.testing.assert_close(a, b, rtol=3 * 2.0**-7 if dtype == torch.bfloat16 else 1e-6, atol=0)


def test_leaves_what_it_does_not_know() -> None:
    """A convolution's gradient, a gradient of float64, and one whose g lies the other way."""
    torch.manual_seed(0)
    image, kernel = data((2, 3, 5, 5), (4, 3, 1, 1))
    for function, weight, x in (
        (lambda w, x: F.conv2d(x, w).square().sum(), kernel, image),
        (lambda w, x: torch.tanh(F.linear(x, w)).sum(), *(t.double() for t in data((5, 7), (9, 7)))),
        (lambda w, x: torch.tanh(w @ x).sum(), *data((5, 7), (7, 9))),
    ):
        before, _, _ = run(function, [weight], [x], False, {})
        after, fused, _ = run(function, [weight], [x], True, {})
        assert fused == 0
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
