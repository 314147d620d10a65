"""Quantize and smooth a weight in one pass: block scale, neighbours, and whichever of four results are asked for.

With ``s`` a block's scale, ``z = w / s`` and ``lo <= z <= hi`` the levels around it, as in `lotion_fx.rounding`:

    rtn        s nearest(z)
    rr         s hi if u < P(hi), else s lo                      u from Philox, counted by the element's index
    variance   s^2 v(z), for randomized rounding (w - s lo)(s hi - w)
    term       grad += f d/dw <h, variance>, the scale's own part at the block's absmax elements included

Each weight is read once and each result written once. A tensor's scale, and the scales of blocks longer than a tile
("tensor", long channels), need the absmax first: one reduction, which the caller can keep. The term of such blocks
takes a second read, for the sum over the block comes before its absmax element's gradient.

A weight is seen as ``[outer, length, inner]`` with blocks along ``length`` (`kernels.view`). On Blackwell E2M1 levels
come from ``cvt.rn.satfinite.e2m1x2.f32``, elsewhere from the exponent's bits; a scale is never an fp8 type. ``cvt.rs``,
Blackwell's stochastic rounding, is not used: the random bits that it takes resolve a probability too coarsely to be
exact to the law (docs/kernels.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from lotion_fx.kernels.device_code import (
    HAS_THIRD,
    Q_MAX,
    TWO_LEVEL,
    above,
    below,
    block_scale,
    clamp,
    draw,
    nearest,
    neighbours,
    smallest_amax,
    specialized,
    template,
    tensor_scale,
    variance,
    variance_slopes,
)
from lotion_fx.kernels.division import inverse, quotient
from lotion_fx.kernels.targets import nearest as target
from lotion_fx.kernels.tiles import absmax
from lotion_fx.kernels.tuning import launchable
from lotion_fx.kernels.view import ALONG, ELEMENTS, LINE, PIECE, PIECES, ROWS, View, absent_amaxes, check, configs
from lotion_fx.kernels.work import Config, Work
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import Format, resolve
from lotion_fx.numerics.noise import RANDOMIZED, NoiseLaw, resolve_noise

# Two float32 in grid units to the nearest E2M1 levels, ties to even, past the grid to the last; -0.0 for what rounds to
# 0 from below. The conversion saturates, so there is nothing to clamp. On one line, for Inductor escapes line ends
# twice.
E2M1 = tl.constexpr(
    "{ .reg .b8 code; "
    ".reg .b32 pair; "
    ".reg .b16 even, odd; "
    "cvt.rn.satfinite.e2m1x2.f32 code, $3, $2; "
    "cvt.rn.f16x2.e2m1x2 pair, code; "
    "mov.b32 {even, odd}, pair; "
    "cvt.f32.f16 $0, even; "
    "cvt.f32.f16 $1, odd; "
    "}"
)


@template
def nearest_level(z, E2M1_CVT: tl.constexpr):
    """The level nearest to ``z``, by the hardware's conversion where it has one."""
    if E2M1_CVT:
        level = tl.inline_asm_elementwise(E2M1, "=f,=f,f,f", [z], dtype=tl.float32, is_pure=True, pack=2)
        return level + 0.0  # never -0.0
    return nearest(z)


@template
def third_level(z, lo, hi):
    """The level beyond the nearer neighbour, where the law uses one."""
    if HAS_THIRD:
        return tl.where(z - lo < hi - z, below(lo), above(hi))
    return lo


@triton.jit
def uniforms(seed, offset, FOURS: tl.constexpr):
    """Uniform numbers in [0, 1), Philox's word ``e % 4`` at counter ``e // 4`` for element ``e`` of the weight.

    With FOURS each draw serves four elements, which must lie side by side in ``offset`` [R, P, I], flattened.
    """
    if FOURS:
        fours: tl.constexpr = offset.shape[0] * offset.shape[1] * offset.shape[2] // 4
        first, _ = tl.split(tl.reshape(offset, (2 * fours, 2)))
        first, _ = tl.split(tl.reshape(first, (fours, 2)))
        a, b, c, d = tl.rand4x(seed, first // 4)
        return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), offset.shape)
    a, b, c, d = tl.rand4x(seed, offset // 4)
    word = offset % 4
    return tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d)))


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


