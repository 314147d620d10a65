"""A weight to packed codes and scales, the layout that is deployed, in one pass.

Blocks run along the last axis. ``codes`` are the bits of `Grid.encode`: two 4-bit codes to a byte, the even element in
the low half, where a code has 4 bits or fewer, else one to a byte. ``scales`` are what the scale law stores for each
block: the code of an E4M3 or E8M0 scale, a byte, or a float32. A two-level format has its tensor's scale beside.

    codes = encode(nearest(w / s))        unpack: s decode(codes) = rtn(w), bit for bit

Layout: ``weight_packed`` and ``weight_scale`` of compressed-tensors and ModelOpt checkpoints (NVFP4, MXFP4), row-major.
On Blackwell two E2M1 codes come from one ``cvt.rn.satfinite.e2m1x2.f32``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from lotion_fx.kernels.blocks import in_grid_units
from lotion_fx.kernels.device import has_conversion, on_device
from lotion_fx.kernels.device_code import (
    TWO_LEVEL,
    encode,
    encode_scale,
    nearest,
    specialized,
    template,
    tensor_scale,
)
from lotion_fx.kernels.e2m1 import nearest_pair
from lotion_fx.kernels.packed import Packed, check_format, in_pairs, reference
from lotion_fx.kernels.tiles import absmax
from lotion_fx.kernels.tuning import launchable
from lotion_fx.kernels.view import PIECE, ROWS, View, absent_amaxes, amaxes, check, configs
from lotion_fx.numerics.formats import Format, resolve


# `amax_ptr`: of the tensor or of each long channel; None where a block's is found here. FLAT: pieces follow each other
# in memory. WHOLE: a piece is a block. SHARED: one scale for the tensor. PAIRS: two codes to a byte.
@template
def pack_kernel(
    w_ptr, amax_ptr, codes_ptr, scales_ptr, count, pieces, length,
    BLOCK: tl.constexpr, PAD: tl.constexpr, FLAT: tl.constexpr, WHOLE: tl.constexpr, SHARED: tl.constexpr,
    PAIRS: tl.constexpr, E2M1_CVT: tl.constexpr, SIZE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = SIZE // PAD
    ts = tensor_scale(tl.load(amax_ptr)) if TWO_LEVEL else 1.0
    if SHARED:
        amax = tl.load(amax_ptr + tl.zeros((1, 1), tl.int32))
    begin = tl.program_id(0) * TILES
    for tile in range(begin, tl.minimum(begin + TILES, tl.cdiv(count, ROWS))):
        piece = tile * ROWS + tl.arange(0, ROWS)[:, None]
        k = tl.arange(0, PAD)[None, :]
        row = piece // pieces
        at = (piece - row * pieces) * BLOCK + k
        exists = (piece < count) & (k < BLOCK)
        if not FLAT:
            exists = exists & (at < length)
        offset = piece * BLOCK + k if FLAT else row * length + at
        w = tl.load(w_ptr + offset, mask=exists, other=0.0).to(tl.float32)
        if WHOLE:
            amax = absmax(w)
        elif not SHARED:
            amax = tl.load(amax_ptr + row, mask=piece < count, other=1.0)
        z, stored, _ = in_grid_units(w, amax, ts)
        if PAIRS:
            even, odd = tl.split(tl.reshape(z, (ROWS, PAD // 2, 2)))
            byte = nearest_pair(even, odd, E2M1_CVT)
            if FLAT and PAD == BLOCK:  # one run of bytes, whose stores may be wider than a block's codes
                run = tile * (SIZE // 2) + tl.arange(0, SIZE // 2)
                tl.store(codes_ptr + run, tl.reshape(byte, (SIZE // 2,)), mask=run < count * (BLOCK // 2))
            else:
                k2 = tl.arange(0, PAD // 2)[None, :]
                width = (length + 1) // 2
                at2 = (piece - row * pieces) * (BLOCK // 2) + k2
                here = (piece < count) & (k2 < (BLOCK + 1) // 2) & (at2 < width)
                tl.store(codes_ptr + row * width + at2, byte, mask=here)
        else:
            tl.store(codes_ptr + offset, encode(nearest(z)), mask=exists)
        if WHOLE:  # from one dimension, where neighbouring scales can be stored together
            place = tile * ROWS + tl.arange(0, ROWS)
            tl.store(scales_ptr + place, tl.reshape(encode_scale(stored), (ROWS,)), mask=place < count)


def pack(w: Tensor, fmt: str | Format) -> Packed:
    """Rounds a weight to nearest and packs it: what `unpack` gives back is `rounding.rtn(w)`, bit for bit.

    Args:
        w: float32, bfloat16 or float16, [..., K], blocks along K.
        fmt: a format or its name.

    Raises:
        ValueError: two codes of a byte would lie in two blocks; or the format's name is not its own.
    """
    format = resolve(fmt)
    check_format(format)
    amax = amaxes(w, format, -1) if format.law.two_level else None
    codes, scales = torch.ops.lotion_fx.pack(w, format.name, amax)
    return Packed(codes, scales, None if amax is None else format.law.tensor_scale(amax, format.grid))


@triton_op("lotion_fx::pack", mutates_args=())
def pack_op(w: Tensor, fmt: str, amax: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight; see `pack`.

    Args:
        w: [..., K].
        fmt: the format's name.
        amax: what `view.amaxes` gives.
    """
    format = resolve(fmt)
    if w.device.type == "cpu":
        return reference(w, format, amax)
    check(w, format)
    with on_device(w.device) as arch:
        return launch(w.contiguous(), format, amax, arch=arch, wrap=wrap_triton)


