"""A noise law's formulas as Triton device functions, printed from the expressions that PyTorch's are printed from.

A kernel takes one as a ``tl.constexpr`` argument and calls it on values in grid units, ``z`` limited to the grid:

    by_w, by_s = slopes(z, lo, hi, third)          # slopes = device_function(law, "variance_slopes")

``third`` is read by laws with a third level only; elsewhere it may be ``lo``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl

from lotion_fx.noise import NoiseLaw
from lotion_fx.printer import TritonPrinter, define, source


@cache
def device_function(law: NoiseLaw, name: str) -> Any:
    """One of a law's functions of ``(z, lo, hi, third)``, to be called from a Triton kernel.

    Args:
        law: the noise.
        name: a key of `NoiseLaw.expressions`, whose entry are the outputs, a tuple. One that does not depend on the
            weight, such as randomized rounding's mean slope of 1, is a scalar.

    Reference: ``law.torch[name]``.
    """
    return triton.jit(
        define(name, source(name, law.expressions[name], TritonPrinter()), {"tl": tl, "__name__": __name__})
    )
