"""Coordinate descent: where it stops no single change helps, it is near the enumerated optimum, and stays in bounds."""

import itertools

import pytest
import torch
from torch import Tensor

from lotion_fx.numerics import descent
from lotion_fx.numerics.descent import descend
from lotion_fx.numerics.formats import resolve


def cost(error: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """tr(B E A E^T), of errors [..., R, C]."""
    return torch.einsum("...ij,ik,...kl,lj->...", error, rows, error, columns)


def problem(r: int, c: int, seed: int, fmt: str = "int3", groups: int = 1):
    """A weight rounded to nearest: values, w, scale, low, high, the grid, B and A."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(n: int) -> Tensor:
        x = torch.randn(groups, n + 2, n, generator=generator, dtype=torch.float64)
        return x.mT @ x

    grid = resolve(fmt).grid
    w = torch.randn(groups, r, c, generator=generator, dtype=torch.float64)
    scale = w.abs().amax(-1, keepdim=True).expand_as(w) / grid.max
    low, high = torch.full_like(w, -grid.max), torch.full_like(w, grid.max)
    return grid.nearest(w / scale) * scale, w, scale, low, high, grid, matrix(r), matrix(c)


@pytest.mark.parametrize("fmt", ["int3", "int8", "fp4", "nf4"])
@pytest.mark.parametrize("size", [(7, 5), (9, 2 * descent.PANEL + 3)])
def test_where_it_stops_no_single_change_helps(fmt, size, monkeypatch):
    monkeypatch.setattr(descent, "SWEEPS", 20)
    values, w, scale, *bounds, grid, rows, columns = problem(*size, seed=1, fmt=fmt)
    made = descend(values, w, scale, *bounds, grid, rows, columns)
    before, after = (float(cost((w - x)[0], rows[0], columns[0])) for x in (values, made))
    assert after < 0.9 * before
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    at = (made / scale)[..., None].sub(levels).abs().argmin(-1)
    torch.testing.assert_close(levels[at] * scale, made, rtol=1e-12, atol=0)
    for i, j in itertools.product(range(size[0]), range(size[1])):
        for by in (-1, 1):
            k = int(at[0, i, j]) + by
            if 0 <= k < len(levels):
                changed = made[0].clone()
                changed[i, j] = levels[k] * scale[0, i, j]
                assert cost(w[0] - changed, rows[0], columns[0]) > after - 2e-6 * before / w.numel()


def test_it_closes_most_of_the_gap_to_the_enumerated_optimum():
    gaps = torch.zeros(2, dtype=torch.float64)
    for seed in range(30):
        values, w, scale, *bounds, grid, rows, columns = problem(2, 3, seed, fmt="int2")
        made = descend(values, w, scale, *bounds, grid, rows, columns)
        choices = torch.tensor(list(itertools.product(grid.levels, repeat=6)), dtype=torch.float64).view(-1, 2, 3)
        least = cost(w[0] - choices * scale[0], rows[0], columns[0]).min()
        gaps += torch.stack([cost((w - x)[0], rows[0], columns[0]) - least for x in (values, made)])
        assert cost((w - made)[0], rows[0], columns[0]) >= least - 1e-9
    assert gaps[1] < 0.3 * gaps[0]


def test_levels_stay_within_their_bounds_and_blocks_of_zeros_stay_zero():
    values, w, scale, low, high, grid, rows, columns = problem(8, 40, seed=3)
    w[:, 2] = values[:, 2] = 0
    scale, low, high = scale.clone(), low.clone(), high.clone()
    for x in (scale, low, high):
        x[:, 2] = 0
    kept = (values / scale)[:, 5:7].round()
    low[:, 5:7], high[:, 5:7] = kept, kept
    made = descend(values, w, scale, low, high, grid, rows, columns)
    assert not torch.equal(made, values)
    assert torch.equal(made[:, 2], values[:, 2]) and torch.equal(made[:, 5:7], values[:, 5:7])
