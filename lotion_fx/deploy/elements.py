"""The kinds of codes that clients have."""

from __future__ import annotations

import torch
from torch import Tensor

from lotion_fx.deploy.weights import QuantizedWeight
from lotion_fx.numerics.formats import Format, resolve
from lotion_fx.numerics.grids import Grid, Integer, Minifloat
from lotion_fx.numerics.scales import TwoLevelScale

E2M1, E4M3 = Minifloat(2, 1, 6.0), Minifloat(4, 3, 448.0)
NF4 = resolve("nf4").grid


def is_nvfp4(fmt: Format) -> bool:
    return isinstance(fmt.law, TwoLevelScale) and (fmt.grid, fmt.law.type, fmt.block) == (E2M1, E4M3, 16)


def is_integer(grid: Grid) -> bool:
    """Whether its levels are -(2^(b-1) - 1) to 2^(b-1) - 1, which clients hold in b bits."""
    return isinstance(grid, Integer) and grid == Integer(2 ** (grid.bits - 1) - 1)


def integers(weight: QuantizedWeight) -> Tensor:
    """The levels of an `is_integer` weight, int8 [*rows, K]: codes count from the lowest number of so many bits."""
    return (weight.each_code().to(torch.int16) - 2 ** (weight.format.grid.bits - 1)).to(torch.int8)