@template
def at_amax(w, amax, exists, total, count, ts):
    """``total``, the derivative by each block's scale, moved to its ``count`` absmax elements: ``total ds/dw``."""
    follows = amax >= smallest_amax(ts)
    share = tl.where(follows, tl.div_rn(total, count * Q_MAX), 0.0)
    return tl.where(exists & (tl.abs(w) == amax), tl.where(w < 0, -share, share), 0.0)


@template
def smooth_kernel(
    w_ptr,
    amax_ptr,  # of the tensor, or of each block where a tile does not hold one; None elsewhere
    seed_ptr,
    rtn_ptr,
    rr_ptr,
    variance_ptr,
    h_ptr,
    cols_ptr,
    factor_ptr,
    sums_ptr,  # [blocks, 2]: of h dv/ds, and absmax elements, of blocks longer than a tile
    grad_ptr,
    count,
    pieces,
    length,
    inner,
    line,
    rows,
    cols,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    FLAT: tl.constexpr,
    FOURS: tl.constexpr,
    WHOLE: tl.constexpr,
    SHARED: tl.constexpr,  # one scale for the tensor
    RTN: tl.constexpr,
    RR: tl.constexpr,
    VARIANCE: tl.constexpr,
    TERM: tl.constexpr,
    FACTORED: tl.constexpr,
    E2M1_CVT: tl.constexpr,
    INNER: tl.constexpr,
    SIZE: tl.constexpr,  # elements of a tile
    TILES: tl.constexpr,  # of a program
):
    ROWS: tl.constexpr = SIZE // (PAD * INNER)
    ts = tensor_scale(tl.load(amax_ptr)) if TWO_LEVEL else 1.0
    seed = tl.load(seed_ptr) if RR else 0
    factor = tl.load(factor_ptr) if TERM else 1.0
    begin, end = tiles_of(count, line, inner, ROWS, INNER, TILES, FACTORED)
    one = tl.zeros((1, 1, 1), tl.int32)
    if SHARED:
        amax = tl.load(amax_ptr + one)
    if SHARED and TERM:
        total, at = sums_of(sums_ptr, one, one == 0)
    along = 0.0
    if FACTORED == ALONG:
        first, _, _ = pieces_of(begin, count, line, inner, ROWS, INNER, FACTORED)
        along = factors_along(h_ptr, first, count, pieces, length, BLOCK, PAD, ROWS)
    for tile in range(begin, end):
        first, last, number = pieces_of(tile, count, line, inner, ROWS, INNER, FACTORED)
        offset, exists, like, known = places(tile, first, last, pieces, length, inner, BLOCK, PAD, ROWS, INNER, FLAT)
        w = tl.load(w_ptr + offset, mask=exists, other=0.0).to(tl.float32)
        if WHOLE:
            amax = absmax(w)
        elif not SHARED:
            amax = tl.load(amax_ptr + like, mask=known, other=1.0)
        s = block_scale(amax, ts)
        s = s * ts if TWO_LEVEL else s
        one_over_p, m, r, t = inverse(s)
        z = quotient(w, one_over_p, m, r, t)
        if RTN:
            rtn = nearest_level(z, E2M1_CVT) * s
            tl.store(rtn_ptr + offset, rtn.to(rtn_ptr.dtype.element_ty), mask=exists)
        if RR or VARIANCE or TERM:
            lo, hi = neighbours(z)
            third = third_level(z, lo, hi)
        if RR:
            u = uniforms(seed, offset, FOURS)
            up, beyond = draw(z, lo, hi, third)
            level = tl.where(u * (hi - lo) < up, hi, lo)
            if HAS_THIRD:
                level = tl.where((1 - u) * (hi - lo) < beyond, third, level)
            tl.store(rr_ptr + offset, (level * s).to(rr_ptr.dtype.element_ty), mask=exists)
        if VARIANCE or TERM:
            z = clamp(z)
        if VARIANCE:
            (v,) = variance(z, lo, hi, third)
            tl.store(variance_ptr + offset, v * s * s, mask=exists)
        if TERM:
            h = curvature(h_ptr, cols_ptr, along, number, offset, exists, like, known, rows, cols, FACTORED)
            by_w, by_s = variance_slopes(z, lo, hi, third)
            if WHOLE:
                total = tl.sum(h * by_s, 1, keep_dims=True)
                at = tl.sum((exists & (tl.abs(w) == amax)).to(tl.float32), 1, keep_dims=True)
            elif not SHARED:
                total, at = sums_of(sums_ptr, like, known)
            term = h * by_w * s + at_amax(w, amax, exists, s * total, tl.maximum(at, 1.0), ts)
            grad = tl.load(grad_ptr + offset, mask=exists, other=0.0).to(tl.float32) + factor * term
            tl.store(grad_ptr + offset, grad.to(grad_ptr.dtype.element_ty), mask=exists)


