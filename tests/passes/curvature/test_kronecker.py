"""A weight's matrices B and A: sums of outer products of what its contraction met, written out in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lotion_fx.passes.attach import probe
from lotion_fx.passes.attach.probe import Code, Layout
from tests.passes.curvature.running import close, flat, loss_of, randn, run, windows


@dataclass
class Case:
    """``sides(g, v)`` gives what meets the rows and the columns, [G, N, R] and [G, N, C], of which the first is the
    gradient unless ``swapped``. ``whole`` is the gradient of which positions have their energy, where that is more."""

    layout: Layout
    forward: Callable[..., Tensor]
    sides: Callable[[Any, Any], tuple[Tensor, Tensor]]
    data: tuple[Any, ...]
    swapped: bool = False
    whole: str | None = None


def layout(shape: tuple[int, ...], groups: int, rows: int) -> Layout:
    return Layout("kronecker", shape, groups, rows)


def conv(size: tuple[int, ...], weight: tuple[int, ...], turned: bool = False, **options: int) -> Case:
    groups, stride = options.get("groups", 1), options.get("stride", 1)
    padding, dilation = options.get("padding", 0), options.get("dilation", 1)
    op: Any = getattr(F, f"conv{'_transpose' if turned else ''}{len(size) - 2}d")

    def sides(g: Any, v: Any) -> tuple[Tensor, Tensor]:
        by_row, by_col = (v["x"], g["y"]) if turned else (g["y"], v["x"])
        extra = [padding, padding + stride + dilation * max(weight[2:])] * (len(size) - 2)
        seen = windows(F.pad(by_col, extra), by_row.shape[2:], weight[2:], stride, dilation)
        places = math.prod(by_row.shape[2:])
        seen = seen.reshape(len(seen), groups, -1, places, math.prod(weight[2:]))
        rows = by_row.reshape(len(by_row), groups, -1, places)
        rows, cols = torch.einsum("ngrp->gnpr", rows), torch.einsum("ngcpk->gnpck", seen)
        return rows.flatten(1, 2), cols.flatten(3).flatten(1, 2)

    def forward(w: Tensor, tap: Any, x: Tensor) -> Tensor:
        return tap("y", op(tap("x", x), w, **options))

    return Case(layout(weight, groups, weight[0] // groups), forward, sides, (randn(*size),), turned)


def experts(w: Tensor, tap: Any, x: Tensor) -> Tensor:
    return tap("y", torch.bmm(tap("x", x), w))


def masked(w: Tensor, tap: Any, x: Tensor) -> Tensor:
    y = tap("y", F.linear(tap("x", x), w))
    return torch.where(torch.arange(len(x))[:, None] < 4, y, y.detach())


CASES = {
    "linear": Case(
        layout((5, 7), 1, 5),
        lambda w, tap, x: tap("y", F.linear(tap("x", x), w)),
        lambda g, v: (flat(g["y"])[None], flat(v["x"])[None]),
        (randn(3, 4, 7),),
    ),
    "weight [I, O]": Case(
        layout((7, 5), 1, 7),
        lambda w, tap, x: tap("y", tap("x", x) @ w),
        lambda g, v: (v["x"][None], g["y"][None]),
        (randn(11, 7),),
        swapped=True,
    ),
    "experts [E, I, O]": Case(
        layout((3, 7, 5), 3, 7), experts, lambda g, v: (v["x"], g["y"]), (randn(3, 11, 7),), swapped=True
    ),
    "one position": Case(
        layout((5, 7), 1, 5),
        lambda w, tap, x: tap("y", F.linear(tap("x", x), w)),
        lambda g, v: (g["y"][None], v["x"][None]),
        (randn(1, 7),),
    ),
    "rows cut into groups": Case(
        layout((15, 7), 3, 5),
        lambda w, tap, x: tap("y", F.linear(tap("x", x), w)),
        lambda g, v: (g["y"].view(-1, 3, 5).transpose(0, 1), v["x"].expand(3, -1, -1)),
        (randn(13, 7),),
        whole="y",
    ),
    "a scale": Case(
        layout((5, 7), 1, 5),
        lambda w, tap, x: tap("y", F.linear(tap("x", x), w * 3.0)),
        lambda g, v: (3 * g["y"][None], v["x"][None]),
        (randn(13, 7),),
    ),
    "used twice": Case(
        layout((5, 7), 1, 5),
        lambda w, tap, x: tap("y", F.linear(tap("x", x), w)).sum() + tap("z", F.linear(tap("v", x * x), w)),
        lambda g, v: (torch.cat([g["y"], g["z"]])[None], torch.cat([v["x"], v["v"]])[None]),
        (randn(13, 7),),
    ),
    "rows that the loss leaves out": Case(
        layout((5, 7), 1, 5), masked, lambda g, v: (g["y"][None, :4], v["x"][None, :4]), (randn(9, 7),)
    ),
    "conv1d": conv((3, 5, 13), (7, 5, 3), stride=3, padding=2),
    "conv2d": conv((2, 3, 7, 11), (5, 3, 3, 2), stride=2, padding=1, dilation=2),
    "conv2d, groups": conv((2, 6, 7, 5), (9, 2, 3, 3), groups=3, padding=1),
    "conv3d": conv((2, 3, 5, 7, 5), (2, 3, 3, 2, 1), stride=2, padding=1),
    "conv_transpose1d": conv((3, 5, 7), (5, 7, 3), turned=True, stride=2, padding=1),
    "conv_transpose2d": conv((2, 6, 3, 5), (6, 2, 3, 2), turned=True, stride=3, groups=2, output_padding=1),
}


def expected(case: Case, weight: Tensor) -> tuple[Tensor, Tensor]:
    """B and A, in float64."""
    values: dict[str, Tensor] = {}
    leaf = weight.double().requires_grad_()
    data = [x.double() for x in case.data]
    loss = loss_of(case.forward(leaf, lambda name, value: values.setdefault(name, value), *data))
    tapped = {name: value for name, value in values.items() if value.requires_grad}
    g = dict(zip(tapped, torch.autograd.grad(loss, list(tapped.values())), strict=True))
    rows, cols = case.sides(g, {name: value.detach() for name, value in values.items()})
    gradient = cols if case.swapped else rows
    energy = (g[case.whole] if case.whole else gradient).square().sum(-1, keepdim=True)
    weighted = [x if x is gradient else energy * x for x in (rows, cols)]
    return torch.einsum("enr,ens->ers", weighted[0], rows), torch.einsum("enc,end->ecd", weighted[1], cols)


DECOMPOSED = ("linear", "experts [E, I, O]", "one position", "conv2d")  # those whose ops differ there


@pytest.mark.parametrize(
    "name, table", [*((name, "none") for name in CASES), *((name, "inductor") for name in DECOMPOSED)]
)
def test_sums_of_outer_products(name: str, table: str) -> None:
    case = CASES[name]
    weight = randn(*case.layout.shape) / 2

    def function(w: Tensor, *data: Any) -> Tensor:
        return loss_of(case.forward(w, lambda _, value: value, *data))

    made = run(function, [weight], [case.layout], case.data, table)
    assert [resolution.code for resolution in made.resolutions] == [Code.ANALYTIC]
    for found, matrix in zip(case.layout.matrices(made.probes[0]), expected(case, weight), strict=True):
        assert found is not None
        close(found, matrix)


def test_experts_of_a_sorted_batch() -> None:
    """Each expert has the positions between its end and the one before; rows of none are in no sum."""
    shape, ends = (3, 8, 16), torch.tensor([16, 16, 40], dtype=torch.int32)
    x, weight = randn(48, 8).bfloat16(), (randn(*shape) / 2).bfloat16()
    here = layout(shape, 3, 8)

    def function(w: Tensor, x: Tensor, offs: Tensor) -> Tensor:
        return loss_of(torch._grouped_mm(x, w, offs)[:40])

    made = run(function, [weight], [here], (x, ends))
    assert made.resolutions[0].code == Code.ANALYTIC
    rows, columns = here.matrices(made.probes[0])
    assert rows is not None and columns is not None
    leaf = torch.cat([x[:16] @ weight[0], x[16:40] @ weight[2]]).float().requires_grad_()
    loss_of(leaf.bfloat16()).backward()
    assert leaf.grad is not None
    for expert, at in enumerate((slice(0, 16), slice(16, 16), slice(16, 40))):
        g, inputs = leaf.grad[at].double(), x[at].double()
        energy = g.square().sum(1, keepdim=True)
        torch.testing.assert_close(columns[expert].double(), g.T @ g, rtol=0.02, atol=0.02)
        torch.testing.assert_close(rows[expert].double(), (energy * inputs).T @ inputs, rtol=0.02, atol=0.05)
    assert columns[1].eq(0).all() and columns[2].norm() > 1


def test_a_path_that_mixes_the_sides_says_so() -> None:
    shape = (3, 7, 5)

    def function(w: Tensor, x: Tensor) -> Tensor:
        return loss_of(F.linear(x, w.permute(0, 2, 1).reshape(15, 7)))

    made = run(function, [randn(*shape)], [layout(shape, 1, 21)], (randn(13, 7),))
    assert made.resolutions[0].code == Code.MIXED_SIDES and "mixes" in made.resolutions[0].reason
    assert made.probes[0][: layout(shape, 1, 21).payload].eq(0).all()


def test_a_long_side_has_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (probe, __import__("lotion_fx.passes.curvature.kronecker", fromlist=["SIDE"])):
        monkeypatch.setattr(module, "SIDE", 6)
    here = layout((5, 7), 1, 5)
    made = run(lambda w, x: loss_of(F.linear(x, w)), [randn(5, 7)], [here], (randn(13, 7),))
    rows, columns = here.matrices(made.probes[0])
    assert columns is None and rows is not None and rows.shape == (1, 5, 5) and here.payload == 25
