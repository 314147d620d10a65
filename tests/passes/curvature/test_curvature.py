"""`passes.curvature` against sums of squares written out by hand in float64, and against `torch.func`.

A case marks its layers' outputs and inputs with ``tap``. In the graph a tap is the identity; in the oracle it records
the value, autograd gives each output's gradient g, and the case says which sum of g^2 x^2 the weight's curvature is.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.aot_autograd import aot_function, aot_module_simplified
from torch._functorch.compilers import nop
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.utils.checkpoint import checkpoint

from lotion_fx.passes.attach.attach import smooth
from lotion_fx.passes.attach.probe import Code, Layout
from lotion_fx.passes.curvature.resolve import Resolution, resolve_curvature

TABLES = {"none": dict, "inductor": select_decomp_table}
Factors = tuple[Tensor, Tensor, Tensor]


def latent(weight: Tensor, probe: Tensor, layout: Layout) -> Tensor:
    return smooth(weight, probe, "latent", "int4", weight.dim() - 1, layout.kind, layout.groups, layout.rows)


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
    function: Callable[..., Tensor],
    weights: list[Tensor],
    layouts: list[Any],
    data: tuple[Any, ...] = (),
    table: str = "none",
    partition: Callable[..., Any] = min_cut_rematerialization_partition,
    attach: Callable[..., Tensor] = latent,
) -> Run:
    """Forward and backward through AOTAutograd with the pass, the weights smoothed."""
    seen: dict[str, Any] = {}

    def partition_fn(joint: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        seen["resolutions"] = resolve_curvature(joint.graph)
        assert all("val" in node.meta for node in joint.graph.nodes if node.op == "call_function")
        joint.recompile()
        return partition(joint, inputs, **kwargs)

    weights = [weight.detach().clone().requires_grad_() for weight in weights]
    probes = [torch.zeros(layout.size, requires_grad=True) for layout in layouts]

    def smoothed(weights: list[Tensor], probes: list[Tensor], *data: Any) -> Tensor:
        return function(*map(attach, weights, probes, layouts), *data)

    loss = aot_function(smoothed, nop, partition_fn=partition_fn, decompositions=TABLES[table]())(
        weights, probes, *data
    )
    loss.sum().backward()
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


# ------------------------------------------------------------------------------------------------ sums by hand


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


# ------------------------------------------------------------------------------------------------ cases


@dataclass
class Case:
    """One weight in one layer.

    ``forward(w, tap, *data)`` gives the layer's output; ``expected(g, v)`` h, and natural factors where there are any,
    from the gradients and the values that were tapped.
    """

    shape: tuple[int, ...]
    groups: int
    rows: int
    forward: Callable[..., Tensor]
    expected: Callable[..., Any]
    data: tuple[Any, ...] = ()
    op: str | None = None
    tolerance: float = 1e-5


CASES: dict[str, Case] = {}


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


def linear(forward: Callable[..., Tensor], *data: Tensor, shape: tuple[int, ...] = (5, 7), **options: Any) -> Case:
    """Weight [O, I]; taps x [..., I] and y [..., O]."""
    return Case(shape, 1, shape[0], forward, lambda g, v: product(flat(g["y"]), flat(v["x"])), data, **options)


CASES["linear"] = linear(lambda w, tap, x: tap("y", F.linear(tap("x", x), w)), randn(13, 7), op="mm")
CASES["linear, one position"] = linear(lambda w, tap, x: tap("y", F.linear(tap("x", x), w)), randn(1, 7))
CASES["linear, a vector"] = linear(lambda w, tap, x: tap("y", w @ tap("x", x)), randn(7))
CASES["linear, one output"] = linear(lambda w, tap, x: tap("y", F.linear(tap("x", x), w)), randn(13, 7), shape=(1, 7))
CASES["linear, bias"] = linear(
    lambda w, tap, x, b: tap("y", F.linear(tap("x", x), w, b)), randn(13, 7), randn(5), op="mm"
)
CASES["linear, 3-D"] = linear(lambda w, tap, x: tap("y", F.linear(tap("x", x), w)), randn(3, 5, 7), op="mm")
CASES["linear, 4-D transposed input"] = linear(
    lambda w, tap, x: tap("y", F.linear(tap("x", x.transpose(1, 3)), w)), randn(2, 7, 3, 5)
)
CASES["linear, computed input"] = linear(lambda w, tap, x: tap("y", F.linear(tap("x", x.sin()), w)), randn(13, 7))
CASES["x @ w"] = Case(
    (7, 5), 1, 7, lambda w, tap, x: tap("y", tap("x", x) @ w), lambda g, v: product(v["x"], g["y"]), (randn(13, 7),)
)
CASES["x @ w, 3-D"] = Case(
    (7, 5),
    1,
    7,
    lambda w, tap, x: tap("y", tap("x", x) @ w),
    lambda g, v: product(flat(v["x"]), flat(g["y"])),
    (randn(3, 5, 7),),
)
CASES["w @ x"] = linear(lambda w, tap, x: tap("y", (w @ tap("x", x).T).T), randn(13, 7))
CASES["w @ x, batched"] = linear(lambda w, tap, x: tap("y", (w @ tap("x", x).mT).mT), randn(3, 5, 7))
CASES["expanded over a batch"] = linear(
    lambda w, tap, x: tap("y", torch.bmm(w.expand(3, 5, 7), tap("x", x).mT).mT), randn(3, 13, 7)
)
CASES["X @ vector"] = Case(
    (7,),
    1,
    7,
    lambda w, tap, x: tap("y", tap("x", x) @ w),
    lambda g, v: g["y"].square() @ v["x"].square(),
    (randn(13, 7),),
)
CASES["bmm"] = Case(
    (3, 7, 5),
    3,
    7,
    lambda w, tap, x: tap("y", torch.bmm(tap("x", x), w)),
    lambda g, v: product(v["x"], g["y"]),
    (randn(3, 13, 7),),
    "bmm",
)
CASES["bmm, weight first"] = Case(
    (3, 5, 7),
    3,
    5,
    lambda w, tap, x: tap("y", torch.bmm(w, tap("x", x))),
    lambda g, v: product(g["y"].mT, v["x"].mT),
    (randn(3, 7, 13),),
    "bmm",
)
CASES["baddbmm"] = Case(
    (3, 7, 5),
    3,
    7,
    lambda w, tap, x, b: tap("y", torch.baddbmm(b, tap("x", x), w)),
    lambda g, v: product(v["x"], g["y"]),
    (randn(3, 13, 7), randn(3, 1, 5)),
    "bmm",
)


def einsum(equation: str, shape: tuple[int, ...], groups: int, rows: int, x: Tensor, factors: str | None) -> Case:
    """``factors``: 'g' where g indexes the layout's rows, 'x' where x does, None where neither does."""
    inputs, output = equation.split("->")
    left, right = inputs.split(",")
    summed = f"{left},{output}->{right}"

    def expected(g: Any, v: Any) -> Any:
        h = torch.einsum(summed, v["x"].square(), g["y"].square())
        if factors is None:
            return h
        gs, xs = g["y"].square(), v["x"].square()
        by_g = torch.einsum(f"{output}->{''.join(c for c in right if c in output)}", gs)
        by_x = torch.einsum(f"{left}->{''.join(c for c in right if c in left)}", xs)
        sizes = dict(zip(left, xs.shape, strict=True))
        norm = torch.tensor([float(math.prod(sizes[c] for c in left if c not in right))], dtype=torch.float64)
        return h, (by_g, by_x, norm) if factors == "g" else (by_x, by_g, norm)

    return Case(shape, groups, rows, lambda w, tap, x: tap("y", torch.einsum(equation, tap("x", x), w)), expected, (x,))


