"""A function of weights run through AOTAutograd with the curvature pass, and sums of squares written out by hand."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.aot_autograd import aot_function
from torch._functorch.compilers import nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from lotion_fx.passes.attach.attach import smooth
from lotion_fx.passes.attach.probe import Header, Layout
from lotion_fx.passes.curvature.resolve import Resolution, resolve_curvature

TABLES = {"none": dict, "inductor": select_decomp_table}
Factors = tuple[Tensor, Tensor, Tensor]


def latent(weight: Tensor, probe: Tensor, layout: Layout) -> Tensor:
    axis, direct = weight.dim() - 1, getattr(layout, "direct", True)
    return smooth(weight, probe, "latent", "int4", axis, layout.kind, layout.groups, layout.rows, direct=direct)


@dataclass
class Run:
    loss: Tensor
    grads: list[Tensor]
    probes: list[Tensor]
    resolutions: list[Resolution]


def gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def run(
    function: Callable[..., Any],
    weights: list[Tensor],
    layouts: list[Any],
    data: tuple[Any, ...] = (),
    table: str = "none",
    partition: Callable[..., Any] = min_cut_rematerialization_partition,
    attach: Callable[..., Tensor] = latent,
    objective: Callable[[Any], Tensor] = torch.sum,
) -> Run:
    """Forward and backward through AOTAutograd with the pass, the weights smoothed; the objective is outside."""
    seen: dict[str, Any] = {}

    def partition_fn(joint: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        seen["resolutions"] = resolve_curvature(joint.graph)
        assert all("val" in node.meta for node in joint.graph.nodes if node.op == "call_function")
        joint.recompile()
        return partition(joint, inputs, **kwargs)

    weights = [weight.detach().clone().requires_grad_() for weight in weights]
    probes = [torch.zeros(layout.size, requires_grad=True) for layout in layouts]

    def smoothed(weights: list[Tensor], probes: list[Tensor], *data: Any) -> Any:
        return function(*map(attach, weights, probes, layouts), *data)

    out = aot_function(smoothed, nop, partition_fn=partition_fn, decompositions=TABLES[table]())(weights, probes, *data)
    loss = objective(out)
    loss.backward()
    grads, curvatures = (list(map(gradient, leaves)) for leaves in (weights, probes))
    return Run(loss.detach(), grads, curvatures, seen["resolutions"])


def loss_of(y: Tensor) -> Tensor:
    """A scalar whose gradient is different at every output."""
    return (torch.tanh(y.float() if y.dtype == torch.bfloat16 else y) * wave(y.shape).to(y.device)).sum()


def wave(shape: torch.Size) -> Tensor:
    return torch.cos(torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)).float()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    expected = expected.double().reshape(actual.shape)
    assert expected.norm() > 0
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.2e}"


def said(probe: Tensor) -> list[float]:
    """Calls, codes and loss terms of a probe's vector."""
    header = Header.of(probe)
    return [header.calls.item(), header.code.item(), header.loss_count.item()]


def product(g: Tensor, x: Tensor) -> tuple[Tensor, Factors]:
    """Positions first: g [N, R], x [N, C]; or of a stack, g [E, N, R], x [E, N, C]."""
    g, x = (g, x) if g.dim() == 3 else (g[None], x[None])
    g, x = g.square(), x.square()
    norm = torch.full((len(g),), float(g.shape[1]), dtype=torch.float64)
    return torch.einsum("enr,enc->erc", g, x), (g.sum(1), x.sum(1), norm)


def flat(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])


def windows(image: Tensor, out: torch.Size, kernel: tuple[int, ...], stride: int, dilation: int) -> Tensor:
    """[N, C, *out, *kernel]: the padded image's value at stride * p + dilation * k."""
    result = image.new_zeros(*image.shape[:2], *out, *kernel)
    for offset in itertools.product(*map(range, kernel)):
        pairs = zip(offset, out, strict=True)
        where: Any = tuple(slice(dilation * k, dilation * k + stride * p, stride) for k, p in pairs)
        at: Any = (..., *offset)
        result[at] = image[(slice(None), slice(None), *where)]
    return result


def convolution(
    by_row: Tensor, by_col: Tensor, kernel: tuple[int, ...], groups: int, stride: int, padding: int, dilation: int
) -> tuple[Tensor, Factors]:
    """by_row [N, G*R, *out] is what the weight's first dimension indexes, by_col the image it slides over."""
    space = by_row.dim() - 2
    extra = [padding, padding + stride + dilation * max(kernel)] * space  # zeros to the right are never harmful
    seen = windows(F.pad(by_col, extra), by_row.shape[2:], kernel, stride, dilation).square()
    positions = by_row[:, 0].numel()
    seen = seen.reshape(len(by_col), groups, -1, math.prod(by_row.shape[2:]), math.prod(kernel))
    rows = by_row.square().reshape(len(by_row), groups, -1, seen.shape[3])
    h = torch.einsum("ngrp,ngcpk->grck", rows, seen)
    cols = seen.sum((0, 3)).reshape(groups, -1)
    return h, (rows.sum((0, 3)), cols, torch.full((groups,), float(positions), dtype=torch.float64))


def marginals(h: Tensor, layout: Layout) -> Factors:
    h = h.reshape(layout.factors)
    return h.sum(2), h.sum(1), h.sum((1, 2))


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


def gather_sum(index: Tensor, count: int, values: Tensor) -> Tensor:
    return values.new_zeros(count, *values.shape[1:]).index_add(0, index.reshape(-1), values)


TOKENS = torch.tensor([[1, 4, 1, 0, 2], [8, 4, 3, 1, 1], [2, 2, 6, 7, 0]])
