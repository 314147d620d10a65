"""`passes.lower_variance`: on the CPU a fused moment stream computes what it computed before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import lotion_fx
from lotion_fx import backend
from lotion_fx.passes import random_tensor
from lotion_fx.passes.lower_variance import match_variance_linear
from lotion_fx.passes.moments import interpret

aten = torch.ops.aten
FUSED = torch.ops.lotion_fx.variance_linear_given.default


def count(graph: fx.Graph) -> int:
    return len(graph.find_nodes(op="call_function", target=FUSED))


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.Linear(40, 36), nn.GELU(), nn.Linear(36, 34))


class Shared(nn.Module):
    """Layers of one input, of one shape, and of inputs of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 40, bias=bias) for bias in (True, False, True))
        self.out = nn.Linear(40, 34)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.a(x)) * self.b(x) + self.c(x).sin())


def stepped(
    model: nn.Module, x: Tensor, y: Tensor, monkeypatch: pytest.MonkeyPatch, fuse: bool
) -> tuple[Any, list[int]]:
    """Loss and gradients of a training step with the stream, and how many layers of each joint graph were fused."""
    fused: list[int] = []
    resolve = backend.resolve_curvature

    def pass_of(graph: fx.Graph) -> Any:
        resolved = resolve(graph)
        if fuse:
            fused.append(match_variance_linear(graph))
            assert count(graph) == fused[-1]
            assert all("val" in node.meta for node in graph.nodes if node.op == "call_function")
        return resolved

    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(backend, "resolve_curvature", pass_of)
        model = lotion_fx.transform(model, "int4", loss_fn=F.cross_entropy, inner="aot_eager", moments="diagonal")
        loss = lotion_fx.training_loss(model, (x, y))
        loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())], fused


@pytest.mark.parametrize(("build", "layers"), [(deep, 3), (Shared, 4)])
def test_a_training_step_computes_the_same(
    build: Callable[[], nn.Module], layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for fuse in (False, True):
        torch.manual_seed(0)
        model, x, y = build(), torch.randn(12, 6), torch.randint(34, (12,))
        results.append(stepped(model, x, y, monkeypatch, fuse))
    (before, _), (after, fused) = results
    assert fused == [layers]
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b)


def linear_graph(x: Tensor, u: Tensor | None, w: Tensor, s: Tensor, table: Any) -> fx.GraphModule:
    """The graph of the moment rule of a linear layer, x fixed or random with variance u."""
    traced = backend.trace(lambda x, w: [F.linear(x, w)], [x, w])

    def moments(x: Tensor, u: Tensor, w: Tensor, s: Tensor) -> list[Tensor]:
        given = x if u is None else random_tensor.Random(x, u, {"x": frozenset(range(x.dim() - 1))})
        out = interpret(traced, [given, random_tensor.weight("w", w, s)]).outputs[0]
        return [out.mean, out.variance]

    return make_fx(moments, decomposition_table=table, tracing_mode="fake")(x, u, w, s)


@pytest.mark.parametrize("table", [{}, select_decomp_table()], ids=["none", "inductor"])
@pytest.mark.parametrize("shape", [(9, 6), (3, 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("random", [False, True], ids=["fixed input", "random input"])
def test_a_layer(random: bool, dtype: torch.dtype, shape: tuple[int, ...], table: Any) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(shape).to(dtype), torch.randn(40, 6).to(dtype)
    u, s = torch.rand(shape).to(dtype) if random else None, torch.rand(40, 6).to(dtype)
    gm = linear_graph(x, u, w, s, table)
    before = gm(x, u, w, s)
    assert match_variance_linear(gm.graph) == count(gm.graph) == 1
    gm.recompile()
    after = gm(x, u, w, s)
    x, w, s = x.double(), w.double(), s.double()
    u = torch.zeros_like(x) if u is None else u.double()
    exact = x @ w.t(), (x.square() + u) @ s.t() + u @ w.square().t()
    for a, b, c in zip(after, before, exact, strict=True):
        # The graph's own bfloat16 rounds every square; both round the result.
        assert (a - c).norm() <= (1 + 1e-3) * (b - c).norm() + 1e-6 * c.norm()
    left = {node.target for node in gm.graph.nodes if node.op == "call_function"}
    squares = {aten.mm.default, aten.mul.Tensor, aten.pow.Tensor_Scalar, aten.add.Tensor}
    assert not left & squares, "they are made in the kernel"


def test_leaves_products_that_are_no_layer() -> None:
    def function(x: Tensor, g: Tensor, w: Tensor, s: Tensor, z: Tensor, t: Tensor) -> list[Tensor]:
        squares = [(g.t() @ x), g.t().square() @ x.square()]  # a gradient and its curvature
        other = [x @ w.t(), x.square() @ s[:3].t()]  # a layer and another shape
        strangers = [z @ w.t(), t.square() @ s.t()]  # two inputs
        early = x @ s.t()
        late = x.square() @ (w * early.sum()).t()  # the mean is read before the variances are there
        return [*squares, *other, *strangers, early, late]

    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in ((9, 6), (9, 5), (4, 6), (4, 6), (8, 6), (8, 6))]
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    before = gm(*inputs)
    assert match_variance_linear(gm.graph) == 0
    gm.recompile()
    assert all(torch.equal(a, b) for a, b in zip(gm(*inputs), before, strict=True))
