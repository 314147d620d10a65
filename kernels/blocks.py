"""A block's scale at work, for every kernel that rounds or smooths: weights in grid units, and slopes by the scale."""

from __future__ import annotations

import triton.language as tl

from lotion_fx.kernels.device_code import (
    HAS_THIRD,
    Q_MAX,
    TWO_LEVEL,
    above,
    below,
    block_scale,
    smallest_amax,
    template,
)
from lotion_fx.kernels.division import inverse, quotient


@template
def in_grid_units(w, amax, ts):
    """``z = w / s``, the scale as it is stored, and ``s``, which in two levels is that times the tensor's ``ts``.

    Args:
        w: float32 weights.
        amax: absmax of their blocks, which broadcasts.
        ts: the tensor's scale; ignored by formats of one level.
    """
    stored = block_scale(amax, ts)
    s = stored * ts if TWO_LEVEL else stored
    one_over_p, m, r, t = inverse(s)
    return quotient(w, one_over_p, m, r, t), stored, s


@template
def third_level(z, lo, hi):
    """The level beyond the nearer neighbour, where the law uses one."""
    if HAS_THIRD:
        return tl.where(z - lo < hi - z, below(lo), above(hi))
    return lo


@template
def at_amax(w, amax, exists, total, count, ts):
    """``total``, the derivative by each block's scale, moved to its ``count`` absmax elements: ``total ds/dw``."""
    follows = amax >= smallest_amax(ts)
    share = tl.where(follows, tl.div_rn(total, count * Q_MAX), 0.0)
    return tl.where(exists & (tl.abs(w) == amax), tl.where(w < 0, -share, share), 0.0)