CASES["einsum nd,ed->ne"] = einsum("nd,ed->ne", (5, 7), 1, 5, randn(13, 7), "g")
CASES["einsum bni,hio->bhno"] = einsum("bni,hio->bhno", (3, 7, 5), 3, 7, randn(2, 5, 7), None)
CASES["einsum btd,hkd->bthk"] = einsum("btd,hkd->bthk", (3, 5, 7), 1, 15, randn(2, 5, 7), "g")
CASES["einsum btd,dhk->bthk"] = einsum("btd,dhk->bthk", (7, 3, 5), 1, 7, randn(2, 5, 7), "x")
CASES["einsum bthk,hkd->btd"] = einsum("bthk,hkd->btd", (3, 5, 7), 1, 15, randn(2, 5, 3, 5), "x")
CASES["einsum ben,emn->bem"] = Case(
    (3, 5, 7),
    3,
    5,
    lambda w, tap, x: tap("y", torch.einsum("ben,emn->bem", tap("x", x), w)),
    lambda g, v: product(g["y"].transpose(0, 1), v["x"].transpose(0, 1)),
    (randn(11, 3, 7),),
)


def conv(size: tuple[int, ...], weight: tuple[int, ...], transposed: bool = False, **options: int) -> Case:
    space, groups = len(size) - 2, options.get("groups", 1)
    stride, padding, dilation = (options.get(k, d) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1)))
    op = getattr(F, f"conv{'_transpose' if transposed else ''}{space}d")

    def expected(g: Any, v: Any) -> Any:
        by_row, by_col = (v["x"], g["y"]) if transposed else (g["y"], v["x"])
        return convolution(by_row, by_col, weight[2:], groups, stride, padding, dilation)

    def forward(w: Tensor, tap: Any, x: Tensor) -> Tensor:
        return tap("y", op(tap("x", x), w, **options))

    return Case(weight, groups, weight[0] // groups, forward, expected, (randn(*size),), "convolution_backward")


CASES["conv1d"] = conv((3, 5, 13), (7, 5, 3))
CASES["conv1d, stride"] = conv((3, 5, 13), (7, 5, 3), stride=3, padding=2)
CASES["conv2d"] = conv((2, 3, 7, 11), (5, 3, 3, 2), stride=2, padding=1, dilation=2)
CASES["conv2d, 1x1"] = conv((2, 3, 7, 5), (5, 3, 1, 1))
CASES["conv2d, groups"] = conv((2, 6, 7, 5), (9, 2, 3, 3), groups=3, padding=1)
CASES["conv2d, depthwise"] = conv((2, 5, 7, 5), (5, 1, 3, 3), groups=5, stride=2, padding=1)
CASES["conv3d"] = conv((2, 3, 5, 7, 5), (2, 3, 3, 2, 1), stride=2, padding=1)
CASES["conv_transpose1d"] = conv((3, 5, 7), (5, 7, 3), transposed=True, stride=2, padding=1)
CASES["conv_transpose2d"] = conv(
    (2, 4, 5, 3), (4, 3, 3, 3), transposed=True, stride=2, padding=1, output_padding=1, groups=2, dilation=2
)
CASES["conv1d, no batch"] = Case(
    (7, 5, 3),
    1,
    7,
    lambda w, tap, x: tap("y", F.conv1d(tap("x", x), w)),
    lambda g, v: convolution(g["y"][None], v["x"][None], (3,), 1, 1, 0, 1),
    (randn(5, 13),),
)

# Patches as a convolution of stride = kernel by hand, as vision transformers write it.
CASES["patches"] = Case(
    (5, 3, 2, 2),
    1,
    5,
    lambda w, tap, x: tap("y", F.linear(tap("x", F.unfold(x, 2, stride=2).mT), w.flatten(1))),
    lambda g, v: product(flat(g["y"]), flat(v["x"])),
    (randn(2, 3, 4, 6),),
    "mm",
)


def gather_sum(index: Tensor, count: int, values: Tensor) -> Tensor:
    return values.new_zeros(count, *values.shape[1:]).index_add(0, index.reshape(-1), values)


TOKENS = torch.tensor([[1, 4, 1, 0, 2], [8, 4, 3, 1, 1], [2, 2, 6, 7, 0]])


def embedding_sum(g: Any, v: Any, padding: int | None = None) -> Tensor:
    h = gather_sum(TOKENS, 9, flat(g["y"]).square())
    if padding is not None:
        h[padding] = 0
    return h


CASES["embedding"] = Case((9, 7), 1, 9, lambda w, tap, i: tap("y", F.embedding(i, w)), embedding_sum, (TOKENS,))
CASES["embedding, padding"] = Case(
    (9, 7),
    1,
    9,
    lambda w, tap, i: tap("y", F.embedding(i, w, padding_idx=2)),
    lambda g, v: embedding_sum(g, v, 2),
    (TOKENS,),
)
CASES["embedding by index, then a residual stream"] = Case(
    (9, 7),
    1,
    9,
    lambda w, tap, i, m: (lambda e: e + F.gelu(e) @ m)(tap("y", w[i])),
    embedding_sum,
    (TOKENS, randn(7, 7)),
)
CASES["scale"] = Case(
    (7,),
    1,
    7,
    lambda w, tap, x: tap("y", tap("x", x) * w),
    lambda g, v: (g["y"] * v["x"]).square().sum((0, 1)),
    (randn(3, 5, 7),),
)
CASES["scale of rows"] = Case(
    (5, 1),
    1,
    5,
    lambda w, tap, x: tap("y", w * tap("x", x)),
    lambda g, v: (g["y"] * v["x"]).square().sum((0, 2)),
    (randn(3, 5, 7),),
)
CASES["scale, then a matrix"] = Case(
    (7,),
    1,
    7,
    lambda w, tap, x, m: tap("y", tap("x", x) * w) @ m,
    lambda g, v: (g["y"] * v["x"]).square().sum((0, 1)),
    (randn(3, 5, 7), randn(7, 5)),
)
CASES["rms_norm"] = Case(
    (7,),
    1,
    7,
    lambda w, tap, x: tap("y", tap("x", F.rms_norm(x, (7,))) * w),
    lambda g, v: (g["y"] * v["x"]).square().sum((0, 1)),
    (randn(3, 5, 7),),
)
CASES["position table"] = Case(
    (5, 7),
    1,
    5,
    lambda w, tap, x, m: (lambda y: y + torch.tanh(y @ m))(tap("y", x + w)),
    lambda g, v: g["y"].square().sum(0),
    (randn(3, 5, 7), randn(7, 7)),
)
CASES["position table, cut, seen by heads"] = Case(
    (9, 7),
    1,
    9,
    lambda w, tap, x, m: tap("y", x + w[:5]).unsqueeze(1) @ m,
    lambda g, v: F.pad(g["y"].square().sum(0), (0, 0, 0, 4)),
    (randn(3, 5, 7), randn(2, 7, 5)),
)

SLOTS = torch.tensor([2, 0, 2, 1, 2, 0])


def experts(forward: Callable[..., Tensor], *data: Any) -> Case:
    """Weight [E, R, C]; taps x [S, N, C] and y [S, N, R] of the slots' experts."""

    def expected(g: Any, v: Any) -> Any:
        gs, xs = g["y"].square(), v["x"].square()
        h = gather_sum(SLOTS, 4, torch.einsum("snr,snc->src", gs, xs))
        counts = gather_sum(SLOTS, 4, torch.full((len(SLOTS),), float(gs.shape[1]), dtype=torch.float64))
        return h, (gather_sum(SLOTS, 4, gs.sum(1)), gather_sum(SLOTS, 4, xs.sum(1)), counts)

    return Case((4, 5, 7), 4, 5, forward, expected, (SLOTS, *data))


CASES["gathered experts"] = experts(lambda w, tap, i, x: tap("y", torch.bmm(w[i], tap("x", x).mT).mT), randn(6, 1, 7))
CASES["gathered experts, several positions"] = experts(
    lambda w, tap, i, x: tap("y", torch.bmm(tap("x", x), w[i].mT)), randn(6, 3, 7)
)
CASES["gathered experts, two indices"] = experts(
    lambda w, tap, i, x: tap("y", torch.bmm(tap("x", x), w[i.view(3, 2)].flatten(0, 1).mT)), randn(6, 3, 7)
)
CASES["gathered experts, index_select"] = experts(
    lambda w, tap, i, x: tap("y", torch.bmm(tap("x", x), w.index_select(0, i).mT)), randn(6, 3, 7)
)

CASES["gathered rows of a matrix"] = Case(
    (9, 7),
    1,
    9,
    lambda w, tap, i, x: tap("y", F.linear(tap("x", x), w[i])),
    lambda g, v: gather_sum(SLOTS, 9, product(g["y"], v["x"])[0][0]),
    (SLOTS, randn(13, 7)),
)


def grouped(ends: list[int]) -> Case:
    """Rows after the last end belong to no expert; what they hold must not matter."""

    def expected(g: Any, v: Any) -> Any:
        parts = [product(v["x"][a:b], g["y"][a:b]) for a, b in itertools.pairwise([0, *ends])]
        hs, factors = zip(*parts, strict=True)
        return torch.cat(hs), tuple(torch.cat(f) for f in zip(*factors, strict=True))

    def forward(w: Tensor, tap: Any, x: Tensor, offs: Tensor) -> Tensor:
        x = tap("x", x)
        if w.dtype == torch.float64:  # the op knows no float64
            y = torch.cat([x[a:b] @ w[e] for e, (a, b) in enumerate(itertools.pairwise([0, *ends]))])
        else:
            y = F.grouped_mm(x.bfloat16(), w.bfloat16(), offs=offs).float()[: ends[-1]]
        return tap("y", y)

    x = randn(13, 16).bfloat16().float()
    x[ends[-1] :] = torch.nan
    # bfloat16 has 8 bits: the gradient, the squares and the full product are each rounded, by up to 2^-9.
    data = (x, torch.tensor(ends, dtype=torch.int32))
    return Case((4, 16, 8), 4, 16, forward, expected, data, "_grouped_mm", 1e-2)


CASES["grouped_mm"] = grouped([3, 3, 10, 13])
CASES["grouped_mm, rows of no expert"] = grouped([3, 4, 10, 11])

CASES["view and permute"] = Case(
    (5, 3, 7),
    1,
    15,
    lambda w, tap, x: tap("y", F.linear(tap("x", x), w.view(15, 7))),
    lambda g, v: product(g["y"], v["x"]),
    (randn(13, 7),),
    "mm",
)
CASES["permuted out of factored order"] = Case(
    (3, 7, 5),
    1,
    15,
    lambda w, tap, x: tap("y", F.linear(tap("x", x), w.permute(0, 2, 1).reshape(15, 7))),
    lambda g, v: product(g["y"], v["x"])[0].view(3, 5, 7).mT,
    (randn(13, 7),),
    "mm",
)
CASES["rows cut into groups"] = Case(
    (15, 7),
    3,
    5,
    lambda w, tap, x: tap("y", F.linear(tap("x", x), w)),
    lambda g, v: (
        product(g["y"], v["x"])[0],
        (g["y"].square().sum(0), v["x"].square().sum(0).expand(3, 7), torch.full((3,), 13.0)),
    ),
    (randn(13, 7),),
    "mm",
)
CASES["scaled"] = Case(
    (5, 7),
    1,
    5,
    lambda w, tap, x: tap("y", F.linear(tap("x", x), -w * 0.5)),
    lambda g, v: product(g["y"] / 2, v["x"]),
    (randn(13, 7),),
    "mm",
)
CASES["masked"] = Case(
    (5, 7),
    1,
    5,
    lambda w, tap, x, m: tap("y", F.linear(tap("x", x), w * m)),
    lambda g, v: product(g["y"], v["x"])[0] * wave(torch.Size((5, 7))).square(),
    (randn(13, 7), wave(torch.Size((5, 7)))),
    "mm",
)
CASES["pruned"] = Case(
    (5, 7),
    1,
    5,
    lambda w, tap, x, m: tap("y", F.linear(tap("x", x), w.masked_fill(m, 0.0))),
    lambda g, v: product(g["y"], v["x"])[0] * (wave(torch.Size((5, 7))) > 0),
    (randn(13, 7), wave(torch.Size((5, 7))) <= 0),
)
CASES["with a low-rank addition"] = linear(
    lambda w, tap, x, a, b: tap("y", F.linear(tap("x", x), w + a @ b)), randn(13, 7), randn(5, 2), randn(2, 7), op="mm"
)
CASES["slice of columns"] = Case(
    (5, 9),
    1,
    5,
    lambda w, tap, x: tap("y", F.linear(tap("x", x), w[:, 1:8])),
    lambda g, v: F.pad(product(g["y"], v["x"])[0], (1, 1)),
    (randn(13, 7),),
)
CASES["padded"] = Case(
    (5, 6),
    1,
    5,
    lambda w, tap, x: tap("y", F.linear(tap("x", x), F.pad(w, (0, 1)))),
    lambda g, v: product(g["y"], v["x"])[0][..., :6],
    (randn(13, 7),),
)
CASES["flipped"] = Case(
    (5, 7),
    1,
    5,
    lambda w, tap, x: tap("y", F.linear(tap("x", x), w.flip(0))),
    lambda g, v: product(g["y"], v["x"])[0].flip(1),
    (randn(13, 7),),
)


def qkv(w: Tensor, tap: Any, x: Tensor) -> Tensor:
    x = tap("x", x)
    q, k, v = (tap(name, F.linear(x, part)) for name, part in zip("qkv", w.chunk(3), strict=True))
    return torch.softmax(q @ k.mT, -1) @ v


CASES["chunks"] = Case(
    (15, 7),
    1,
    15,
    qkv,
    lambda g, v: torch.cat([product(flat(g[name]), flat(v["x"]))[0][0] for name in "qkv"]),
    (randn(2, 5, 7),),
)


def fused(w: Tensor, tap: Any, x: Tensor) -> Tensor:
    q, k, v = tap("y", F.linear(tap("x", x), w)).chunk(3, -1)
    return torch.softmax(q @ k.mT, -1) @ v


CASES["fused, then chunks of the output"] = linear(fused, randn(2, 5, 7), shape=(15, 7), op="mm")
CASES["selected"] = Case(
    (2, 5, 7),
    2,
    5,
    lambda w, tap, x: tap("b", torch.tanh(tap("a", F.linear(tap("x", x), w[0]))) + F.linear(x.cos(), w[1])),
    lambda g, v: torch.stack([product(g["a"], v["x"])[0][0], product(g["b"], v["x"].cos())[0][0]]),
    (randn(13, 7),),
)
CASES["half a weight, cast"] = linear(
    lambda w, tap, x: tap("y", F.linear(tap("x", x), w.to(x.dtype))), randn(13, 7).double(), op="mm"
)


def tied(w: Tensor, tap: Any, index: Tensor, m: Tensor) -> Tensor:
    x = tap("x", torch.tanh(tap("e", F.embedding(index, w)) @ m))
    return tap("y", F.linear(x, w))


CASES["tied"] = Case(
    (9, 7),
    1,
    9,
    tied,
    lambda g, v: gather_sum(TOKENS, 9, flat(g["e"]).square()) + product(flat(g["y"]), flat(v["x"]))[0][0],
    (TOKENS, randn(7, 7)),
)
CASES["tied, nothing between"] = Case(
    (9, 7),
    1,
    9,
    lambda w, tap, i: tap("y", F.linear(tap("x", tap("e", F.embedding(i, w))), w)),
    lambda g, v: gather_sum(TOKENS, 9, flat(g["e"]).square()) + product(flat(g["y"]), flat(v["x"]))[0][0],
    (TOKENS,),
)


def looped(w: Tensor, tap: Any, x: Tensor) -> Tensor:
    x1 = tap("x1", torch.tanh(tap("y0", F.linear(tap("x0", x), w))))
    return tap("y1", F.linear(x1, w))


def two_uses(g: Any, v: Any) -> Any:
    (h0, f0), (h1, f1) = (product(flat(g[f"y{n}"]), flat(v[f"x{n}"])) for n in (0, 1))
    return h0 + h1, tuple(a + b for a, b in zip(f0, f1, strict=True))


CASES["looped"] = Case((7, 7), 1, 7, looped, two_uses, (randn(2, 5, 7),), "mm")
CASES["checkpointed"] = Case(
    (7, 7),
    1,
    7,
    lambda w, tap, x: checkpoint(lambda w, x: looped(w, tap, x), w, x, use_reentrant=False).sin(),
    two_uses,
    (randn(2, 5, 7),),
    "mm",
)


class Recomputing(torch.autograd.Function):
    """linear(tanh(x), w) that keeps x and computes tanh(x) again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(w, x)
        return F.linear(x.tanh(), w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return g.T @ ctx.saved_tensors[1].tanh(), None


CASES["recomputed input"] = Case(
    (5, 7),
    1,
    5,
    lambda w, tap, x: tap("y", Recomputing.apply(w, tap("x", x))),
    lambda g, v: product(g["y"], v["x"].tanh()),
    (randn(13, 7),),
    "mm",
)


def oracle(case: Case, weight: Tensor) -> tuple[Tensor, Factors | None]:
    """The case in float64: gradients of the taps by autograd, then the sum written out."""
    values: dict[str, Tensor] = {}

    def tap(name: str, value: Tensor) -> Tensor:
        return values.setdefault(name, value)  # a recomputation taps again

    def double(value: Any) -> Any:
        return value.double() if value.is_floating_point() else value

    leaf = weight.double().requires_grad_()
    loss = loss_of(case.forward(leaf, tap, *map(double, case.data)))
    on_the_way = {name: value for name, value in values.items() if value.requires_grad}
    gradients = torch.autograd.grad(loss, list(on_the_way.values()))
    g = dict(zip(on_the_way, gradients, strict=True))
    expected = case.expected(g, {name: value.detach() for name, value in values.items()})
    return expected if isinstance(expected, tuple) else (expected, None)


@dataclass
class Both:
    """One probe for the two kinds, so that one trace serves both."""

    full: Layout
    factored: Layout

    @property
    def size(self) -> int:
        return self.full.size + self.factored.size

    @staticmethod
    def attach(weight: Tensor, probe: Tensor, both: Any) -> Tensor:
        first, second = probe[: both.full.size], probe[both.full.size :]
        return latent(latent(weight, first, both.full), second, both.factored)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_sum_of_squares_written_out(name: str, table: str) -> None:
    case = CASES[name]
    weight = randn(*case.shape) / 2
    full, factored = (Layout(kind, case.shape, case.groups, case.rows) for kind in ("full", "factored"))

    def function(w: Tensor, *data: Any) -> Tensor:
        return loss_of(case.forward(w, lambda _, value: value, *data))

    made = run(function, [weight], [Both(full, factored)], case.data, table, attach=Both.attach)
    for resolution in made.resolutions:
        assert resolution.code == Code.ANALYTIC and not resolution.reason, resolution
        if case.op and table == "none":
            assert resolution.op == case.op
    h, natural = oracle(case, weight)
    probes = made.probes[0].split((full.size, factored.size))
    close(probes[0][: full.payload], h, case.tolerance)
    for part, expected in zip(factored.split(probes[1]), natural or marginals(h, factored), strict=True):
        close(part, expected, case.tolerance)
    assert all(probe[-3:-1].tolist() == [1, Code.ANALYTIC] for probe in probes)


def test_autocast_is_seen_through() -> None:
    x, w, layout = randn(13, 7), randn(5, 7), Layout("factored", (5, 7), 1, 5)

    def forward(w: Tensor, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(F.linear(x, w))

    for table in TABLES:
        made = run(forward, [w], [layout], (x,), table)
        assert made.resolutions[0].code == Code.ANALYTIC
        y = (x.bfloat16() @ w.bfloat16().T).float().requires_grad_()
        (g,) = torch.autograd.grad(loss_of(y), y)
        _, factors = product(g.bfloat16().double(), x.bfloat16().double())
        for part, expected in zip(layout.split(made.probes[0]), factors, strict=True):
            close(part, expected, 1e-3)  # g once rounded and seldom otherwise than here; sums are in float32


def test_float16_squares_do_not_underflow() -> None:
    """1e-4 squared is below float16's smallest number."""
    x, w = randn(13, 7), randn(5, 7)

    def forward(w: Tensor, x: Tensor) -> Tensor:
        return (F.linear(x.half(), w.half()).float() * 1e-4).sum()

    for kind in ("full", "factored"):
        layout = Layout(kind, (5, 7), 1, 5)
        made = run(forward, [w], [layout], (x,))
        h, factors = product(torch.full((13, 5), 1e-4).half().double(), x.half().double())
        close(made.probes[0][: layout.payload], h if kind == "full" else torch.cat([f.flatten() for f in factors]))


# ------------------------------------------------------------------------------------------------ torch.func


def test_mlp_equals_the_squares_of_per_sample_gradients() -> None:
    x, shapes = randn(11, 7), [(5, 7), (3, 5)]
    weights = [randn(*shape) for shape in shapes]

    def samples(weights: Any, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x @ weights[0].T) @ weights[1].T).square().sum(-1)

    layouts = [Layout("full", shape, 1, shape[0]) for shape in shapes]
    made = run(lambda *args: samples(args[:2], args[2]).mean(), weights, layouts, (x,))
    doubles = [weight.double() for weight in weights]
    per_sample = torch.func.vmap(torch.func.grad(samples), in_dims=(None, 0))(doubles, x.double())
    for probe, layout, gradients in zip(made.probes, layouts, per_sample, strict=True):
        # The loss is a mean, so each sample's gradient is 1/T of its own: h = T * probe is the mean of the squares.
        close(probe[-1] * probe[: layout.payload], gradients.square().mean(0))
        assert probe[-1] == len(x)


