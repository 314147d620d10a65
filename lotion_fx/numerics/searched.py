"""Searched scales: blocks clipped to where rounding them errs least.

A scale is made of its block's largest magnitude, so that one outlier makes the levels of all its neighbours coarse. A
block that is clipped first has finer levels, and errs at the outlier instead. Which is cheaper is tried out, as the
observers of post-training quantization do that minimize squared errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lotion_fx.numerics.formats import Format
from lotion_fx.numerics.rounding import compute_dtype, from_blocks, rtn, scale, to_blocks

SHARES = tuple(step / 40 for step in range(40, 7, -1))
"""Of a block's largest magnitude, those that are tried: from 1, which wins where others are no better, to .2."""

HANDED_ON = 1.0
"""How much of a clipped weight's error is handed on to others, in steps between the last levels."""


@torch.no_grad()
def clipped(w: Tensor, fmt: Format, axis: int) -> Tensor:
    """A weight, each block limited to that share of its largest magnitude at which rounding it errs least.

    Args:
        w: weights, any shape; float32, bfloat16, float16 or float64.
        fmt, axis: the format, and the dimension that its blocks run along.

    Returns:
        What to make scales of, ``w``'s shape and dtype: of all shares, that of the least ``sum (w - q)^2``, q the
        clipped weight rounded to nearest. Weighted by a curvature's diagonal it is no better once errors are handed on.
    """
    blocks = to_blocks(w, fmt, axis)
    amax = blocks.abs().amax(-1, keepdim=True)
    shared = w.abs().amax() if fmt.law.two_level else None  # else blocks would not be apart
    target = blocks.to(compute_dtype(w))
    best, least = blocks, torch.full_like(amax, torch.inf, dtype=torch.float64)
    for share in SHARES:
        bound = amax * share
        tried = blocks.clamp(-bound, bound)
        near = rtn(from_blocks(tried, fmt, axis, w.shape), fmt, axis, amax_tensor=shared)
        found = (target - to_blocks(near, fmt, axis)).double().square().sum(-1, keepdim=True)
        best, least = torch.where(found < least, tried, best), torch.minimum(found, least)
    return from_blocks(best, fmt, axis, w.shape)


@torch.no_grad()
def limited(w: Tensor, scaled_as: Tensor, fmt: Format, axis: int) -> Tensor:
    """A weight, each block limited to `HANDED_ON` levels beyond those of its scale.

    Adaptive rounding hands errors on, and an outlier's whole error would throw its neighbours out of their places.

    Args:
        w, fmt, axis: as `clipped` takes them.
        scaled_as: what scales are made of, as that gives it.
    """
    first, last = fmt.grid.levels[-2:]
    blocks, beyond = to_blocks(w, fmt, axis), HANDED_ON * (last - first) * scale(scaled_as, fmt, axis)
    bound = to_blocks(scaled_as, fmt, axis).abs().amax(-1, keepdim=True) + beyond.to(w.dtype)
    return from_blocks(blocks.clamp(-bound, bound), fmt, axis, w.shape)
