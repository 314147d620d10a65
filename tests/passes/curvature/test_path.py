"""From a weight's gradient back to its contractions: what is walked keeps the sum, and what proves nothing stops."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lotion_fx.passes.attach.attach import smooth
from lotion_fx.passes.attach.probe import Code, Layout
from tests.passes.curvature.cases import Case, assert_equals_the_sum, linear
from tests.passes.curvature.running import (
    TABLES,
    TOKENS,
    close,
    flat,
    gather_sum,
    loss_of,
    product,
    randn,
    run,
    said,
    wave,
)

CASES: dict[str, Case] = {}
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
CASES["rows in another order"] = Case(
    (6, 7),
    1,
    6,
    lambda w, tap, x: tap("y", F.linear(tap("x", x), w.view(2, 3, 7).transpose(0, 1).reshape(6, 7))),
    lambda g, v: product(g["y"], v["x"])[0].view(3, 2, 7).transpose(0, 1).reshape(1, 6, 7),
    (randn(13, 7),),
)
CASES["columns in another order"] = Case(
    (5, 6),
    1,
    5,
    lambda w, tap, x: tap("y", F.linear(tap("x", x), w.view(5, 2, 3).permute(0, 2, 1).contiguous().view(5, 6))),
    lambda g, v: product(g["y"], v["x"])[0].view(1, 5, 3, 2).transpose(2, 3).reshape(1, 5, 6),
    (randn(13, 6),),
)
CASES["beside others"] = Case(
    (5, 7),
    1,
    5,
    lambda w, tap, x, m: tap("y", F.linear(tap("x", x), torch.cat([m, w]))[:, 3:]),
    lambda g, v: product(g["y"], v["x"])[0],
    (randn(13, 7), randn(3, 7)),
)
CASES["above the diagonal"] = Case(
    (7, 7),
    1,
    7,
    lambda w, tap, x: tap("y", F.linear(tap("x", x), w.triu())),
    lambda g, v: product(g["y"], v["x"])[0].triu(),
    (randn(13, 7),),
)
CASES["by hand"] = Case(
    (5, 7),
    1,
    5,
    lambda w, tap, x: tap("y", (tap("x", x).unsqueeze(-2) * w).sum(-1)),
    lambda g, v: product(g["y"], v["x"])[0],
    (randn(13, 7),),
)


def modulated(w: Tensor, tap: Any, x: Tensor, style: Tensor) -> Tensor:
    """Each image has its own kernel, w [O, I, K] times its style [N, I]."""
    kernels = (w[None] * style[:, None, :, None]).flatten(0, 1)
    y = F.conv1d(tap("x", x).flatten(0, 1)[None], kernels, groups=len(x))
    return tap("y", y.view(len(x), len(w), -1))


def of_styled_windows(g: Any, v: Any) -> Any:
    seen = (v["x"] * randn(2, 3).double()[..., None]).unfold(2, 4, 1)  # [N, I, P, K]
    return torch.einsum("nop,nipk->oik", g["y"].square(), seen.square())


CASES["modulated, a matrix"] = Case(
    (5, 7),
    1,
    5,
    lambda w, tap, x, style: tap("y", torch.bmm(w * style[:, None], tap("x", x).mT)),
    lambda g, v: torch.einsum("nop,npi,ni->oi", g["y"].square(), v["x"].square(), randn(3, 7).double().square()),
    (randn(3, 13, 7), randn(3, 7)),
)
CASES["scales of rows, then a matrix"] = Case(
    (5, 7),
    1,
    5,
    lambda w, tap, x, m: tap("y", tap("x", x)[:, None] * w) @ m,
    lambda g, v: (g["y"] * v["x"][:, None]).square().sum(0),
    (randn(13, 7), randn(7, 3)),
)
CASES["modulated"] = Case((5, 3, 4), 1, 5, modulated, of_styled_windows, (randn(2, 3, 11), randn(2, 3)))


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
    """Each use's product by its own row sums, column sums and total, which are those of the sum when added."""
    (h0, f0), (h1, f1) = (product(flat(g[f"y{n}"]), flat(v[f"x{n}"])) for n in (0, 1))
    both = sum(a[:, :, None] * b[:, None, :] / n for a, b, n in (f0, f1))
    return h0 + h1, (both.sum(2), both.sum(1), both.sum((1, 2)))


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


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_sum_of_squares_written_out(name: str, table: str) -> None:
    assert_equals_the_sum(CASES[name], table)


