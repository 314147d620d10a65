"""Quantize and smooth a weight in one pass: block scale, neighbours, and whichever of four results are asked for.

With ``s`` a block's scale, ``z = w / s`` and ``lo <= z <= hi`` the levels around it (`lotion_fx.rounding` has the formulas):

    rtn        s nearest(z)
    rr         s hi if u < P(hi), else s lo                      u from Philox, counted by the element's index
    variance   s^2 v(z), for randomized rounding (w - s lo)(s hi - w)
    term       grad += f d/dw <h, variance>, the scale's own part at the block's absmax elements included

Each weight is read once and each result written once. A tensor's scale, and the scales of blocks longer than a tile
("channel", "tensor"), need the absmax first: one reduction, which the caller can keep. The term of such blocks takes a
second read, for the sum over the block comes before its absmax element's gradient.

A weight is seen as ``[outer, length, inner]`` with blocks along ``length``; a tile holds ``ROWS`` blocks and ``INNER``
columns. On Blackwell E2M1 levels come from ``cvt.rn.satfinite.e2m1x2.f32``, elsewhere from the exponent's bits; the scale
never is an fp8 type. ``cvt.rs``, Blackwell's stochastic rounding, is not used: it resolves a probability to 8 bits, and so
is not exact to the law (docs/kernels.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lotion_fx.formats import Format, resolve
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
from lotion_fx.kernels.work import Config
from lotion_fx.noise import RANDOMIZED, NoiseLaw

LONGEST = 1024  # elements of a block that a tile can hold

# Two float32 in grid units to the nearest E2M1 levels, ties to even, past the grid to the last; -0.0 for what rounds to 0
# from below. The conversion saturates, so there is nothing to clamp.
E2M1 = tl.constexpr("""{
    .reg .b8 code; .reg .b32 pair; .reg .b16 even, odd;
    cvt.rn.satfinite.e2m1x2.f32 code, $3, $2;
    cvt.rn.f16x2.e2m1x2 pair, code;
    mov.b32 {even, odd}, pair;
    cvt.f32.f16 $0, even;
    cvt.f32.f16 $1, odd;
}""")


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
def uniforms(seed, offset, FOUR: tl.constexpr):
    """Uniform numbers in [0, 1), Philox's word ``e % 4`` at counter ``e // 4`` for element ``e`` of the weight.

    With FOUR each draw serves four elements, which must lie side by side along dimension 1 of ``offset`` [R, P, 1].
    """
    if FOUR:
        first, _ = tl.split(tl.reshape(offset, (offset.shape[0], offset.shape[1] // 2, 2)))
        first, _ = tl.split(tl.reshape(first, (offset.shape[0], offset.shape[1] // 4, 2)))
        a, b, c, d = tl.rand4x(seed, first // 4)
        return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), offset.shape)
    a, b, c, d = tl.rand4x(seed, offset // 4)
    word = offset % 4
    return tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d)))


@triton.jit
def places(
    count,
    pieces,
    length,
    inner,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Where a tile [ROWS, PAD, INNER] lies: offsets, which of them exist, and each row's place in [outer, inner].

    There are ``count`` pieces of ``BLOCK`` elements, ``pieces`` of them along ``length``; FLAT where they follow each
    other in memory.
    """
    piece = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    k = tl.arange(0, PAD)[None, :, None]
    exists = piece < count
    if PAD != BLOCK:
        exists = exists & (k < BLOCK)
    if FLAT:
        return piece * BLOCK + k, exists & (k >= 0), piece // pieces
    i = tl.program_id(1) * INNER + tl.arange(0, INNER)[None, None, :]
    at = (piece % pieces) * BLOCK + k
    row = piece // pieces
    return (row * length + at) * inner + i, exists & (at < length) & (i < inner), row * inner + i