@template
def sums_kernel(
    w_ptr,
    amax_ptr,
    h_ptr,
    cols_ptr,
    parts_ptr,  # [count, inner, 2]
    count,
    pieces,
    length,
    inner,
    line,
    rows,
    cols,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    FLAT: tl.constexpr,
    SHARED: tl.constexpr,
    FACTORED: tl.constexpr,
    INNER: tl.constexpr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,  # of a program: one
):
    """Each piece's part of its long block's sum of ``h dv/ds``, and how many absmax elements it holds."""
    ROWS: tl.constexpr = SIZE // (PAD * INNER)
    tile, _ = tiles_of(count, line, inner, ROWS, INNER, TILES, FACTORED)
    first, last, number = pieces_of(tile, count, line, inner, ROWS, INNER, FACTORED)
    offset, exists, like, known = places(tile, first, last, pieces, length, inner, BLOCK, PAD, ROWS, INNER, FLAT)
    along = 0.0
    if FACTORED == ALONG:
        along = factors_along(h_ptr, first, count, pieces, length, BLOCK, PAD, ROWS)
    w = tl.load(w_ptr + offset, mask=exists, other=0.0).to(tl.float32)
    amax = tl.load(amax_ptr + (like * 0 if SHARED else like), mask=known, other=1.0)
    one_over_p, m, r, t = inverse(block_scale(amax, 1.0))
    z = quotient(w, one_over_p, m, r, t)
    lo, hi = neighbours(z)
    _, by_s = variance_slopes(clamp(z), lo, hi, third_level(z, lo, hi))
    h = curvature(h_ptr, cols_ptr, along, number, offset, exists, like, known, rows, cols, FACTORED)
    piece = first + tl.arange(0, ROWS)[:, None]
    i = tile % tl.cdiv(inner, INNER) * INNER + tl.arange(0, INNER)[None, :]
    to = piece * inner + i
    kept = (piece < last) & (i < inner)
    parts = tl.join(tl.sum(h * by_s, 1), tl.sum((exists & (tl.abs(w) == amax)).to(tl.float32), 1))
    tl.store(parts_ptr + 2 * to[:, :, None] + tl.arange(0, 2)[None, None, :], parts, mask=kept[:, :, None])


# ----------------------------------------------------------------------------------------------------------- launching


