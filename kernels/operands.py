"""Squares and variances as operands of a matrix product: float32 values rounded to the type that the product takes.

Beside a product of bfloat16 operands stands one of bfloat16, beside any other one of float32, since float16 has too few
exponents for squares. Rounding is to nearest: half a unit in the last place of the operands' dtype at most.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def precisions(dtype: torch.dtype) -> tuple[str, str]:
    """``input_precision`` of a product of operands in ``dtype``, and of the product of squares beside it.

    Float32 follows `torch.get_float32_matmul_precision`: IEEE for "highest", else TF32, which is as exact as float16.
    """
    own = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return own, "tf32" if dtype == torch.float16 else own


@triton.jit
def square(tile, PRECISION: tl.constexpr):
    """The square of a tile as an operand.

    Args:
        tile: bfloat16, float16 or float32, itself an operand.
        PRECISION: the second of `precisions`.
    """
    if tile.dtype == tl.float16:
        tile = tile.to(tl.float32)
    return rounded(tile * tile, PRECISION)


@triton.jit
def operand(value, beside: tl.constexpr, PRECISION: tl.constexpr):
    """A float32 value, 0 or more, as an operand beside those of the dtype ``beside``."""
    if beside == tl.bfloat16:
        value = value.to(tl.bfloat16)
    return rounded(value, PRECISION)


@triton.jit
def rounded(value, PRECISION: tl.constexpr):
    """Float32 rounded to TF32 if that is the product's type: the tensor core would cut the last 13 bits off."""
    if value.dtype == tl.float32 and PRECISION == "tf32":
        value = ((value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return value