@triton.jit
def curvature(h_ptr, cols_ptr, offset, exists, count, rows, cols, BLOCK: tl.constexpr, FACTORED: tl.constexpr):
    """h at each element, 0 outside: dense, or the product of its row's and its column's factor.

    FACTORED is 2 where a block lies in one row, so that a row is found once a block; 1 elsewhere; 0 if dense.
    """
    if FACTORED == 2:
        start = (tl.program_id(0) * offset.shape[0] + tl.arange(0, offset.shape[0])[:, None, None]) * BLOCK
        row = start // cols
        h = tl.load(h_ptr + row, mask=start < count * BLOCK, other=0.0)
        column = (start - row * cols) + tl.arange(0, offset.shape[1])[None, :, None]
        return h * tl.load(cols_ptr + (row // rows) * cols + column, mask=exists, other=0.0)
    if FACTORED:
        row = offset // cols
        column = offset - row * cols
        h = tl.load(h_ptr + row, mask=exists, other=0.0)
        return h * tl.load(cols_ptr + (row // rows) * cols + column, mask=exists, other=0.0)
    return tl.load(h_ptr + offset, mask=exists, other=0.0).to(tl.float32)


@template
def at_amax(w, amax, exists, total, count, ts):
    """``total``, the derivative by each block's scale, moved to its ``count`` absmax elements: ``total ds/dw``."""
    follows = amax >= smallest_amax(ts)
    share = tl.where(follows, tl.div_rn(total, Q_MAX * count), 0.0)
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
    sums_ptr,  # [2, blocks]: of h dv/ds, and absmax elements, of blocks longer than a tile
    grad_ptr,
    count,
    pieces,
    length,
    inner,
    rows,
    cols,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    FLAT: tl.constexpr,
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
):
    ROWS: tl.constexpr = SIZE // (PAD * INNER)
    offset, exists, like = places(count, pieces, length, inner, BLOCK, PAD, ROWS, INNER, FLAT)
    w = tl.load(w_ptr + offset, mask=exists, other=0.0).to(tl.float32)
    like = like * 0 if SHARED else like
    amax = tl.max(tl.abs(w), 1, keep_dims=True) if WHOLE else tl.load(amax_ptr + like)
    ts = tensor_scale(tl.load(amax_ptr)) if TWO_LEVEL else 1.0
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
        u = uniforms(tl.load(seed_ptr), offset, FLAT and PAD == BLOCK and BLOCK % 4 == 0)
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
        h = curvature(h_ptr, cols_ptr, offset, exists, count, rows, cols, BLOCK, FACTORED)
        by_w, by_s = variance_slopes(z, lo, hi, third)
        if WHOLE:
            total = tl.sum(h * by_s, 1, keep_dims=True)
            at = tl.sum((exists & (tl.abs(w) == amax)).to(tl.float32), 1, keep_dims=True)
        else:
            total = tl.load(sums_ptr + like)
            at = tl.load(sums_ptr + (1 if SHARED else (count // pieces) * inner) + like)
        term = h * by_w * s + at_amax(w, amax, exists, s * total, tl.maximum(at, 1.0), ts)
        grad = tl.load(grad_ptr + offset, mask=exists, other=0.0).to(tl.float32) + tl.load(factor_ptr) * term
        tl.store(grad_ptr + offset, grad.to(grad_ptr.dtype.element_ty), mask=exists)


@template
def sums_kernel(
    w_ptr,
    amax_ptr,
    h_ptr,
    cols_ptr,
    parts_ptr,  # [2, count, inner]
    count,
    pieces,
    length,
    inner,
    rows,
    cols,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    FLAT: tl.constexpr,
    SHARED: tl.constexpr,
    FACTORED: tl.constexpr,
    INNER: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Each piece's part of its long block's sum of ``h dv/ds``, and how many absmax elements it holds."""
    ROWS: tl.constexpr = SIZE // (PAD * INNER)
    offset, exists, like = places(count, pieces, length, inner, BLOCK, PAD, ROWS, INNER, FLAT)
    w = tl.load(w_ptr + offset, mask=exists, other=0.0).to(tl.float32)
    amax = tl.load(amax_ptr + (like * 0 if SHARED else like))
    one_over_p, m, r, t = inverse(block_scale(amax, 1.0))
    z = quotient(w, one_over_p, m, r, t)
    lo, hi = neighbours(z)
    _, by_s = variance_slopes(clamp(z), lo, hi, third_level(z, lo, hi))
    h = curvature(h_ptr, cols_ptr, offset, exists, count, rows, cols, BLOCK, FACTORED)
    piece = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.program_id(1) * INNER + tl.arange(0, INNER)[None, :]
    to = piece * inner + i
    kept = (piece < count) & (i < inner)
    tl.store(parts_ptr + to, tl.sum(h * by_s, 1), mask=kept)
    tl.store(parts_ptr + count * inner + to, tl.sum((exists & (tl.abs(w) == amax)).to(tl.float32), 1), mask=kept)


# ----------------------------------------------------------------------------------------------------------- launching

CONFIGS = tuple(Config({"SIZE": size}, num_warps=warps) for size, warps in ((4096, 4), (2048, 4), (8192, 4), (8192, 8)))


@dataclass(frozen=True)
class View:
    """A contiguous weight as the kernel sees it, ``[outer, length, inner]`` in pieces along ``length``.

    Args:
        outer, length, inner: its dimensions before, along and after the blocks' axis.
        block: elements of a piece: a block, or as much of a long one as a tile holds.
        whole: whether a piece is a whole block.
        shared: whether one scale serves the tensor.
    """

    outer: int
    length: int
    inner: int
    block: int
    whole: bool
    shared: bool

    @staticmethod
    def of(shape: Sequence[int], fmt: Format, axis: int) -> View:
        """How the kernel sees a contiguous weight of this shape."""
        if fmt.block == "tensor":
            return View(1, math.prod(shape), 1, LONGEST, False, True)
        axis = axis % len(shape)
        block = fmt.block if isinstance(fmt.block, int) else shape[axis]
        whole = isinstance(fmt.block, int) and block <= LONGEST
        dims = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
        return View(*dims, block if whole else min(LONGEST, triton.next_power_of_2(shape[axis])), whole, False)

    @property
    def pieces(self) -> int:
        """Along ``length``; the last may be short."""
        return -(-self.length // self.block)

    @property
    def count(self) -> int:
        return self.outer * self.pieces

    @property
    def scales(self) -> int:
        """Blocks that are longer than a tile."""
        return 1 if self.shared else self.outer * self.inner

    @property
    def arguments(self) -> dict[str, int]:
        return {"count": self.count, "pieces": self.pieces, "length": self.length, "inner": self.inner}

    @property
    def constants(self) -> dict[str, Any]:
        pad = triton.next_power_of_2(self.block)
        return {
            "BLOCK": self.block,
            "PAD": pad,
            "FLAT": self.inner == 1 and self.length % self.block == 0,
            "SHARED": self.shared,
            "INNER": min(triton.next_power_of_2(self.inner), 64, max(1, 2048 // pad)),
        }

    def grid(self, size: int) -> tuple[int, int]:
        """Programs of ``size`` elements each."""
        pad, inner = self.constants["PAD"], self.constants["INNER"]
        return triton.cdiv(self.count, size // (pad * inner)), triton.cdiv(self.inner, inner)


def supports(w: Tensor, fmt: Format) -> bool:
    """Whether the kernel takes this weight: at most float32, not empty, 32-bit offsets, no block cut by a tile."""
    short = not isinstance(fmt.block, int) or fmt.block <= LONGEST
    return short and w.dtype in (torch.float32, torch.bfloat16, torch.float16) and 0 < w.numel() < 2**31


def amaxes(w: Tensor, fmt: Format, axis: int) -> Tensor | None:
    """The absmaxes that the kernel must be given: float32, of the tensor or of each channel; None where of neither."""
    if fmt.law.two_level or fmt.block == "tensor":
        return torch.linalg.vector_norm(w, torch.inf, dtype=torch.float32)
    return torch.linalg.vector_norm(w, torch.inf, dim=axis, dtype=torch.float32) if fmt.block == "channel" else None


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
    e2m1_cvt: bool = False,
    config: Config = CONFIGS[0],
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> None:
    """Runs the kernel where the tensors are.

    Args:
        w: float32, bfloat16 or float16, contiguous.
        fmt, axis, law: as in `lotion_fx.rounding`.
        amax: what `amaxes` gives; made here if None.
        seed: 0-d int64, for ``out.rr``.
        curvature: for ``out.grad``.
        e2m1_cvt: whether the device has the E2M1 conversion.
        config: the tile.
        wrap: `torch.library.wrap_triton` inside a `triton_op`.
    """
    view, size = View.of(w.shape, fmt, axis), config.constants["SIZE"]
    amax = amaxes(w, fmt, axis) if amax is None else amax.to(torch.float32)
    options = {"SIZE": size, "num_warps": config.num_warps, "num_stages": config.num_stages}
    common = {**view.arguments, **view.constants, **_curvature_arguments(view, w.numel(), curvature)}
    sums = None
    if out.grad is not None and not view.whole:
        parts = w.new_empty((2, view.outer, view.pieces, view.inner), dtype=torch.float32)
        kernel = wrap(specialized(sums_kernel, fmt, law))
        kernel[view.grid(size)](w_ptr=w, amax_ptr=amax, parts_ptr=parts, **common, **options)
        sums = parts.sum((1, 2, 3) if view.shared else 2)
    kernel = wrap(specialized(smooth_kernel, fmt, law))
    kernel[view.grid(size)](
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
        WHOLE=view.whole,
        RTN=out.rtn is not None,
        RR=out.rr is not None,
        VARIANCE=out.variance is not None,
        TERM=out.grad is not None,
        E2M1_CVT=e2m1_cvt and fmt.grid == E2M1_GRID,
        **options,
    )


E2M1_GRID = resolve("fp4").grid


def _curvature_arguments(view: View, elements: int, curvature: Curvature | None) -> dict[str, Any]:
    if curvature is None or curvature.cols is None:
        h = None if curvature is None else curvature.h
        return {"h_ptr": h, "cols_ptr": None, "rows": 1, "cols": 1, "FACTORED": 0}
    cols = elements // curvature.h.numel()
    in_one_row = view.constants["FLAT"] and cols % view.block == 0
    named = {"h_ptr": curvature.h, "cols_ptr": curvature.cols, "rows": curvature.rows, "cols": cols}
    return {**named, "FACTORED": 2 if in_one_row else 1}
