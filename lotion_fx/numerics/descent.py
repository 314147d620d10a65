"""Coordinate descent on the codes of a rounded weight: one goes a level up or down as long as that lowers the cost.

A change ``d`` of the error ``E = W - Q`` at (i, j) changes the cost ``tr(B E A E^T)`` by

    2 d (B E A)_ij + d^2 B_ii A_jj

so that all changes by one level are compared at once. The recursion of `adaptive` settles every element by what comes
after it alone; this goes on from there with what stands on all sides. `PANEL` columns at a time have their part of
``B E A``, in which a change moves one row and one column; several that hardly touch each other are made together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lotion_fx.numerics.grids import Grid

PANEL = 32  # columns
SWEEPS = 2  # over all panels
TOGETHER = (PANEL, 4, 1)  # changes, one a column: as many as keep half of what each alone would save
MOST = 16  # rounds of changes in a panel, for each of its elements: more would be rounding errors, back and forth
LEAST = 1e-6  # what a change must save, in shares of the mean cost of an element


@torch.no_grad()
def descend(
    values: Tensor,
    w: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    grid: Grid,
    rows: Tensor,
    columns: Tensor,
    offset: Tensor | None = None,
) -> Tensor:
    """Goes down from a rounded weight to one that costs less.

    Args:
        values: levels times ``scale``, [G, R, C] in float64, as all that follows.
        w: the weight itself.
        scale: of each element, 0 in blocks of zeros.
        low, high: the levels that each element may be put to.
        grid: of the levels.
        rows, columns: B [G, R, R] and A [G, C, C], positive semidefinite.
        offset: what half the cost's slope is besides ``B E A``, [G, R, C]; None for nothing.

    Returns:
        The weight as it is rounded then, [G, R, C].
    """
    levels = torch.tensor(grid.levels, dtype=w.dtype, device=w.device)
    last = len(levels) - 1
    at, lowest, highest = (
        torch.searchsorted(levels, x.contiguous()).clamp(max=last)
        for x in (grid.nearest(torch.where(scale > 0, values / scale, 0.0)), low, high)
    )
    error = w - levels[at] * scale
    mean = (error * (rows @ error @ columns)).sum((-2, -1)).clamp(min=0) / error[0].numel()
    for _ in range(SWEEPS):
        for begin in range(0, w.shape[-1], PANEL):
            panel = slice(begin, begin + PANEL)
            slope = rows @ (error @ columns[..., panel])
            _settle(
                at[..., panel],
                (lowest[..., panel], highest[..., panel]),
                levels,
                scale[..., panel],
                error[..., panel],
                slope if offset is None else slope + offset[..., panel],
                rows,
                columns[:, panel, panel],
                LEAST * mean[:, None],
            )
    return levels[at] * scale


def _settle(
    at: Tensor,
    ends: tuple[Tensor, Tensor],
    levels: Tensor,
    scale: Tensor,
    error: Tensor,
    slope: Tensor,
    rows: Tensor,
    columns: Tensor,
    least: Tensor,
) -> None:
    """Changes the codes ``at`` of a panel [G, R, P] until no single change saves ``least``, and its ``error`` by them.

    Args:
        slope: the panel's part of ``B E A``.
        columns: A between the panel's columns, [G, P, P].
    """
    own = rows.diagonal(dim1=-2, dim2=-1)[:, :, None] * columns.diagonal(dim1=-2, dim2=-1)[:, None, :]
    up, down = _steps(at, ends, levels, scale)
    for _ in range(MOST * at[0].numel()):
        gain_up, gain_down = (d * (2 * slope + d * own) for d in (up, down))
        best, row = torch.minimum(gain_up, gain_down).min(1, keepdim=True)  # in each column
        wanted = best < -least
        if not bool(wanted.any()):
            return
        goes_up = gain_up.gather(1, row) < gain_down.gather(1, row)
        change = torch.where(goes_up, up.gather(1, row), down.gather(1, row))
        taken, moved = _together(torch.where(wanted, best, 0.0)[:, 0], row, change[:, 0], slope, rows, columns)
        slope += moved
        error.scatter_add_(1, row, torch.where(taken, change, 0.0))
        at.scatter_add_(1, row, torch.where(taken, torch.where(goes_up, 1, -1), 0))
        here = [x.gather(1, row) for x in (at, *ends, scale)]
        for all_steps, step in zip((up, down), _steps(here[0], (here[1], here[2]), levels, here[3]), strict=True):
            all_steps.scatter_(1, row, step)


def _steps(at: Tensor, ends: tuple[Tensor, Tensor], levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """What a level up and a level down, where there is one, change the error by."""
    now = levels[at]
    up, down = torch.minimum(at + 1, ends[1]), torch.maximum(at - 1, ends[0])
    return (now - levels[up]) * scale, (now - levels[down]) * scale


def _together(
    gain: Tensor, row: Tensor, change: Tensor, slope: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Which of the columns' best changes are made at once, [G, 1, P], and how they move the slope.

    Args:
        gain: what each alone changes the cost by, [G, P]; 0 where none is wanted.
        row, change: where, [G, 1, P], and by how much, [G, P].
    """
    taken, moved = torch.zeros_like(gain, dtype=torch.bool), torch.zeros_like(slope)
    by_row = rows.gather(2, row.expand(-1, rows.shape[1], -1))
    ranks, open_ = gain.argsort(-1).argsort(-1), torch.ones_like(taken[:, :1])
    for count in TOGETHER:
        tried = open_ & (ranks < count) & (gain < 0)
        step = torch.where(tried, change, 0.0)
        shift = (by_row * step[:, None]) @ columns
        found = (step * (2 * slope.gather(1, row) + shift.gather(1, row))[:, 0]).sum(-1, keepdim=True)
        good = open_ & ((found <= 0.5 * torch.where(tried, gain, 0.0).sum(-1, keepdim=True)) | (count == 1))
        taken, moved, open_ = taken | (tried & good), torch.where(good[..., None], shift, moved), open_ & ~good
        if not bool(open_.any()):
            break
    return taken[:, None], moved
