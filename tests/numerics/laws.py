"""Noise laws and formats, and a law's levels and probabilities one number at a time, in mpmath."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import cache

import mpmath
import pytest
import sympy
import torch

import lotion_fx
from lotion_fx.numerics.formats import codebook, resolve
from lotion_fx.numerics.noise import (
    D,
    NoiseLaw,
    resolve_noise,
)

HALF = sympy.Rational(1, 2)
HUMP = sympy.Piecewise((D**2 * (1 - 2 * D) ** 2, D < HALF), ((1 - D) ** 2 * (2 * D - 1) ** 2, True))
WIDE = NoiseLaw("wide", (2 * D**2 * (3 - 2 * D) + D) / 3 - HUMP, 2 * HUMP)  # with a third level
CLIPPED = NoiseLaw("clipped", sympy.Min(1, sympy.Max(0, 2 * D - HALF)))
BENT = NoiseLaw("bent", (sympy.tanh(6 * D - 3) / sympy.tanh(3) + (2 * D - 1) * sympy.Abs(2 * D - 1)) / 4 + HALF)
ROOTS = NoiseLaw(
    "roots",
    (D * sympy.sqrt(D) + sympy.log(1 + D) / sympy.log(2) + 1 - sympy.cos(sympy.pi * D / 2)) / 4
    + (1 - 1 / sympy.sqrt(1 + D)) / (1 - 1 / sympy.sqrt(2)) / 4,
)
SHIPPED = [resolve_noise(name) for name in ("randomized", "smoothstep", "gaussian", "gaussian/0.5")]
LAWS = [*SHIPPED, WIDE, CLIPPED, BENT, ROOTS]
FORMATS = [resolve("int4"), resolve("fp4"), resolve("nf4"), codebook((-1.5, -0.25, 0.0, 0.1, 0.75), name="lopsided")]
laws = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)


@cache
def probabilities(law: NoiseLaw) -> list[Callable[[mpmath.mpf], mpmath.mpf]]:
    return [sympy.lambdify(D, part, "mpmath") for part in (law.up, law.beyond or sympy.Integer(0))]


def points(value: float, levels: tuple[float, ...], law: NoiseLaw) -> list[tuple[float, mpmath.mpf]]:
    """The levels that ``value``, in grid units, may be rounded to, each with its probability."""
    value = min(max(value, levels[0]), levels[-1])
    i, j = bisect_right(levels, value) - 1, bisect_left(levels, value)
    if i == j:
        return [(levels[i], mpmath.mpf(1))]
    at = (mpmath.mpf(value) - levels[i]) / (mpmath.mpf(levels[j]) - levels[i])
    up, beyond = (function(at) for function in probabilities(law))
    outer = levels[max(i - 1, 0)] if at < 0.5 else levels[min(j + 1, len(levels) - 1)]
    return [(levels[i], 1 - up - beyond), (levels[j], up), (outer, beyond)]


def moments(value: float, levels: tuple[float, ...], law: NoiseLaw) -> tuple[mpmath.mpf, mpmath.mpf]:
    chances = points(value, levels, law)
    mean = sum(p * q for q, p in chances)
    return mean, sum(p * (q - mean) ** 2 for q, p in chances)


def unit(values: list[float], fmt: lotion_fx.Format, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A block whose scale is 1: the numbers with q_max in front."""
    q_max = max(fmt.grid.levels, key=abs)
    return torch.tensor([q_max, *values], dtype=dtype)


def one_block(fmt: lotion_fx.Format) -> lotion_fx.Format:
    return lotion_fx.Format("one", fmt.grid, "channel")


def spread(fmt: lotion_fx.Format, count: int = 60, seed: int = 0) -> list[float]:
    """Numbers over the grid, off its levels and off the middles between them."""
    g = torch.Generator().manual_seed(seed)
    levels = torch.tensor(fmt.grid.levels, dtype=torch.float64)
    position = 0.02 + 0.96 * torch.rand(count, generator=g, dtype=torch.float64)
    position += 0.01 * ((position - 0.5).abs() < 0.005)
    at = torch.randint(len(levels) - 1, (count,), generator=g)
    return (levels[at] + position * (levels[at + 1] - levels[at])).tolist()
