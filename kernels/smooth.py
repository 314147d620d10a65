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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from lotion_fx.kernels.blocks import at_amax, in_grid_units, third_level
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.device import has_conversion, on_device
from lotion_fx.kernels.device_code import (
    HAS_THIRD,
    TWO_LEVEL,
    clamp,
    draw,
    neighbours,
    specialized,
    template,
    tensor_scale,
    variance,
    variance_slopes,
)
from lotion_fx.kernels.e2m1 import nearest_level
from lotion_fx.kernels.philox import philox, uniforms
from lotion_fx.kernels.places import curvature, factors_along, pieces_of, places, sums_of, tiles_of
from lotion_fx.kernels.tiles import absmax
from lotion_fx.kernels.tuning import launchable
from lotion_fx.kernels.view import ALONG, PIECE, ROWS, View, absent_amaxes, check, configs
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import Format, resolve
from lotion_fx.numerics.noise import RANDOMIZED, NoiseLaw, resolve_noise


@template
def random_level(z, lo, hi, third, u):
    """The level that a uniform number ``u`` in [0, 1) draws."""
    up, beyond = draw(z, lo, hi, third)
    level = tl.where(u * (hi - lo) < up, hi, lo)
    if HAS_THIRD:
        level = tl.where((1 - u) * (hi - lo) < beyond, third, level)
    return level


# `amax_ptr`: of the tensor, or of each block where a tile does not hold one; None elsewhere. `sums_ptr`: [blocks, 2],
# of h dv/ds, and absmax elements, of blocks longer than a tile. SHARED: one scale for the tensor. SIZE: elements of a
# tile. TILES: of a program.
@template
def smooth_kernel(
    w_ptr, amax_ptr, seed_ptr, rtn_ptr, rr_ptr, variance_ptr, h_ptr, cols_ptr, factor_ptr, sums_ptr, grad_ptr,
    count, pieces, length, inner, line, rows, cols,
    BLOCK: tl.constexpr, PAD: tl.constexpr, FLAT: tl.constexpr, FOURS: tl.constexpr, WHOLE: tl.constexpr,
    SHARED: tl.constexpr, RTN: tl.constexpr, RR: tl.constexpr, VARIANCE: tl.constexpr, TERM: tl.constexpr,
    FACTORED: tl.constexpr, E2M1_CVT: tl.constexpr, INNER: tl.constexpr, SIZE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
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
        z, _stored, s = in_grid_units(w, amax, ts)
        if RTN:
            rtn = nearest_level(z, E2M1_CVT) * s
            tl.store(rtn_ptr + offset, rtn.to(rtn_ptr.dtype.element_ty), mask=exists)
        if RR or VARIANCE or TERM:
            lo, hi = neighbours(z)
            third = third_level(z, lo, hi)
        if RR:
            rr = random_level(z, lo, hi, third, uniforms(seed, offset, FOURS)) * s
            tl.store(rr_ptr + offset, rr.to(rr_ptr.dtype.element_ty), mask=exists)
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


# Each piece's part of its long block's sum of ``h dv/ds``, and how many absmax elements it holds, to `parts_ptr`
# [count, inner, 2]. TILES of a program: one.
@template
def sums_kernel(
    w_ptr, amax_ptr, h_ptr, cols_ptr, parts_ptr,
    count, pieces, length, inner, line, rows, cols,
    BLOCK: tl.constexpr, PAD: tl.constexpr, FLAT: tl.constexpr, SHARED: tl.constexpr, FACTORED: tl.constexpr,
    INNER: tl.constexpr, SIZE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = SIZE // (PAD * INNER)
    tile, _ = tiles_of(count, line, inner, ROWS, INNER, TILES, FACTORED)
    first, last, number = pieces_of(tile, count, line, inner, ROWS, INNER, FACTORED)
    offset, exists, like, known = places(tile, first, last, pieces, length, inner, BLOCK, PAD, ROWS, INNER, FLAT)
    along = 0.0
    if FACTORED == ALONG:
        along = factors_along(h_ptr, first, count, pieces, length, BLOCK, PAD, ROWS)
    w = tl.load(w_ptr + offset, mask=exists, other=0.0).to(tl.float32)
    amax = tl.load(amax_ptr + (like * 0 if SHARED else like), mask=known, other=1.0)
    z, _, _ = in_grid_units(w, amax, 1.0)
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
    """Candidates for rows that a tile holds as a whole: 32 or 64 elements a thread."""
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
    common = {"w_ptr": w, "amax_ptr": amax, "h_ptr": h, "cols_ptr": by_column, **view.arguments, **view.constants}
    needs_sums = out.grad is not None and not view.whole
    sums = _sums(w, view, specialized(sums_kernel, fmt, law), common, arch, wrap) if needs_sums else None
    kernel, tile = launchable(
        specialized(smooth_kernel, fmt, law),
        _name(out),
        view.shape_class,
        arch,
        CANDIDATES[view.shape_class],
        key=("count", "inner"),
        writes=("grad_ptr",) if out.grad is not None else (),
    )
    wrap(kernel)[lambda meta: (view.programs(meta),)](
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


def _sums(
    w: Tensor, view: View, kernel: Any, common: Mapping[str, Any], arch: int, wrap: Callable[[Any], Any]
) -> Tensor:
    """Sums of ``h dv/ds`` and absmax elements, float32 [blocks, 2], of blocks that are longer than a tile."""
    parts = w.new_empty((view.outer, view.pieces, view.inner, 2), dtype=torch.float32)
    kernel, tile = launchable(kernel, "smooth/sums", view.shape_class, arch, SUMS, key=("count", "inner"))
    wrap(kernel)[lambda meta: (view.programs(meta),)](parts_ptr=parts, **common, **tile)
    return parts.sum((0, 1, 2) if view.shared else 1)


def _name(out: Outputs) -> str:
    """The kernel's name in tables: of the costliest of its results."""
    asked = {"term": out.grad, "rr": out.rr, "variance": out.variance, "rtn": out.rtn}
    return f"smooth/{next(name for name, tensor in asked.items() if tensor is not None)}"


def _matrix(w: Tensor, curvature: Curvature | None) -> tuple[int, int]:
    """Rows and columns of each group of a factored curvature; 0 without."""
    if curvature is None or curvature.cols is None:
        return 0, 0
    return curvature.rows, w.numel() // curvature.h.numel()


# ------------------------------------------------------------------------------------------------------------ operators


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
    with on_device(w.device) as arch:
        launch(w, format, axis, out, law=law, amax=amax, seed=seed, arch=arch, wrap=wrap_triton)
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
    with on_device(w.device) as arch:
        out, how = Outputs(grad=grad), {"arch": arch, "wrap": wrap_triton}
        launch(w.contiguous(), format, axis, out, law=law, amax=amax, curvature=curvature, **how)  # type: ignore[arg-type]
