"""Adaptive rounding: a weight onto those points of its format that cost the loss least, by its curvature.

A weight ``W`` [R, C] with curvature ``B (x) A`` that is rounded to ``Q`` costs the loss about ``1/2 tr(B E A E^T)``,
``E = W - Q``. With unit lower factors ``A = L_A D_A L_A^T`` and ``B = L_B D_B L_B^T`` that is a weighted sum of the
squares of ``L_B^T E L_A``, whose element (i, j) holds the errors at and after row i and column j and no others. So
elements are rounded from the last to the first, each to the level nearest to its weight plus what the errors after it
hand on. With ``B`` the identity this is GPTQ (Frantar et al. 2022, arXiv 2210.17323).

What comes out is a *fixed point* of its format: rounded to nearest again it stays as it is, bit for bit, scales
included. For that, the largest weight of each block stays on a level that gives the block the scale that it has. So
the codes need no place of their own: whatever carries the weights carries them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lotion_fx.numerics.descent import descend
from lotion_fx.numerics.formats import Format
from lotion_fx.numerics.grids import Grid
from lotion_fx.numerics.rounding import compute_dtype, from_blocks, rtn, scale, to_blocks

METHODS = ("descent", "two_sided", "gptq", "nearest")
DAMPING_COLUMNS, DAMPING_ROWS = 0.01, 0.05
"""What is added to the diagonals of A and B, in shares of their mean."""
UNDERFLOWN = 1e-30
"""A float32 matrix with a mean diagonal below this may have negative eigenvalues for want of bits."""
TILE = 32  # rows and columns whose errors are handed on one by one; beyond, by products of matrices
PATIENCE = 64  # roundings to nearest in which a fixed point must be reached


class Curvature(NamedTuple):
    """``B (x) A`` of each group of a weight seen as [G, R, C], symmetric and positive semidefinite, in any unit.

    Args:
        rows: B, [G, R, R]; None for the identity.
        columns: A, [G, C, C]; None for the identity.
    """

    rows: Tensor | None
    columns: Tensor | None

    def replaced_by(self, other: Curvature) -> Curvature:
        """With the sides that another has."""
        return Curvature(*(old if new is None else new for old, new in zip(self, other, strict=True)))

    def semidefinite(self) -> Curvature:
        """Without the negative eigenvalues that coarse rounding gives what has all but underflowed."""
        return Curvature(*(None if side is None else _semidefinite(side) for side in self))


class Rounded(NamedTuple):
    """An adaptively rounded weight.

    Args:
        values: in the weight's shape and dtype.
        method: what made them: the one asked for, or one that is cheaper and here no worse.
        cost: of the values, ``tr(B E A E^T)`` over all groups.
        nearest: the cost of rounding to nearest.
    """

    values: Tensor
    method: str
    cost: float
    nearest: float


def cost(error: Tensor, curvature: Curvature) -> float:
    """``tr(B E A E^T)`` of an error [G, R, C], over all groups, in float64."""
    left = right = error.double()
    if curvature.columns is not None:
        right = right @ curvature.columns.double()
    if curvature.rows is not None:
        left = curvature.rows.double() @ left
    return float((left * right).sum())


@torch.no_grad()
def adaptive(
    w: Tensor,
    fmt: Format,
    axis: int,
    shape: tuple[int, int, int],
    curvature: Curvature,
    method: str = "two_sided",
    scaled_as: Tensor | None = None,
) -> Rounded:
    """Rounds a weight so that its curvature's cost is least, at the scales that it has.

    Args:
        w: weights, any shape; float32, bfloat16, float16 or float64. All is computed in float64.
        fmt, axis: the format, and the dimension that its blocks run along, which products sum over.
        shape: [G, R, C] that ``w`` is seen in, row-major; ``axis`` lies in R or in C.
        curvature: of that view.
        method: ``"two_sided"``; ``"descent"``, which goes on from there, see `descent`; ``"gptq"``, which takes the
            curvature along ``axis`` alone; ``"nearest"``.
        scaled_as: what scales are made of instead, as `searched` gives it; None for ``w`` itself.

    Returns:
        Of nearest, gptq, two_sided and descent, as far as ``method``, the one that costs least. A fixed point of
        ``rtn``.

    Raises:
        ValueError: the format has no fixed points, as some codebooks without the negative of their largest level.
    """
    curvature = curvature.semidefinite()
    scaled_as = w if scaled_as is None else scaled_as
    nearest = fixed_point(scaled_as, fmt, axis)
    latent = w.reshape(shape).double()
    least = cost(latent - nearest.reshape(shape), curvature)
    best = Rounded(nearest, "nearest", least, least)
    along_rows = _runs_along_rows(w, axis, shape)
    inputs, outputs = (curvature.rows, curvature.columns) if along_rows else (curvature.columns, curvature.rows)
    tried: dict[str, Curvature] = {}
    if method != "nearest" and inputs is not None:
        tried["gptq"] = Curvature(None, inputs)
        if method != "gptq" and outputs is not None:
            tried["two_sided"] = Curvature(outputs, inputs)
            if method == "descent":
                tried["descent"] = tried["two_sided"]
    problem = _problem(w, scaled_as, fmt, axis, shape, along_rows)
    solved = problem.w
    for name, taken in tried.items():
        solved = _descended(solved, problem, fmt.grid, taken) if name == "descent" else _solve(problem, fmt.grid, taken)
        turned = solved.mT if along_rows else solved
        values = fixed_point(turned.reshape(w.shape).to(w.dtype), fmt, axis)
        found = cost(latent - values.reshape(shape), curvature)
        if found < best.cost:
            best = Rounded(values, name, found, least)
    return best


@torch.no_grad()
def stepped(
    w: Tensor,
    values: Tensor,
    fmt: Format,
    axis: int,
    shape: tuple[int, int, int],
    curvature: Curvature,
    gradient: Tensor,
    stiffness: float,
    scaled_as: Tensor | None = None,
) -> Tensor:
    """Codes changed, from a rounded weight on, by the gradient that the loss has there.

    The loss is taken as ``<gradient, D> + stiffness / 2 tr(B D A D^T)``, ``D`` the change, and `descend` goes down it.

    Args:
        w: the weight itself, which tells what may be changed, as `adaptive` takes it.
        values: as it is rounded.
        fmt, axis, shape, curvature: as `adaptive` takes them, both sides of the curvature known.
        gradient: of the loss by the weight, at ``values``.
        scaled_as: as `adaptive` takes it.

    Returns:
        A fixed point of ``rtn``, ``w``'s shape and dtype.
    """
    turned = _runs_along_rows(w, axis, shape)
    problem = _problem(w, w if scaled_as is None else scaled_as, fmt, axis, shape, turned)
    now, slope = (x.reshape(shape).double() for x in (values, -gradient / stiffness))
    rows, columns = curvature.semidefinite()
    if turned:
        now, slope, rows, columns = now.mT, slope.mT, columns, rows
    assert rows is not None and columns is not None
    rows, columns = _damped(rows, DAMPING_ROWS), _damped(columns, DAMPING_COLUMNS)
    offset = slope - rows @ (problem.w - now) @ columns
    solved = descend(now, *problem, fmt.grid, rows, columns, offset)
    return fixed_point((solved.mT if turned else solved).reshape(w.shape).to(w.dtype), fmt, axis)


@torch.no_grad()
def stiffness(error: Tensor, curvature: Curvature, change: Tensor) -> float:
    """What ``B (x) A`` is to be multiplied by to be the loss's second derivative: ``|change| / |B E A|``.

    Args:
        error: E, [G, R, C].
        change: of the loss's gradient over that error, [G, R, C]. Part of it has another direction than ``B E A``,
            so that this is an upper bound rather than a fit.
    """
    assert curvature.rows is not None and curvature.columns is not None
    predicted = curvature.rows.double() @ error.double() @ curvature.columns.double()
    return float(change.double().norm() / predicted.norm())


@torch.no_grad()
def of_inputs(curvature: Curvature, w: Tensor, axis: int, shape: tuple[int, int, int]) -> Curvature:
    """The side alone of the dimension that products sum over."""
    along_rows = _runs_along_rows(w, axis, shape)
    return Curvature(curvature.rows if along_rows else None, None if along_rows else curvature.columns)


@torch.no_grad()
def newton(gradient: Tensor, shape: tuple[int, int, int], inputs: Curvature) -> Tensor:
    """``-G A^-1``: the step that a gradient G asks for where the inputs' curvature is all there is, damped as theirs.

    Args:
        gradient: in the weight's shape, float64.
        shape: as `adaptive` takes it.
        inputs: of `of_inputs`, with its matrix.
    """
    seen = -gradient.reshape(shape)
    if inputs.rows is not None:
        return torch.linalg.solve(_damped(inputs.rows, DAMPING_COLUMNS), seen).reshape(gradient.shape)
    assert inputs.columns is not None
    return torch.linalg.solve(_damped(inputs.columns, DAMPING_COLUMNS), seen.mT).mT.reshape(gradient.shape)


def fixed_point(w: Tensor, fmt: Format, axis: int) -> Tensor:
    """A weight rounded to nearest until that changes nothing any more: mostly once, for scales are rounded too.

    Raises:
        ValueError: it goes on changing.
    """
    for _ in range(PATIENCE):
        now = rtn(w, fmt, axis)
        if torch.equal(now, w):
            return now
        w = now
    raise ValueError(
        f"fmt={fmt.name!r}: a weight of dtype {str(w.dtype).removeprefix('torch.')} that is rounded to it changes when "
        "it is rounded again, so its rounding cannot be kept; take a format with symmetric levels, or float32 weights"
    )


class _Problem(NamedTuple):
    """A weight in float64 [G, R, C], its elements' scales, and the levels between which each may be put."""

    w: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor


def _runs_along_rows(w: Tensor, axis: int, shape: tuple[int, int, int]) -> bool:
    """Whether ``axis`` lies in R; then all is done on the turned matrix."""
    return math.prod(w.shape[: axis % w.dim() + 1]) <= shape[0] * shape[1]


def _problem(
    w: Tensor, scaled_as: Tensor, fmt: Format, axis: int, shape: tuple[int, int, int], turned: bool
) -> _Problem:
    blocks = to_blocks(w, fmt, axis).to(compute_dtype(w))
    amax = blocks.abs().amax(-1, keepdim=True)
    s = scale(scaled_as, fmt, axis)
    last, keep = fmt.grid.max, _least_that_keeps(fmt)
    is_largest = blocks.abs() == amax
    # Pruned weights are to remain what they are.
    is_pruned = (blocks == 0) & (0.0 in fmt.grid.levels or amax == 0)
    high = torch.where(is_pruned, 0.0, torch.where(is_largest & (blocks < 0), -keep, last))
    low = torch.where(is_pruned, 0.0, torch.where(is_largest & (blocks > 0), keep, -last))
    parts = (blocks, s.expand_as(blocks), low, high)
    seen = [from_blocks(part, fmt, axis, w.shape).reshape(shape).double() for part in parts]
    return _Problem(*(part.mT if turned else part for part in seen))