def perturbed(network: Callable[..., Tensor], weights: list[Tensor], x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(g, input) of each layer: the gradients with respect to a perturbation of its output, by `torch.func.vjp`."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def record(n: int, i: Tensor, y: Tensor) -> Tensor:
        inputs.append(i)
        outputs.append(y)
        return y

    network(weights, x, record)
    zeros = [torch.zeros_like(y) for y in outputs]
    steps = torch.func.vjp(lambda steps: network(weights, x, lambda n, i, y: y + steps[n]), zeros)
    return list(zip(steps[1](torch.ones_like(steps[0]))[0], inputs, strict=True))


def cnn(weights: Any, x: Tensor, layer: Any) -> Tensor:
    x = F.relu(layer(0, x, F.conv2d(x, weights[0], stride=2, padding=1)))
    x = F.relu(layer(1, x, F.conv2d(x, weights[1], padding=1, groups=2)))
    x = F.avg_pool2d(x, 2).flatten(1)
    return F.cross_entropy(layer(2, x, x @ weights[2].T), torch.arange(len(x)) % 3)


def transformer(weights: Any, x: Tensor, layer: Any) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:])
    q, k, v = layer(0, normed, normed @ weights[0].T).chunk(3, -1)
    mixed = F.scaled_dot_product_attention(*(t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v)))
    mixed = mixed.transpose(1, 2).flatten(2)
    x = x + layer(1, mixed, mixed @ weights[1].T)
    normed = F.layer_norm(x, x.shape[-1:])
    hidden = F.gelu(layer(2, normed, normed @ weights[2].T))
    x = x + layer(3, hidden, hidden @ weights[3].T)
    logits = layer(4, x, x @ weights[4].T)
    return F.cross_entropy(logits.flatten(0, 1), torch.arange(logits[..., 0].numel()) % logits.shape[-1])


