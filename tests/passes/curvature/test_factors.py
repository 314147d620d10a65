"""A weight's rows and columns, however its layout lies to the indices of its contraction."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.curvature.cases import Case, assert_equals_the_sum
from tests.passes.curvature.running import (
    TABLES,
    product,
    randn,
)

CASES: dict[str, Case] = {}


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


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_sum_of_squares_written_out(name: str, table: str) -> None:
    assert_equals_the_sum(CASES[name], table)
