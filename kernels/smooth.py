"""Quantize and smooth a weight in one pass: block scale, neighbours, and whichever of four results are asked for.

With ``s`` a block's scale, ``z = w / s`` and ``lo <= z <= hi`` the levels around it, as in `lotion_fx.rounding`:

    rtn        s nearest(z)
    rr         s hi if u < P(hi), else s lo                      u from Philox, counted by the element's index
    variance   s^2 v(z), for randomized rounding (w - s lo)(s hi - w)
    term       grad += f d/dw <h, variance>, the scale's own part at the block's absmax elements included

Each weight is read once and each result written once. A tensor's scale, and the scales of blocks longer than a tile
("channel", "tensor"), need the absmax first: one reduction, which the caller can keep. The term of such blocks takes a
second read, for the sum over the block comes before its absmax element's gradient.

A weight is seen as ``[outer, length, inner]`` with blocks along ``length``; a tile holds some blocks and ``INNER``
columns. On Blackwell E2M1 levels come from ``cvt.rn.satfinite.e2m1x2.f32``, elsewhere from the exponent's bits; a scale
is never an fp8 type. ``cvt.rs``, Blackwell's stochastic rounding, is not used: the random bits that it takes resolve a
probability too coarsely to be exact to the law (docs/kernels.md).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from lotion_fx import rounding
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
from lotion_fx.kernels.targets import nearest as target
from lotion_fx.kernels.tuning import launchable
from lotion_fx.kernels.work import Config, Work
from lotion_fx.noise import RANDOMIZED, NoiseLaw, resolve_noise

LONGEST = 1024  # elements of a block that a tile can hold

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
    first,
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
    """Where the tile [ROWS, PAD, INNER] from piece ``first`` on lies.

    There are ``count`` pieces of ``BLOCK`` elements, ``pieces`` of them along ``length``; FLAT where they follow each
    other in memory. Gives the elements' offsets, which of them exist, each row's place in [outer, inner], which exist.
    """
    piece = first + tl.arange(0, ROWS)[:, None, None]
    k = tl.arange(0, PAD)[None, :, None]
    exists = piece < count
    if PAD != BLOCK:
        exists = exists & (k < BLOCK)
    if FLAT:
        return piece * BLOCK + k, exists & (k >= 0), piece // pieces, piece < count
    i = tl.program_id(0) % tl.cdiv(inner, INNER) * INNER + tl.arange(0, INNER)[None, None, :]
    at = (piece % pieces) * BLOCK + k
    row = piece // pieces
    known = (piece < count) & (i < inner)
    return (row * length + at) * inner + i, exists & known & (at < length), row * inner + i, known


@triton.jit
def curvature(h_ptr, cols_ptr, offset, exists, first, count, rows, cols, BLOCK: tl.constexpr, FACTORED: tl.constexpr):
    """h at each element, 0 outside: dense, or the product of its row's and its column's factor.

    FACTORED is 2 where a block lies in one row, so that a row is found once a block; 1 elsewhere; 0 if dense.
    """
    if FACTORED == 2:
        start = (first + tl.arange(0, offset.shape[0])[:, None, None]) * BLOCK
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
    TILES: tl.constexpr,  # of a program
):
    ROWS: tl.constexpr = SIZE // (PAD * INNER)
    ts = tensor_scale(tl.load(amax_ptr)) if TWO_LEVEL else 1.0
    seed = tl.load(seed_ptr) if RR else 0
    factor = tl.load(factor_ptr) if TERM else 1.0
    across = tl.cdiv(inner, INNER)
    for tile in range(TILES):
        first = (tl.program_id(0) // across * TILES + tile) * ROWS
        offset, exists, like, known = places(first, count, pieces, length, inner, BLOCK, PAD, ROWS, INNER, FLAT)
        w = tl.load(w_ptr + offset, mask=exists, other=0.0).to(tl.float32)
        like = like * 0 if SHARED else like
        amax = tl.max(tl.abs(w), 1, keep_dims=True) if WHOLE else tl.load(amax_ptr + like, mask=known, other=1.0)
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
            u = uniforms(seed, offset, FLAT and PAD == BLOCK and BLOCK % 4 == 0)
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
            h = curvature(h_ptr, cols_ptr, offset, exists, first, count, rows, cols, BLOCK, FACTORED)
            by_w, by_s = variance_slopes(z, lo, hi, third)
            if WHOLE:
                total = tl.sum(h * by_s, 1, keep_dims=True)
                at = tl.sum((exists & (tl.abs(w) == amax)).to(tl.float32), 1, keep_dims=True)
            else:
                total = tl.load(sums_ptr + like, mask=known, other=0.0)
                at = tl.load(sums_ptr + (1 if SHARED else (count // pieces) * inner) + like, mask=known, other=1.0)
            term = h * by_w * s + at_amax(w, amax, exists, s * total, tl.maximum(at, 1.0), ts)
            grad = tl.load(grad_ptr + offset, mask=exists, other=0.0).to(tl.float32) + factor * term
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
    first = tl.program_id(0) // tl.cdiv(inner, INNER) * ROWS
    offset, exists, like, known = places(first, count, pieces, length, inner, BLOCK, PAD, ROWS, INNER, FLAT)
    w = tl.load(w_ptr + offset, mask=exists, other=0.0).to(tl.float32)
    amax = tl.load(amax_ptr + (like * 0 if SHARED else like), mask=known, other=1.0)
    one_over_p, m, r, t = inverse(block_scale(amax, 1.0))
    z = quotient(w, one_over_p, m, r, t)
    lo, hi = neighbours(z)
    _, by_s = variance_slopes(clamp(z), lo, hi, third_level(z, lo, hi))
    h = curvature(h_ptr, cols_ptr, offset, exists, first, count, rows, cols, BLOCK, FACTORED)
    piece = first + tl.arange(0, ROWS)[:, None]
    i = tl.program_id(0) % tl.cdiv(inner, INNER) * INNER + tl.arange(0, INNER)[None, :]
    to = piece * inner + i
    kept = (piece < count) & (i < inner)
    tl.store(parts_ptr + to, tl.sum(h * by_s, 1), mask=kept)
    tl.store(parts_ptr + count * inner + to, tl.sum((exists & (tl.abs(w) == amax)).to(tl.float32), 1), mask=kept)


# ----------------------------------------------------------------------------------------------------------- launching


def _configs(*sizes: tuple[int, int, int]) -> tuple[Config, ...]:
    return tuple(Config({"SIZE": size, "TILES": tiles}, num_warps=warps) for size, tiles, warps in sizes)


# By shape class. A program takes several tiles, so that what they share is loaded and computed once. Where a block's
# elements lie a row apart ("strided") a warp takes many columns and finds the absmax in its own registers.
CANDIDATES = {
    "flat": _configs((1024, 8, 2), (1024, 16, 2), (2048, 8, 4), (2048, 16, 4)),
    "long": _configs((4096, 2, 2), (4096, 4, 2), (4096, 4, 4)),
    "strided": _configs((2048, 4, 2), (2048, 1, 2)),
}


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
            return View(1, math.prod(shape), 1, _piece(math.prod(shape), 1), False, True)
        axis = axis % len(shape)
        block = fmt.block if isinstance(fmt.block, int) else shape[axis]
        whole = isinstance(fmt.block, int) and block <= LONGEST
        dims = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
        return View(*dims, block if whole else _piece(shape[axis], dims[2]), whole, False)

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
            "INNER": min(triton.next_power_of_2(self.inner), max(1, 2048 // pad)),
        }

    @property
    def shape_class(self) -> str:
        """The kind of shape for which one config is chosen."""
        return "strided" if self.inner > 1 else "flat" if self.whole else "long"

    def grid(self, meta: Mapping[str, int]) -> tuple[int]:
        """Programs of ``meta["TILES"]`` tiles of ``meta["SIZE"]`` elements each."""
        pad, inner = self.constants["PAD"], self.constants["INNER"]
        # One dimension, for a second one ends at 65535.
        return (
            triton.cdiv(self.count, meta["TILES"] * (meta["SIZE"] // (pad * inner))) * triton.cdiv(self.inner, inner),
        )


def _piece(length: int, inner: int) -> int:
    """How much of a long block a tile holds: a power of two that leaves no rest, unless it were tiny.

    Little of one whose elements lie a row apart, so that the tile has many columns.
    """
    dividing = length & -length
    return 16 if inner > 1 else 1024 if dividing < 128 else min(dividing, 4096)


def supports(w: Tensor, fmt: Format) -> bool:
    """Whether the kernel takes this weight: at most float32, not empty, 32-bit offsets, no block cut by a tile."""
    short = fmt.block <= LONGEST if isinstance(fmt.block, int) else not fmt.law.two_level
    return short and w.dtype in (torch.float32, torch.bfloat16, torch.float16) and 0 < w.numel() <= 2**31 - 2**20


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
    view = View.of(w.shape, fmt, axis)
    amax = amaxes(w, fmt, axis) if amax is None else amax.to(torch.float32)
    common = {**view.arguments, **view.constants, **_curvature_arguments(view, w.numel(), curvature)}
    name, sums = _name(out), None
    if out.grad is not None and not view.whole:
        parts = w.new_empty((2, view.outer, view.pieces, view.inner), dtype=torch.float32)
        kernel = wrap(specialized(sums_kernel, fmt, law))
        size = max(2048, view.constants["PAD"])
        kernel[view.grid({"SIZE": size, "TILES": 1})](w_ptr=w, amax_ptr=amax, parts_ptr=parts, SIZE=size, **common)
        sums = parts.sum((1, 2, 3) if view.shared else 2)
    kernel, tile = launchable(
        specialized(smooth_kernel, fmt, law),
        name,
        view.shape_class,
        arch,
        CANDIDATES[view.shape_class],
        key=("count", "inner"),
        writes=("grad_ptr",) if out.grad is not None else (),
    )
    wrap(kernel)[view.grid](
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


def _curvature_arguments(view: View, elements: int, curvature: Curvature | None) -> dict[str, Any]:
    if curvature is None or curvature.cols is None:
        h = None if curvature is None else curvature.h
        return {"h_ptr": h, "cols_ptr": None, "rows": 1, "cols": 1, "FACTORED": 0}
    cols = elements // curvature.h.numel()
    in_one_row = view.constants["FLAT"] and cols % view.block == 0
    named = {"h_ptr": curvature.h, "cols_ptr": curvature.cols, "rows": curvature.rows, "cols": cols}
    return {**named, "FACTORED": 2 if in_one_row else 1}


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


def check(w: Tensor, fmt: Format) -> None:
    """Refuses what `supports` says no to."""
    if not supports(w, fmt):
        raise ValueError(
            f"w: {w.dtype} of shape {tuple(w.shape)} in {fmt.name} (blocks of {fmt.block}) is not for the kernel; "
            f"expected 1 to 2^31 - 2^20 elements of float32, bfloat16 or float16, and blocks of at most {LONGEST}, "
            "'channel' or 'tensor'"
        )


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
    return [*found, _work(arch, (8 * 4096, 6144), -1, "nvfp4", "rtn", "bf16")]


def traffic(view: View, fmt: Format, result: str, dtype: str, *, factored: bool) -> int:
    """Bytes that the kernel moves for a weight: each input once and each output once.

    Args:
        view, fmt: the weight.
        result: ``"rtn"``, ``"rr"``, ``"variance"`` or ``"term"``.
        dtype: of the weight and of the result, ``"bf16"`` or ``"fp32"``; gradients and curvature are float32.
        factored: whether the curvature is.
    """
    elements, size = view.outer * view.length * view.inner, {"bf16": 2, "fp32": 4}[dtype]
    amax = 4 if fmt.law.two_level else 0 if view.whole else 4 * view.scales
    if result != "term":
        return elements * (size + (4 if result == "variance" else size)) + amax + (8 if result == "rr" else 0)
    h = 4 * (view.outer + view.length * view.inner) if factored else 4 * elements
    return elements * (size + 8) + h + 4 + amax + (0 if view.whole else 8 * view.scales)


def _work(arch: int, shape: tuple[int, ...], axis: int, name: str, result: str, dtype: str) -> Work:
    fmt = resolve(name)
    view, term = View.of(shape, fmt, axis), result == "term"
    pointers = {"w_ptr": f"*{dtype}", "amax_ptr": "*fp32" if fmt.law.two_level or not view.whole else None}
    if term:
        pointers |= {"grad_ptr": "*fp32", "h_ptr": "*fp32", "cols_ptr": "*fp32", "factor_ptr": "*fp32"}
        pointers["sums_ptr"] = None if view.whole else "*fp32"
    else:
        made = "*fp32" if result == "variance" else f"*{dtype}"
        pointers |= {f"{result}_ptr": made, "seed_ptr": "*i64" if result == "rr" else None}
    moved = traffic(view, fmt, result, dtype, factored=term)
    names = ("w", "amax", "seed", "rtn", "rr", "variance", "h", "cols", "factor", "sums", "grad")
    absent = {f"{name}_ptr": None for name in names if pointers.get(f"{name}_ptr") is None}
    integers = dict.fromkeys(("count", "pieces", "length", "inner", "rows", "cols"), "i32")
    return Work(
        kernel=f"smooth/{result}",
        shape=f"{'x'.join(map(str, shape))} {dtype} {name}" + (f" axis {axis}" if axis != -1 else ""),
        fn=specialized(smooth_kernel, fmt),
        signature={**{key: value for key, value in pointers.items() if value}, **integers},
        constants={
            **absent,
            **view.constants,
            "WHOLE": view.whole,
            "FACTORED": 2 if term and view.constants["FLAT"] else int(term),
            "E2M1_CVT": has_conversion(fmt, arch),
            **{key: result == key.lower() for key in ("RTN", "RR", "VARIANCE", "TERM")},
        },
        configs=CANDIDATES[view.shape_class],
        programs=lambda config: math.prod(view.grid(config.constants)),
        bytes=lambda config: moved,
        minimum_bytes=moved,
        iterations=lambda config: config.constants["TILES"],
        requires={100: ("F2FP.SATFINITE.E2M1",), 103: ("F2FP.SATFINITE.E2M1",), 120: ("F2FP.SATFINITE.E2M1",)}
        if has_conversion(fmt, 100) and result == "rtn"
        else {},
        aligned=tuple(integers),
        shape_class=view.shape_class,
    )