def rows(x: Tensor) -> Tensor:
    """Two bags of rows of five."""
    return x[:2].abs().long().clamp(max=4)


NOT_LINEAR: dict[str, tuple[Callable[..., Tensor], Code, str | None]] = {
    "w @ w": (lambda w, x: x @ (w @ w), Code.NONLINEAR, "mm"),
    "w * w": (lambda w, x: x @ (w * w), Code.NONLINEAR, "mul"),
    "normalized": (lambda w, x: x @ (w / w.norm()), Code.NONLINEAR, "div"),
    "spectral norm": (lambda w, x: x @ (w / (x[0] @ (w @ x[1]))), Code.NONLINEAR, "div"),
    "a scale through another product": (lambda w, x: x @ (w * torch.tanh(x[:5] @ w)), Code.NONLINEAR, "mul"),
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
    "bags": (lambda w, x: F.embedding_bag(rows(x), w, mode="sum"), Code.NOT_A_CONTRACTION, None),
    "bags' means": (lambda w, x: F.embedding_bag(rows(x), w, mode="mean"), Code.NOT_A_CONTRACTION, None),
    "bags' maxima": (lambda w, x: F.embedding_bag(rows(x), w, mode="max"), Code.NONLINEAR, None),
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
    assert not probe[: layout.payload].any() and said(probe)[:2] == [1, code]


@pytest.mark.parametrize("table", TABLES)
def test_a_gradient_divided_by_how_often_its_row_was_read_is_not_squared(table: str) -> None:
    """It is no derivative, and the sum of its positions' squares no curvature."""
    layout, data = Layout("factored", (9, 7), 1, 9), (TOKENS,)
    made = run(lambda w, i: loss_of(F.embedding(i, w, scale_grad_by_freq=True)), [randn(9, 7)], [layout], data, table)
    (probe,) = made.probes
    assert made.resolutions[0].code == Code.NOT_A_CONTRACTION and not probe[: layout.payload].any()


def test_weights_that_are_added_share_a_gradient_and_keep_their_own_uses() -> None:
    layouts = [Layout("full", (5, 7), 1, 5)] * 2
    made = run(lambda a, b, x: loss_of(F.linear(x, a + b.square())), [randn(5, 7)] * 2, layouts, (randn(13, 7),))
    assert [said(probe)[1] for probe in made.probes] == [Code.ANALYTIC, Code.NONLINEAR]


def test_a_weight_that_meets_parameters_first_has_no_positions_of_its_own() -> None:
    """Of B @ A the gradient is a sum over positions before A's is made: its squares are no sums of squares."""
    layout = replace(Layout("factored", (2, 7), 1, 2), direct=False)
    made = run(lambda a, b, x: loss_of(F.linear(x, b @ a)), [randn(2, 7)], [layout], (randn(5, 2), randn(13, 7)))
    (probe,) = made.probes
    assert made.resolutions[0].code == Code.BY_PARAMETERS and not probe[: layout.payload].any()


def test_rounded_forward_is_not_mistaken_for_a_nonlinear_use() -> None:
    """Under the straight-through modes the weight that meets the data is Q(w), a function of w."""
    layout, x = Layout("full", (5, 7), 1, 5), randn(13, 7)
    for mode in ("ste", "ste_scale", "rr"):

        def attach(w: Tensor, probe: Tensor, layout: Layout, mode: str = mode) -> Tensor:
            return smooth(w, probe, mode, "int4", 1, layout.kind, layout.groups, layout.rows)

        made = run(lambda w, x: F.linear(x, w).sum(), [randn(5, 7)], [layout], (x,), attach=attach)
        assert made.resolutions[0].code == Code.ANALYTIC
        close(made.probes[0][: layout.payload], product(torch.ones(13, 5).double(), x.double())[0])
