"""Rounding as a public module: round to nearest, randomized rounding, its moments and their derivatives.

The definitions stand in `lotion_fx.numerics.rounding`.
"""

from lotion_fx.numerics.rounding import (
    mean,
    mean_vjp,
    outcomes,
    rr,
    rtn,
    rtn_vjp,
    scale,
    scale_parts,
    variance,
    variance_vjp,
)

__all__ = ["mean", "mean_vjp", "outcomes", "rr", "rtn", "rtn_vjp", "scale", "scale_parts", "variance", "variance_vjp"]
