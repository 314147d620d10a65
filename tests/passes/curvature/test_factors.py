"""A weight's rows and columns, however its layout lies to the indices of its contraction."""

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


def einsum(equation: str, shape: tuple[int, ...], groups: int, rows: int, x: Tensor) -> Case:
    inputs, output = equation.split("->")
    left, right = inputs.split(",")
    summed = f"{left},{output}->{right}"

    def expected(g: Any, v: Any) -> Any:
        return torch.einsum(summed, v["x"].square(), g["y"].square())

    return Case(shape, groups, rows, lambda w, tap, x: tap("y", torch.einsum(equation, tap("x", x), w)), expected, (x,))


CASES["einsum nd,ed->ne"] = einsum("nd,ed->ne", (5, 7), 1, 5, randn(13, 7))
CASES["einsum bni,hio->bhno"] = einsum("bni,hio->bhno", (3, 7, 5), 3, 7, randn(2, 5, 7))
CASES["einsum btd,hkd->bthk"] = einsum("btd,hkd->bthk", (3, 5, 7), 1, 15, randn(2, 5, 7))
CASES["einsum btd,dhk->bthk"] = einsum("btd,dhk->bthk", (7, 3, 5), 1, 7, randn(2, 5, 7))
CASES["einsum bthk,hkd->btd"] = einsum("bthk,hkd->btd", (3, 5, 7), 1, 15, randn(2, 5, 3, 5))
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


def cut_rows(rows: Any, cols: Any, norm: Any) -> Any:
    """One factorization for three groups of the layout."""
    return rows.view(3, 5), cols.expand(3, 7), norm.expand(3)


CASES["rows cut into groups"] = Case(
    (15, 7),
    3,
    5,
    lambda w, tap, x: tap("y", F.linear(tap("x", x), w)),
    lambda g, v: (
        product(g["y"], v["x"])[0],
        cut_rows(*product(g["y"], v["x"])[1]),
    ),
    (randn(13, 7),),
    "mm",
)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_sum_of_squares_written_out(name: str, table: str) -> None:
    assert_equals_the_sum(CASES[name], table)