def _least_that_keeps(fmt: Format) -> float:
    """The least level that, as a block's largest, gives the block the scale that it is in units of."""
    one = torch.ones((), dtype=torch.float64)
    for level in fmt.grid.levels:
        if level > 0 and fmt.law.block_scale(one * level, fmt.grid, one if fmt.law.two_level else None) == 1:
            return level
    return fmt.grid.max


def _solve(problem: _Problem, grid: Grid, curvature: Curvature) -> Tensor:
    """The rounded weight, [G, R, C] in float64.

    Rows and columns are put in the order of their curvature, largest first, so that errors are handed on to what
    costs less.
    """
    assert curvature.columns is not None
    by_column, along = _hand_on(curvature.columns, DAMPING_COLUMNS)
    ordered = [_gathered(part, along, -1) for part in problem]
    if curvature.rows is None:
        out = _by_columns(_Problem(*ordered), grid, by_column)
    else:
        by_row, down = _hand_on(curvature.rows, DAMPING_ROWS)
        padded = _Problem(*(_padded(_gathered(part, down, -2)) for part in ordered))
        out = _by_tiles(padded, grid, _padded(by_row, unit=True), _padded(by_column, unit=True))
        out = _gathered(out[:, : by_row.shape[-1], : by_column.shape[-1]], down.argsort(-1), -2)
    return _gathered(out, along.argsort(-1), -1)


def _descended(solved: Tensor, problem: _Problem, grid: Grid, curvature: Curvature) -> Tensor:
    """What `_solve` gave, [G, R, C], and then `descend` made of it in the same damped curvature."""
    assert curvature.rows is not None and curvature.columns is not None
    rows, columns = _damped(curvature.rows, DAMPING_ROWS), _damped(curvature.columns, DAMPING_COLUMNS)
    return descend(solved, *problem, grid, rows, columns)


def _damped(h: Tensor, damping: float) -> Tensor:
    """[G, N, N] with so many shares of the mean diagonal added; the identity where no data reached a group."""
    h = h.double()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)[:, None]
    return h + torch.diag_embed(torch.where(mean > 0, damping * mean, 1.0).expand_as(diagonal))


def _semidefinite(h: Tensor) -> Tensor:
    mean = h.diagonal(dim1=-2, dim2=-1).double().mean(-1)
    if not ((mean > 0) & (mean < UNDERFLOWN)).any():
        return h
    values, vectors = torch.linalg.eigh(h.double())
    return vectors * values.clamp(min=0)[:, None, :] @ vectors.mT