NETWORKS: dict[str, Any] = {
    "cnn": (cnn, [(4, 3, 3, 3), (6, 2, 3, 3), (3, 24)], (5, 3, 8, 8), [1, 2, 1], 5),
    "transformer": (transformer, [(18, 6), (6, 6), (11, 6), (6, 11), (13, 6)], (3, 5, 6), [1] * 5, 15),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", NETWORKS)
def test_network_equals_the_squares_of_per_position_gradients(name: str, table: str) -> None:
    network, shapes, size, groups, terms = NETWORKS[name]
    x, weights = randn(*size), [randn(*shape) / 2 for shape in shapes]
    layouts = [Layout("full", shape, g, shape[0] // g) for shape, g in zip(shapes, groups, strict=True)]
    made = run(lambda *args: network(args[:-1], args[-1], lambda n, i, y: y), weights, layouts, (x,), table)
    oracles = perturbed(network, [weight.double() for weight in weights], x.double())
    for probe, layout, (g, i), shape in zip(made.probes, layouts, oracles, shapes, strict=True):
        if len(shape) == 4:
            stride = 2 if layout.groups == 1 else 1
            h, _ = convolution(g, i, shape[2:], layout.groups, stride, 1, 1)
        else:
            # per position and weight, the gradient itself, then its square
            h = torch.einsum("no,ni->noi", flat(g), flat(i)).square().sum(0)
        close(probe[: layout.payload], h)
        assert probe[-3:].tolist() == [1, Code.ANALYTIC, terms]


# ------------------------------------------------------------------------------------------------ what is not linear

NOT_LINEAR: dict[str, tuple[Callable[..., Tensor], Code, str | None]] = {
    "w @ w": (lambda w, x: x @ (w @ w), Code.NONLINEAR, "mm"),
    "w * w": (lambda w, x: x @ (w * w), Code.NONLINEAR, "mul"),
    "normalized": (lambda w, x: x @ (w / w.norm()), Code.NONLINEAR, "div"),
    "weight norm by rows": (lambda w, x: x @ F.normalize(w), Code.NONLINEAR, "div"),
    "softmax": (lambda w, x: w.softmax(-1) @ x.T, Code.NONLINEAR, None),
    "relu": (lambda w, x: x @ w.relu(), Code.NONLINEAR, None),
    "exp of a scale": (lambda w, x: x * w[0].exp(), Code.NONLINEAR, None),
    "twice a scale": (lambda w, x: x * w[0] * w[0], Code.NONLINEAR, "mul"),
    "gated by itself": (lambda w, x: x @ (w * torch.sigmoid(w)), Code.NONLINEAR, "mul"),
    "one use of two": (lambda w, x: torch.tanh(x @ w) @ w.exp(), Code.NONLINEAR, None),
    "weight decay in the loss": (lambda w, x: (x @ w) + w.square().sum(), Code.NONLINEAR, None),
    "cumsum": (lambda w, x: x @ w.cumsum(0), Code.NOT_A_CONTRACTION, "cumsum"),
    "sorted": (lambda w, x: x @ w.sort(0).values, Code.NONLINEAR, None),
    "no positions": (lambda w, x: w + x[:5], Code.NONLINEAR, None),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_takes_the_fisher_form(name: str, table: str) -> None:
    function, code, op = NOT_LINEAR[name]
    layout = Layout("factored", (5, 5), 1, 5)
    made = run(lambda w, x: loss_of(function(w, x)), [randn(5, 5)], [layout], (randn(13, 5),), table)
    (resolution,) = made.resolutions
    assert resolution.code == code and resolution.reason == code.reason and resolution.op
    if op is not None and (table == "none" or code == Code.NONLINEAR):
        assert resolution.op == op
    (probe,) = made.probes
    assert not probe[: layout.payload].any() and probe[-3:-1].tolist() == [1, code]


def test_weights_that_are_added_share_a_gradient_and_keep_their_own_uses() -> None:
    layouts = [Layout("full", (5, 7), 1, 5)] * 2
    made = run(lambda a, b, x: loss_of(F.linear(x, a + b.square())), [randn(5, 7)] * 2, layouts, (randn(13, 7),))
    assert [probe[-2] for probe in made.probes] == [Code.ANALYTIC, Code.NONLINEAR]


def test_by_choice_has_terms_and_no_payload() -> None:
    made = run(lambda w, x: loss_of(x @ w), [randn(5, 7)], [Layout("none", (5, 7), 1, 5)], (randn(13, 5),))
    assert made.probes[0].tolist() == [1, Code.BY_CHOICE, 13]
    assert made.resolutions[0].code == Code.BY_CHOICE
    made = run(lambda w, i: loss_of(F.embedding(i, w)), [randn(9, 7)], [Layout("none", (9, 7), 1, 9)], (TOKENS,))
    assert made.probes[0].tolist() == [1, Code.BY_CHOICE, 15]


@pytest.mark.parametrize("partition", [min_cut_rematerialization_partition, default_partition])
def test_gradients_and_forward_values_are_untouched(partition: Callable[..., Any]) -> None:
    network, shapes, size, *_ = NETWORKS["transformer"]
    x, weights = randn(*size), [randn(*shape) / 2 for shape in shapes]

    def function(*args: Any) -> Tensor:
        return network(args[:-1], args[-1], lambda n, i, y: y)

    layouts = [Layout("factored", shape, 1, shape[0]) for shape in shapes]
    made = run(function, weights, layouts, (x,), partition=partition)
    leaves = [weight.clone().requires_grad_() for weight in weights]
    plain = aot_function(lambda *args: function(*args), nop, partition_fn=partition, decompositions={})(*leaves, x)
    plain.backward()
    assert torch.equal(made.loss, plain)
    assert all(torch.equal(grad, gradient(leaf)) for grad, leaf in zip(made.grads, leaves, strict=True))


def test_forward_saves_nothing_for_curvature() -> None:
    """Squares of activations belong to the backward graph, else both x and x^2 would be kept."""
    saved = []

    def partition(*args: Any, **kwargs: Any) -> Any:
        forward, backward = default_partition(*args, **kwargs)
        saved.append(len(forward.graph.find_nodes(op="output")[0].args[0]))
        return forward, backward

    for kind in ("none", "full", "factored"):
        run(
            lambda w, x: loss_of(F.linear(x.sin(), w)),
            [randn(5, 7)],
            [Layout(kind, (5, 7), 1, 5)],
            (randn(13, 7),),
            partition=partition,
        )
    assert len(set(saved)) == 1


def test_accumulates_over_micro_batches() -> None:
    layout, (x, w) = Layout("full", (5, 7), 1, 5), (randn(13, 7), randn(5, 7))
    probe = torch.zeros(layout.size, requires_grad=True)

    def partition(joint: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        resolve_curvature(joint.graph)
        joint.recompile()
        return default_partition(joint, inputs, **kwargs)

    def function(w: Tensor, probe: Tensor, x: Tensor) -> Tensor:
        return loss_of(F.linear(x, latent(w, probe, layout)))

    compiled = aot_function(function, nop, partition_fn=partition, decompositions={})
    for batch in (x, x.sin()):
        compiled(w.clone().requires_grad_(), probe, batch).backward()
    y = [(i.double() @ w.double().T).requires_grad_() for i in (x, x.sin())]
    g = torch.autograd.grad(torch.stack([loss_of(value) for value in y]).sum(), y)
    expected = torch.stack([product(a, b.double())[0] for a, b in zip(g, (x, x.sin()), strict=True)]).sum(0)
    close(gradient(probe)[: layout.payload], expected)
    assert gradient(probe)[-3:].tolist() == [2, 2 * Code.ANALYTIC, 2 * 13]


# ------------------------------------------------------------------------------------------------ loss terms


def terms_of(function: Callable[..., Tensor], shape: tuple[int, ...], *data: Any) -> list[float]:
    layout = Layout("factored", shape, 1, shape[0])
    return [run(function, [randn(*shape) / 2], [layout], data, table).probes[0][-1].item() for table in TABLES]


LABELS = torch.tensor([[1, -100, 3, 0, 2], [-100, -100, 4, 1, 1], [2, 2, 1, -100, 0]])


def test_terms_are_the_tokens_with_a_label() -> None:
    def token_loss(w: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w).flatten(0, 1), labels.flatten())

    assert terms_of(token_loss, (5, 7), randn(3, 5, 7), LABELS) == [11, 11]


def test_terms_do_not_change_behind_a_hidden_layer_or_an_unsmoothed_head() -> None:
    def token_loss(w: Tensor, x: Tensor, labels: Tensor, head: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(F.linear(x, w).tanh(), head).flatten(0, 1), labels.flatten())

    frozen, trained = randn(5, 6), randn(5, 6).requires_grad_()
    for head in (frozen, trained):
        assert terms_of(token_loss, (6, 7), randn(3, 5, 7), LABELS, head) == [11, 11]


def test_terms_with_a_tied_head_that_is_not_smoothed() -> None:
    def token_loss(w: Tensor, table: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = F.linear(F.embedding(tokens, table), w).tanh()
        return F.cross_entropy(F.linear(hidden, table).flatten(0, 1), labels.flatten())

    table = randn(9, 7).requires_grad_()
    assert terms_of(token_loss, (7, 7), table, TOKENS, LABELS) == [11, 11]


def test_terms_with_one_unsmoothed_layer_of_given_input() -> None:
    """Head and input are both placeholders; that the input comes first says which is which."""

    def token_loss(w: Tensor, head: Tensor, x: Tensor) -> Tensor:
        return loss_of(F.linear(x, head)) + loss_of(x * w)

    assert terms_of(token_loss, (7,), randn(3, 7).requires_grad_(), randn(13, 7)) == [13, 13]


def test_terms_where_the_input_is_also_the_second_operand() -> None:
    """Scores of 5 queries against 13 keys; the keys are also the input of another product, of another size."""

    def retrieval(w: Tensor, queries: Tensor, keys: Tensor, head: Tensor) -> Tensor:
        auxiliary = loss_of(keys @ head)
        return auxiliary + loss_of((queries @ w).tanh() @ keys.T)

    assert terms_of(retrieval, (7, 7), randn(5, 7), randn(13, 7), randn(7, 3).requires_grad_()) == [5, 5]


def test_terms_of_a_mean_pooled_classifier_are_the_samples() -> None:
    def classifier(w: Tensor, x: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(F.linear(x, w).relu().mean(1), head), labels)

    head, labels = randn(4, 5).requires_grad_(), torch.tensor([1, 0, 2])
    assert terms_of(classifier, (5, 7), randn(3, 11, 7), head, labels) == [3, 3]


def test_terms_of_a_segmentation_are_the_pixels() -> None:
    labels = torch.arange(2 * 5 * 7).reshape(2, 5, 7) % 3
    labels[0, 0, :4] = 255

    def segmentation(w: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.conv2d(x, w, padding=1), labels, ignore_index=255)

    assert terms_of(segmentation, (3, 4, 3, 3), randn(2, 4, 5, 7), labels) == [66, 66]


def test_terms_of_a_regression() -> None:
    assert terms_of(lambda w, x, y: F.mse_loss(F.linear(x, w), y), (5, 7), randn(13, 7), randn(13, 5)) == [13, 13]
    assert terms_of(lambda w, x, y: F.mse_loss(x @ w, y), (7,), randn(13, 7), randn(13)) == [13, 13]


@pytest.mark.parametrize("kind", ["none", "factored"])
def test_terms_where_the_weight_comes_first(kind: str) -> None:
    """[O, I] @ [I, N]: positions are the output's columns."""
    for function in (lambda w: w, lambda w: w * w):
        for table in TABLES:
            layouts = [Layout(kind, (5, 7), 1, 5), Layout(kind, (7, 4), 1, 7)]
            made = run(
                lambda w, v, x, function=function: loss_of(function(w) @ (v @ x).tanh()),
                [randn(5, 7), randn(7, 4)],
                layouts,
                (randn(4, 13),),
                table,
            )
            assert [probe[-1] for probe in made.probes] == [13, 13]


def test_terms_where_nothing_is_contracted() -> None:
    assert terms_of(lambda w, i: loss_of(F.embedding(i, w)), (9, 7), TOKENS) == [15, 15]
    assert terms_of(lambda w, x: loss_of(x * w), (7,), randn(3, 5, 7)) == [15, 15]


def test_terms_with_the_loss_outside_the_graph() -> None:
    layout, data = Layout("factored", (5, 7), 1, 5), (randn(3, 5, 7),)
    seen = run(lambda w, x: F.linear(x, w), [randn(5, 7)], [layout], data)
    assert seen.probes[0][-1] == 15


def test_terms_are_known_to_a_weight_used_after_the_last_contraction() -> None:
    layouts = [Layout("factored", (5, 7), 1, 5), Layout("factored", (5,), 1, 5)]
    made = run(lambda w, s, x: loss_of(F.linear(x, w) * s), [randn(5, 7), randn(5)], layouts, (randn(13, 7),))
    assert [probe[-1].item() for probe in made.probes] == [13, 13]


# ------------------------------------------------------------------------------------------------ through torch.compile


def test_dynamic_batch() -> None:
    """One graph with a symbolic batch gives the right norm and terms at every size."""
    layouts = [Layout("factored", (5, 7), 1, 5), Layout("factored", (4, 5, 3), 1, 4), Layout("full", (9, 7), 1, 9)]
    joints: list[torch.fx.Graph] = []

    def partition(joint: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        assert all(item.code == Code.ANALYTIC for item in resolve_curvature(joint.graph))
        joints.append(joint.graph)
        joint.recompile()
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        return aot_module_simplified(gm, inputs, nop, partition_fn=partition, decompositions=select_decomp_table())

    attach = torch._dynamo.allow_in_graph(latent)  # in use the node is put in after Dynamo

    @torch.compile(backend=backend, fullgraph=True)
    def function(weights: Any, probes: Any, tokens: Tensor) -> Tensor:
        linear, kernel, table = map(attach, weights, probes, layouts)
        x = F.linear(F.embedding(tokens, table), linear).tanh()
        return F.conv1d(x.mT, kernel, stride=2)

    weights = [randn(*layout.shape).requires_grad_() for layout in layouts]
    for batch in (3, 6, 4):
        probes = [torch.zeros(layout.size, requires_grad=True) for layout in layouts]
        tokens = torch.arange(batch * 11).reshape(batch, 11) % 9
        torch._dynamo.mark_dynamic(tokens, 0)
        loss_of(function(weights, probes, tokens)).backward()
        norms = [layout.split(gradient(probe))[2].item() for layout, probe in zip(layouts[:2], probes, strict=False)]
        assert norms == [batch * 11, batch * 5]
        assert all(gradient(probe)[-3:].tolist() == [1, Code.ANALYTIC, batch * 5] for probe in probes)
        e = weights[2].detach().double()[tokens].requires_grad_()
        y = F.linear(e, weights[0].detach().double())
        z = F.conv1d(y.tanh().mT, weights[1].detach().double(), stride=2)
        g = torch.autograd.grad(loss_of(z), (y, e))
        _, factors = product(flat(g[0]), flat(e))
        for part, expected in zip(layouts[0].split(gradient(probes[0])), factors, strict=True):
            close(part, expected)
        close(gradient(probes[2])[: layouts[2].payload], gather_sum(tokens, 9, flat(g[1]).square()))
    assert len(joints) == 1


def test_rounded_forward_is_not_mistaken_for_a_nonlinear_use() -> None:
    """Under the straight-through modes the weight that meets the data is Q(w), a function of w."""
    layout, x = Layout("full", (5, 7), 1, 5), randn(13, 7)
    for mode in ("ste", "ste_scale", "rr"):

        def attach(w: Tensor, probe: Tensor, layout: Layout, mode: str = mode) -> Tensor:
            return smooth(w, probe, mode, "int4", 1, layout.kind, layout.groups, layout.rows)

        made = run(lambda w, x: F.linear(x, w).sum(), [randn(5, 7)], [layout], (x,), attach=attach)
        assert made.resolutions[0].code == Code.ANALYTIC
        close(made.probes[0][: layout.payload], product(torch.ones(13, 5).double(), x.double())[0])
