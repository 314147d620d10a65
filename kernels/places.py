"""The device's side of `kernels.view`: a program's tiles, where their elements lie, and a curvature's values there."""

from __future__ import annotations

import triton
import triton.language as tl

from lotion_fx.kernels.view import ALONG, ELEMENTS, LINE, PIECES


@triton.jit
def tiles_of(count, line, inner, ROWS: tl.constexpr, INNER: tl.constexpr, TILES: tl.constexpr, FACTORED: tl.constexpr):
    """This program's first tile, and the one behind its last.

    Tiles lie side by side over the same pieces where a piece's elements are apart in memory (INNER above 1); else they
    follow each other, and where FACTORED is LINE none reaches over the end of a line of ``line`` pieces.
    """
    program = tl.program_id(0)
    if INNER > 1:
        across = tl.cdiv(inner, INNER)
        programs = tl.cdiv(across, TILES)
        start, begin = program // programs * across, program % programs * TILES
        return start + begin, start + tl.minimum(begin + TILES, across)
    tiles = tl.cdiv(line, ROWS) * (count // line) if FACTORED == LINE else tl.cdiv(count, ROWS)
    return program * TILES, tl.minimum(program * TILES + TILES, tiles)


@triton.jit
def pieces_of(tile, count, line, inner, ROWS: tl.constexpr, INNER: tl.constexpr, FACTORED: tl.constexpr):
    """A tile's first piece, the one behind the last that it may hold, and its line."""
    if INNER > 1:
        return tile // tl.cdiv(inner, INNER) * ROWS, count, 0
    if FACTORED == LINE:
        tiles = tl.cdiv(line, ROWS)
        number = tile // tiles
        return number * line + (tile - number * tiles) * ROWS, (number + 1) * line, number
    return tile * ROWS, count, 0


@triton.jit
def places(
    tile,
    first,
    end,
    pieces,
    length,
    inner,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Where a tile [ROWS, PAD, INNER] of the pieces from ``first`` on, before ``end``, lies.

    A piece has ``BLOCK`` elements and ``pieces`` of them are along ``length``; FLAT where these follow each other in
    memory.
    Gives the elements' offsets, which of them exist, each row's place in [outer, inner], which exist.
    """
    piece = first + tl.arange(0, ROWS)[:, None, None]
    k = tl.arange(0, PAD)[None, :, None]
    exists = piece < end
    if PAD != BLOCK:
        exists = exists & (k < BLOCK)
    if FLAT:
        return piece * BLOCK + k, exists & (k >= 0), piece // pieces, piece < end
    i = tile % tl.cdiv(inner, INNER) * INNER + tl.arange(0, INNER)[None, None, :]
    at = (piece % pieces) * BLOCK + k
    row = piece // pieces
    known = (piece < end) & (i < inner)
    return (row * length + at) * inner + i, exists & known & (at < length), row * inner + i, known


@triton.jit
def factors_along(h_ptr, first, count, pieces, length, BLOCK: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr):
    """Factors of the rows across which the pieces from ``first`` on run, [ROWS, PAD, 1]."""
    piece = first + tl.arange(0, ROWS)[:, None, None]
    k = tl.arange(0, PAD)[None, :, None]
    at = (piece % pieces) * BLOCK + k
    exists = (piece < count) & (k < BLOCK) & (at < length)
    return tl.load(h_ptr + piece // pieces * length + at, mask=exists, other=0.0)


@triton.jit
def curvature(h_ptr, cols_ptr, along, line, offset, exists, like, known, rows, cols, FACTORED: tl.constexpr):
    """h at each element, 0 outside: dense, or the product of its row's and its column's factor.

    FACTORED is LINE where the tile lies in one row, ``line``; PIECES where each piece does, that of its place ``like``;
    ALONG where ``along`` holds the rows' factors and ``like`` is a place in [groups, columns]; ELEMENTS elsewhere, 0 if
    dense.
    """
    if FACTORED == LINE:
        return tl.load(h_ptr + line) * column_factors(cols_ptr, line, offset, exists, rows, cols)
    if FACTORED == PIECES:
        h = tl.load(h_ptr + like, mask=known, other=0.0)
        return h * column_factors(cols_ptr, like, offset, exists, rows, cols)
    if FACTORED == ALONG:
        return along * tl.load(cols_ptr + like, mask=known, other=0.0)
    if FACTORED == ELEMENTS:
        row = offset // cols
        h = tl.load(h_ptr + row, mask=exists, other=0.0)
        return h * column_factors(cols_ptr, row, offset, exists, rows, cols)
    return tl.load(h_ptr + offset, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def column_factors(cols_ptr, row, offset, exists, rows, cols):
    """A curvature's factors of the columns in which elements of some rows lie."""
    return tl.load(cols_ptr + row // rows * cols + (offset - row * cols), mask=exists, other=0.0)


@triton.jit
def sums_of(sums_ptr, block, known):
    """Blocks' two sums, [blocks, 2] float32, by one load of 64 bits for both; 0 for blocks that do not exist."""
    both = tl.load(sums_ptr.to(tl.pointer_type(tl.int64)) + block, mask=known, other=0)
    return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
