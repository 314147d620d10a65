"""Tiles: which one of a matrix a program makes, its loads and stores, whatever the shape; absmaxes of their blocks."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl


def count(rows: int, columns: int, sizes: Mapping[str, int]) -> int:
    """How many tiles of ``sizes["BM"]`` rows and ``sizes["BN"]`` columns a matrix has."""
    return triton.cdiv(rows, sizes["BM"]) * triton.cdiv(columns, sizes["BN"])


@triton.jit
def place(rows, columns, GROUP: tl.constexpr):
    """Row and column, counted in tiles, of this program's tile.

    Programs that run at the same time share ``GROUP`` rows of tiles, so that what they read stays in the cache.

    Args:
        rows, columns: of the output, in tiles.
    """
    group, within = tl.program_id(0) // (GROUP * columns), tl.program_id(0) % (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    return group * GROUP + within % height, within // height


@triton.jit
def load(pointer, first, row, column, stride, rows, columns):
    """The elements at (first + row, column), zeros outside the matrix.

    Args:
        first: a scalar, so that the large part of an address is 64 bits wide and scalar.
        row, column: offsets that broadcast to the tile.
        stride: elements between rows.
        rows, columns: of the matrix.
    """
    inside = (first + row < rows) & (column < columns)
    return tl.load(pointer + first.to(tl.int64) * stride + (row * stride + column), mask=inside, other=0.0)


@triton.jit
def store(pointer, first, row, column, rows, columns, value):
    """Writes the elements at (first + row, column) of a contiguous matrix, those inside it, in its dtype."""
    inside = (first + row < rows) & (column < columns)
    address = pointer + first.to(tl.int64) * columns + (row * columns + column)
    tl.store(address, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def absmax(blocks):
    """The absmax of each block along dimension 1, which is kept: NaN of a NaN, as PyTorch's is and `tl.max` is not."""
    return tl.reduce(tl.abs(blocks), 1, _larger, keep_dims=True)