def launch(
    w: Tensor, fmt: Format, amax: Tensor | None, *, arch: int, wrap: Callable[[Any], Any] = lambda kernel: kernel
) -> tuple[Tensor, Tensor]:
    """Runs the kernel where the tensors are.

    Args:
        w: float32, bfloat16 or float16, [..., K], contiguous.
        fmt: the format.
        amax: what `view.amaxes` gives.
        arch: compute capability of the device.
        wrap: `torch.library.wrap_triton` inside a `triton_op`.
    """
    view, pairs = view_of(w.shape, fmt), in_pairs(fmt)
    amax = absent_amaxes(w, view, fmt, -1, amax)
    width = (w.shape[-1] + 1) // 2 if pairs else w.shape[-1]
    codes = w.new_empty((*w.shape[:-1], width), dtype=torch.uint8)
    if view.whole:
        dtype = torch.uint8 if hasattr(fmt.law, "type") else torch.float32
        scales = w.new_empty((*w.shape[:-1], view.pieces), dtype=dtype)
    else:
        assert amax is not None
        scales = fmt.law.block_scale(amax, fmt.grid).reshape(1 if view.shared else (*w.shape[:-1], 1))
        scales = fmt.law.type.encode(scales) if hasattr(fmt.law, "type") else scales
    kernel, tile = launchable(
        specialized(pack_kernel, fmt), "pack", view.shape_class, arch, CANDIDATES[view.shape_class], key=("count",)
    )
    wrap(kernel)[lambda meta: (view.programs(meta),)](
        w_ptr=w,
        amax_ptr=amax,
        codes_ptr=codes,
        scales_ptr=scales if view.whole else None,
        **arguments(view),
        **constants(view, fmt, arch),
        **tile,
    )
    return codes, scales


# By shape class. Two codes to a byte: 64 weights of a thread are two stores of 16 bytes.
CANDIDATES = {
    "flat": configs((4096, 16, 2), (4096, 32, 2)),
    **{
        f"rows/{pad}": configs(*((max(pad, 2048), tiles, max(pad, 2048) // 2048) for tiles in (1, 2, 4)))
        for pad in ROWS
    },
    "long": configs((PIECE, 4, 1), (PIECE, 8, 1)),
}


def view_of(shape: Sequence[int], fmt: Format) -> View:
    """The weight as `smooth` sees it; a "tensor" format's always as rows, for a byte must not hold codes of two."""
    view = View.of(shape, fmt, -1)
    rows, length = math.prod(shape[:-1]), shape[-1]
    return View(rows, length, 1, min(length, PIECE), False, True) if view.shared else view


def arguments(view: View) -> dict[str, int]:
    """The kernel's integers, of `View.arguments`."""
    return {name: view.arguments[name] for name in ("count", "pieces", "length")}


def constants(view: View, fmt: Format, arch: int) -> dict[str, Any]:
    """The kernel's ``tl.constexpr`` arguments that the view, the format and the architecture decide."""
    own = {name: view.constants[name] for name in ("BLOCK", "PAD", "FLAT", "SHARED")}
    pairs = in_pairs(fmt)
    return {**own, "WHOLE": view.whole, "PAIRS": pairs, "E2M1_CVT": pairs and has_conversion(fmt, arch)}