def _gathered(x: Tensor, order: Tensor, dim: int) -> Tensor:
    index = order[:, None, :] if dim == -1 else order[:, :, None]
    return x.gather(dim, index.expand_as(x))


def _hand_on(h: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """How errors are handed on: unit upper [G, N, N] with ``U[i, j]`` from i to a later j; and the order [G, N].

    Source: ``h = L D L^T`` in ascending order of its diagonal, turned around.
    """
    order = h.double().diagonal(dim1=-2, dim2=-1).argsort(-1)
    lower = torch.linalg.cholesky(_gathered(_gathered(_damped(h, damping), order, -1), order, -2))
    unit = lower / lower.diagonal(dim1=-2, dim2=-1)[:, None, :]
    return unit.flip(-1, -2), order.flip(-1)


def _padded(x: Tensor, unit: bool = False) -> Tensor:
    """Up to whole tiles: with elements that are and stay 0, or by ones on the diagonal."""
    rows, columns = (-length % TILE for length in x.shape[-2:])
    out = torch.nn.functional.pad(x, (0, columns, 0, rows))
    if unit and columns:
        out.diagonal(dim1=-2, dim2=-1)[:, -columns:] = 1
    return out


def _placed(x: Tensor, p: _Problem, grid: Grid, at: tuple[Tensor | slice, ...]) -> Tensor:
    """Levels times scales nearest to ``x``, at some elements."""
    s = p.scale[at]
    z = torch.where(s > 0, x / s, 0.0)
    return torch.minimum(torch.maximum(grid.nearest(z), p.low[at]), p.high[at]) * s


def _by_columns(p: _Problem, grid: Grid, by_column: Tensor) -> Tensor:
    """Rows apart from each other: column after column."""
    x, out = p.w.clone(), torch.empty_like(p.w)
    length = x.shape[-1]
    for begin in range(0, length, TILE):
        end = min(begin + TILE, length)
        for j in range(begin, end):
            at = (slice(None), slice(None), slice(j, j + 1))
            out[at] = _placed(x[at], p, grid, at)
            x[..., j + 1 : end] += (p.w[at] - out[at]) * by_column[:, j : j + 1, j + 1 : end]
        x[..., end:] += (p.w[..., begin:end] - out[..., begin:end]) @ by_column[:, begin:end, end:]
    return out


def _by_tiles(p: _Problem, grid: Grid, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Wave after wave of tiles that do not depend on each other: those of one antidiagonal."""
    down, along = p.w.shape[1] // TILE, p.w.shape[2] // TILE
    out, error = torch.empty_like(p.w), torch.zeros_like(p.w)  # Q, W - Q
    handed = torch.zeros_like(p.w.mT)  # errors, handed on along their rows: (W - Q) U, and all three turned, so that
    to_row, to_column = by_row.mT.contiguous(), by_column.mT.contiguous()  # sums run along memory
    cut = [slice(i * TILE, (i + 1) * TILE) for i in range(max(down, along))]
    for wave in range(down + along - 1):
        tiles = [(cut[i], cut[wave - i]) for i in range(max(0, wave - along + 1), min(down - 1, wave) + 1)]
        before = [error[:, r, : c.start] @ to_column[:, c, : c.start].mT for r, c in tiles]
        x = [
            p.w[:, r, c] + to_row[:, r, : r.start] @ handed[:, c, : r.start].mT + to_row[:, r, r] @ known
            for (r, c), known in zip(tiles, before, strict=True)
        ]
        inside = _Problem(*(torch.cat([part[:, r, c] for r, c in tiles]) for part in p))
        rows = torch.cat([by_row[:, r, r] for r, _ in tiles])
        columns = torch.cat([by_column[:, c, c] for _, c in tiles])
        placed = _by_elements(torch.cat(x), inside, grid, rows, columns).split(len(p.w))
        for (r, c), known, values in zip(tiles, before, placed, strict=True):
            out[:, r, c], error[:, r, c] = values, p.w[:, r, c] - values
            handed[:, c, r] = (known + error[:, r, c] @ by_column[:, c, c]).mT
    return out


def _by_elements(x: Tensor, p: _Problem, grid: Grid, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Tiles [T, n, n], antidiagonal after antidiagonal."""
    n = x.shape[-1]
    out = torch.empty_like(x)
    for wave in range(2 * n - 1):
        i = torch.arange(max(0, wave - n + 1), min(n - 1, wave) + 1, device=x.device)
        at = (slice(None), i, wave - i)
        out[at] = _placed(x[at], p, grid, at)
        error = p.w[at] - out[at]
        x += (by_row[:, i] * error[..., None]).mT @ by_column[:, wave - i]
    return out