def _rows(pad: int) -> tuple[Config, ...]:
    """Of rows that a tile holds as a whole: 32 or 64 elements a thread."""
    one, two = max(1024, pad), max(2048, pad)
    return configs(*((one, tiles, one // 1024) for tiles in (1, 2, 4)), (two, 1, two // 2048))


# By shape class. A program takes several tiles, so that what they share is loaded and computed once. Where a block's
# elements lie a row apart ("strided") a warp takes many columns and finds the absmax in its own registers.
CANDIDATES = {
    "flat": configs((1024, 2, 1), (1024, 3, 1), (1024, 3, 2), (1024, 5, 2), (1024, 8, 2)),
    **{f"rows/{pad}": _rows(pad) for pad in ROWS},
    "long": configs((PIECE, 1, 1), (PIECE, 2, 1), (PIECE, 2, 2), (PIECE, 4, 2)),
    "strided": configs((2048, 2, 2), (2048, 3, 2), (2048, 4, 2), (2048, 8, 4)),
}
SUMS = configs((PIECE, 1, 1), (PIECE, 1, 2))  # of `sums_kernel`


@dataclass(frozen=True)
class Curvature:
    """What the term takes beside the weight: ``grad += factor d/dw <h, variance>``.

    Args:
        h: of the weight's shape; or, with ``cols``, the row factors, float32 [groups * rows].
        cols: column factors, float32 [groups * columns], of a curvature ``h[g, r] cols[g, c]``; None if ``h`` is dense.
        rows: rows in a group of the factored form.
        factor: 0-d float32.
    """

    h: Tensor
    cols: Tensor | None
    rows: int
    factor: Tensor


@dataclass(frozen=True)
class Outputs:
    """Tensors of the weight's shape, contiguous, to be written; None for what is not asked for."""

    rtn: Tensor | None = None
    rr: Tensor | None = None
    variance: Tensor | None = None
    grad: Tensor | None = None  # added to


def launch(
    w: Tensor,
    fmt: Format,
    axis: int,
    out: Outputs,
    *,
    law: NoiseLaw = RANDOMIZED,
    amax: Tensor | None = None,
    seed: Tensor | None = None,
    curvature: Curvature | None = None,
    arch: int,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> None:
    """Runs the kernel where the tensors are.

    Args:
        w: float32, bfloat16 or float16, contiguous.
        fmt, axis, law: as in `lotion_fx.rounding`.
        amax: what `amaxes` gives; made here if None.
        seed: 0-d int64, for ``out.rr``.
        curvature: for ``out.grad``.
        arch: compute capability of the device, 80 for ``sm_80``.
        wrap: `torch.library.wrap_triton` inside a `triton_op`.
    """
    rows, cols = _matrix(w, curvature)
    view = View.of(w.shape, fmt, axis, rows, cols)
    amax = absent_amaxes(w, view, fmt, axis, amax)
    h, by_column = (None, None) if curvature is None else (curvature.h, curvature.cols)
    common = {"h_ptr": h, "cols_ptr": by_column, **view.arguments, **view.constants}
    name, sums = _name(out), None

    def grid(meta: Mapping[str, int]) -> tuple[int]:
        return (view.programs(meta),)

    if out.grad is not None and not view.whole:
        parts = w.new_empty((view.outer, view.pieces, view.inner, 2), dtype=torch.float32)
        fn = specialized(sums_kernel, fmt, law)
        fn, tile = launchable(fn, "smooth/sums", view.shape_class, arch, SUMS, key=("count", "inner"))
        wrap(fn)[grid](w_ptr=w, amax_ptr=amax, parts_ptr=parts, **common, **tile)
        sums = parts.sum((0, 1, 2) if view.shared else 1)
    kernel, tile = launchable(
        specialized(smooth_kernel, fmt, law),
        name,
        view.shape_class,
        arch,
        CANDIDATES[view.shape_class],
        key=("count", "inner"),
        writes=("grad_ptr",) if out.grad is not None else (),
    )
    wrap(kernel)[grid](
        w_ptr=w,
        amax_ptr=amax,
        seed_ptr=seed,
        rtn_ptr=out.rtn,
        rr_ptr=out.rr,
        variance_ptr=out.variance,
        factor_ptr=None if curvature is None else curvature.factor,
        sums_ptr=sums,
        grad_ptr=out.grad,
        **common,
        FOURS=view.fours,
        WHOLE=view.whole,
        RTN=out.rtn is not None,
        RR=out.rr is not None,
        VARIANCE=out.variance is not None,
        TERM=out.grad is not None,
        E2M1_CVT=has_conversion(fmt, arch),
        **tile,
    )


def has_conversion(fmt: Format, arch: int) -> bool:
    """Whether an architecture converts to this format's levels in one instruction."""
    return fmt.grid == E2M1_GRID and target(arch).supports("e2m1")


def _name(out: Outputs) -> str:
    """The kernel's name in tables: of the costliest of its results."""
    asked = {"term": out.grad, "rr": out.rr, "variance": out.variance, "rtn": out.rtn}
    return f"smooth/{next(name for name, tensor in asked.items() if tensor is not None)}"


E2M1_GRID = resolve("fp4").grid


def _matrix(w: Tensor, curvature: Curvature | None) -> tuple[int, int]:
    """Rows and columns of each group of a factored curvature; 0 without."""
    if curvature is None or curvature.cols is None:
        return 0, 0
    return curvature.rows, w.numel() // curvature.h.numel()


# ------------------------------------------------------------------------------------------------------------ operators


def philox(seed: Tensor, count: int) -> Tensor:
    """The uniform numbers that the kernel draws for elements 0 to ``count - 1``, float32, in [0, 1).

    Philox 4x32 with 10 rounds, key ``seed`` (64 bits), counter the element's index over 4, its word the remainder; a
    word's sign bit is folded and the rest scaled to 31 bits, as Triton's ``tl.rand4x`` does.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    low = 2**32 - 1
    index = torch.arange(-(-count // 4), device=seed.device)
    c0, c1, c2, c3 = index & low, *(torch.zeros_like(index) for _ in range(3))
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        (h0, l0), (h2, l2) = _product(c0, 0xD2511F53), _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = h2 ^ c1 ^ k0, l2, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    word = torch.stack([c0, c1, c2, c3], 1).reshape(-1)[:count]
    folded = torch.where(word >= 2**31, low - word, word)
    return folded.to(torch.float32) * 4.6566127342e-10


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a b``, both below 2^32, in int64 that holds 63."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


@triton_op("lotion_fx::smooth", mutates_args=())
def smooth(
    w: Tensor,
    fmt: str,
    axis: int,
    noise: str,
    rtn: bool,
    rr: bool,
    variance: bool,
    seed: Tensor | None = None,
    amax: Tensor | None = None,
) -> list[Tensor]:
    """Those that are asked for of a weight's round to nearest, its random rounding and its variance, in one pass.

    Args:
        w: float32, bfloat16 or float16, any shape of at least one dimension.
        fmt, axis, noise: names of the format and of the noise law, and the axis of the blocks.
        rtn, rr, variance: what to return, in this order.
        seed: 0-d int64, for ``rr``.
        amax: what `amaxes` gives, if it is known; "tensor" blocks and two-level scales take the whole tensor's.

    Returns:
        Tensors of ``w``'s shape: ``rtn`` and ``rr`` in its dtype, ``variance`` in float32.
    """
    format, law = resolve(fmt), resolve_noise(noise)
    if w.device.type == "cpu":
        whole = amax if format.block != "channel" else None
        results = []
        if rtn:
            results.append(rounding.rtn(w, format, axis, amax_tensor=whole))
        if rr:
            assert seed is not None
            uniform = philox(seed, w.numel()).reshape(w.shape)
            results.append(rounding.rr(w, format, axis, law=law, uniform=uniform, amax_tensor=whole))
        if variance:
            results.append(rounding.variance(w, format, axis, law=law, amax_tensor=whole))
        return results
    check(w, format)
    w = w.contiguous()
    out = Outputs(
        torch.empty_like(w) if rtn else None,
        torch.empty_like(w) if rr else None,
        torch.empty_like(w, dtype=torch.float32) if variance else None,
    )
    with on_device(w.device):
        launch(w, format, axis, out, law=law, amax=amax, seed=seed, arch=arch_of(w.device), wrap=wrap_triton)
    return [x for x in (out.rtn, out.rr, out.variance) if x is not None]


@triton_op("lotion_fx::add_term", mutates_args={"grad"})
def add_term(
    grad: Tensor,
    w: Tensor,
    h: Tensor,
    cols: Tensor | None,
    rows: int,
    factor: Tensor,
    fmt: str,
    axis: int,
    noise: str,
    amax: Tensor | None = None,
) -> None:
    """Adds ``factor d/dw <h, variance>`` to a gradient, in one pass over both.

    Args:
        grad: of ``w``'s shape, contiguous.
        w, fmt, axis, noise, amax: as for `smooth`.
        h, cols, rows, factor: see `Curvature`.
    """
    format, law = resolve(fmt), resolve_noise(noise)
    curvature = Curvature(h, cols, rows, factor)
    if w.device.type == "cpu":
        whole = amax if format.block != "channel" else None
        full = h if cols is None else (h.reshape(-1, rows, 1) * cols.reshape(h.numel() // rows, 1, -1)).reshape(w.shape)
        term = rounding.variance_vjp(w, full, format, axis, law=law, amax_tensor=whole)
        grad.add_((factor * term).to(grad.dtype))
        return
    check(w, format)
    if not grad.is_contiguous():
        raise ValueError(
            f"grad: strides {tuple(grad.stride())}; expected a contiguous tensor, as it is added to in place"
        )
    known = {"law": law, "amax": amax, "curvature": curvature}
    with on_device(w.device):
        out = Outputs(grad=grad)
        launch(w.contiguous(), format, axis, out, arch=arch_of(w.device), wrap=wrap_triton, **known)  # type: ignore[arg-type]


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside, kernels are launched on this device, for Triton takes the current one."""
    return contextlib.nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def arch_of(device: torch.device) -> int:
    """A CUDA device's compute capability, 80 for ``sm_80``.

    Raises:
        NotImplementedError: the kernels are for none such.
    """
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        raise NotImplementedError(f"device={device}: kernels are for NVIDIA's sm_80 and later, and a CPU takes ATen")
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# --------------------------------------------------------------------------------------------------- without a device

MODELS = {"150M": (3072, 768), "8B": (14336, 4096), "70B": (28672, 8192)}


def works(arch: int) -> list[Work]:
    """What the kernel does on the largest matrix of a 150M, an 8B and a 70B model, and on Megatron-LM's benchmark."""
    found = []
    for shape in MODELS.values():
        for name in ("nvfp4", "mxfp4", "int4", "int8"):
            found += [_work(arch, shape, -1, name, result, "bf16") for result in ("rtn", "rr")]
            found.append(_work(arch, shape, -1, name, "term", "fp32"))
        found.append(_work(arch, shape, -1, "nvfp4", "variance", "bf16"))
        found += [_work(arch, shape, 0, "nvfp4", result, "bf16") for result in ("rtn", "rr")]
        found.append(_work(arch, shape, 0, "nvfp4", "term", "fp32"))
    for shape, name in (((14336, 4096), "int4/tensor"), ((4096, 14336), "int8")):  # longer than a tile
        found += [_work(arch, shape, -1, name, result, "bf16") for result in ("rtn", "rr")]
        found += [_work(arch, shape, -1, name, result, "fp32") for result in ("term", "sums")]
    return [*found, _work(arch, (8 * 4096, 6144), -1, "nvfp4", "rtn", "bf16")]


def traffic(view: View, fmt: Format, result: str, dtype: str) -> int:
    """Bytes that the kernel moves for a weight: each input once and each output once.

    Args:
        view, fmt: the weight, and whether its curvature is factored.
        result: ``"rtn"``, ``"rr"``, ``"variance"``, ``"term"`` or ``"sums"``.
        dtype: of the weight and of the result, ``"bf16"`` or ``"fp32"``; gradients and curvature are float32.
    """
    elements, size = view.outer * view.length * view.inner, {"bf16": 2, "fp32": 4}[dtype]
    amax = 4 if fmt.law.two_level else 0 if view.whole else 4 * view.scales
    if result not in ("term", "sums"):
        return elements * (size + (4 if result == "variance" else size)) + amax + (8 if result == "rr" else 0)
    h = elements // (view.rows * view.cols) * (view.rows + view.cols) if view.cols else elements
    if result == "sums":
        return elements * size + 4 * h + amax + 8 * view.count * view.inner
    return elements * (size + 8) + 4 * h + 4 + amax + (0 if view.whole else 8 * view.scales)


def _work(arch: int, shape: tuple[int, ...], axis: int, name: str, result: str, dtype: str) -> Work:
    fmt, term = resolve(name), result in ("term", "sums")
    view = View.of(shape, fmt, axis, *(shape if term else ()))
    pointers = {"w_ptr": f"*{dtype}", "amax_ptr": "*fp32" if fmt.law.two_level or not view.whole else None}
    if term:
        pointers |= {"h_ptr": "*fp32", "cols_ptr": "*fp32"}
        summed = {"grad_ptr": "*fp32", "factor_ptr": "*fp32", "sums_ptr": None if view.whole else "*fp32"}
        pointers |= {"parts_ptr": "*fp32"} if result == "sums" else summed
    else:
        made = "*fp32" if result == "variance" else f"*{dtype}"
        pointers |= {f"{result}_ptr": made, "seed_ptr": "*i64" if result == "rr" else None}
    fn = specialized(sums_kernel if result == "sums" else smooth_kernel, fmt)
    constants = {
        **view.constants,
        "FOURS": view.fours,
        "WHOLE": view.whole,
        "E2M1_CVT": has_conversion(fmt, arch),
        **{key: result == key.lower() for key in ("RTN", "RR", "VARIANCE", "TERM")},
    }
    absent = {name: None for name in fn.arg_names if name.endswith("_ptr") and not pointers.get(name)}
    integers = dict.fromkeys(view.arguments, "i32")
    e2m1 = has_conversion(fmt, arch) and result == "rtn"
    moved = traffic(view, fmt, result, dtype)
    return Work(
        kernel=f"smooth/{result}",
        shape=f"{'x'.join(map(str, shape))} {dtype} {name}" + (f" axis {axis}" if axis != -1 else ""),
        fn=fn,
        signature={**{key: value for key, value in pointers.items() if value}, **integers},
        constants={**absent, **{key: value for key, value in constants.items() if key in fn.arg_names}},
        configs=SUMS if result == "sums" else CANDIDATES[view.shape_class],
        programs=lambda config: view.programs(config.constants),
        bytes=lambda config: moved,
        minimum_bytes=moved,
        iterations=lambda config: view.tiles(config.constants),
        requires={arch: ("F2FP.SATFINITE.E2M1",)} if e2m1 else {},
        aligned=tuple(integers),
        shape_class=view.shape_class,
        wide=0.9,
    )
