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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from lotion_fx.kernels.device_code import (
    TWO_LEVEL,
    block_scale,
    encode,
    encode_scale,
    nearest,
    specialized,
    template,
    tensor_scale,
)
from lotion_fx.kernels.division import inverse, quotient
from lotion_fx.kernels.smooth import MODELS, arch_of, has_conversion, on_device
from lotion_fx.kernels.tiles import absmax
from lotion_fx.kernels.tuning import launchable
from lotion_fx.kernels.view import PIECE, ROWS, View, absent_amaxes, amaxes, check, configs
from lotion_fx.kernels.work import Work
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import Format, resolve

# Eight float32, four pairs, to four bytes of two E2M1 codes each. A nibble of -0.0 has only its sign bit set: the sum
# carries into the sign bits of the nibbles with a magnitude, and only those keep theirs.
E2M1_PAIRS = tl.constexpr(
    "{ .reg .b8 b0, b1, b2, b3; "
    ".reg .b32 all, low, keep; "
    "cvt.rn.satfinite.e2m1x2.f32 b0, $5, $1; "
    "cvt.rn.satfinite.e2m1x2.f32 b1, $6, $2; "
    "cvt.rn.satfinite.e2m1x2.f32 b2, $7, $3; "
    "cvt.rn.satfinite.e2m1x2.f32 b3, $8, $4; "
    "mov.b32 all, {b0, b1, b2, b3}; "
    "and.b32 low, all, 0x77777777; "
    "add.u32 keep, low, 0x77777777; "
    "or.b32 keep, keep, 0x77777777; "
    "and.b32 $0, all, keep; "
    "}"
)


@template
def pack_kernel(
    w_ptr,
    amax_ptr,  # of the tensor or of each long channel; None where a block's is found here
    codes_ptr,
    scales_ptr,
    count,
    pieces,
    length,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    FLAT: tl.constexpr,  # pieces follow each other in memory
    WHOLE: tl.constexpr,  # a piece is a block
    SHARED: tl.constexpr,  # one scale for the tensor
    PAIRS: tl.constexpr,  # two codes to a byte
    E2M1_CVT: tl.constexpr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
):
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
        stored = block_scale(amax, ts)
        one_over_p, m, r, t = inverse(stored * ts if TWO_LEVEL else stored)
        z = quotient(w, one_over_p, m, r, t)
        if PAIRS:
            even, odd = tl.split(tl.reshape(z, (ROWS, PAD // 2, 2)))
            if E2M1_CVT:
                byte = tl.inline_asm_elementwise(
                    E2M1_PAIRS, "=r,r,r,r,r,r,r,r,r", [even, odd], dtype=tl.uint8, is_pure=True, pack=4
                )
            else:
                byte = encode(nearest(even)) | (encode(nearest(odd)) << 4)
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


class Packed(NamedTuple):
    """A weight [..., K] as it is deployed.

    Args:
        codes: uint8, [..., ceil(K / 2)] for codes of up to 4 bits, else [..., K].
        scales: of each block, [..., blocks], [1] for "tensor"; uint8 codes where the law stores a type, else float32.
        tensor_scale: 0-d float32, which multiplies every scale; None unless the law has two levels.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None


def pack(w: Tensor, fmt: str | Format) -> Packed:
    """Rounds a weight to nearest and packs it: what `unpack` gives back is `rounding.rtn(w)`, bit for bit.

    Args:
        w: float32, bfloat16 or float16, [..., K], blocks along K.
        fmt: a format or its name.

    Raises:
        ValueError: two codes of a byte would lie in two blocks; or the format's name is not its own.
    """
    format = resolve(fmt)
    if _in_pairs(format) and isinstance(format.block, int) and format.block % 2:
        raise ValueError(
            f"fmt={format.name!r}: two codes of a byte would lie in two blocks of {format.block}; use an even block"
        )
    if resolve(format.name) != format:
        raise ValueError(f"fmt={format.name!r}: another format has this name; register_format yours under its own")
    amax = amaxes(w, format, -1) if format.law.two_level else None
    codes, scales = torch.ops.lotion_fx.pack(w, format.name, amax)
    return Packed(codes, scales, None if amax is None else format.law.tensor_scale(amax, format.grid))


def unpack(packed: Packed, fmt: str | Format, length: int) -> Tensor:
    """The float32 weight [..., length] that was packed."""
    format = resolve(fmt)
    codes = packed.codes
    if _in_pairs(format):
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :length]
    type = getattr(format.law, "type", None)
    scales = packed.scales if type is None else type.decode(packed.scales)
    if packed.tensor_scale is not None:
        scales = scales * packed.tensor_scale
    blocks = rounding.to_blocks(format.grid.decode(codes), format)
    return rounding.from_blocks(blocks * scales.unsqueeze(-1), format, -1, codes.shape)


def _in_pairs(fmt: Format) -> bool:
    return fmt.grid.bits <= 4


def reference(w: Tensor, fmt: Format, amax: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales in ATen."""
    known = amax if fmt.law.two_level or fmt.block == "tensor" else None
    scales, tensor_scale = rounding.scale_parts(w, fmt, amax_tensor=known)
    s = scales if tensor_scale is None else scales * tensor_scale
    blocks = rounding.to_blocks(w, fmt).to(torch.float32)
    codes = rounding.from_blocks(fmt.grid.encode(fmt.grid.nearest(blocks / s)), fmt, -1, w.shape)
    if _in_pairs(fmt):
        if codes.shape[-1] % 2:
            zero = fmt.grid.encode(torch.zeros_like(codes[..., :1], dtype=torch.float32))
            codes = torch.cat([codes, zero], -1)
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    type = getattr(fmt.law, "type", None)
    scales = scales.squeeze(-1)
    return codes, scales if type is None else type.encode(scales)


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
    with on_device(w.device):
        return launch(w.contiguous(), format, amax, arch=arch_of(w.device), wrap=wrap_triton)


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
    view, pairs = _view(w.shape, fmt), _in_pairs(fmt)
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
        **_arguments(view),
        **_constants(view, fmt, arch),
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


def _view(shape: Any, fmt: Format) -> View:
    """The weight as `smooth` sees it; a "tensor" format's always as rows, for a byte must not hold codes of two."""
    view = View.of(shape, fmt, -1)
    rows, length = math.prod(shape[:-1]), shape[-1]
    return View(rows, length, 1, min(length, PIECE), False, True) if view.shared else view


def _arguments(view: View) -> dict[str, int]:
    return {name: view.arguments[name] for name in ("count", "pieces", "length")}


def _constants(view: View, fmt: Format, arch: int) -> dict[str, Any]:
    own = {name: view.constants[name] for name in ("BLOCK", "PAD", "FLAT", "SHARED")}
    pairs = _in_pairs(fmt)
    return {**own, "WHOLE": view.whole, "PAIRS": pairs, "E2M1_CVT": pairs and has_conversion(fmt, arch)}


def works(arch: int) -> list[Work]:
    """The kernel on the largest matrix of a 150M, an 8B and a 70B model, bfloat16."""
    return [_work(arch, shape, name) for shape in MODELS.values() for name in ("nvfp4", "mxfp4", "int4", "int8")]


def _work(arch: int, shape: tuple[int, ...], name: str) -> Work:
    fmt, elements = resolve(name), math.prod(shape)
    view = _view(shape, fmt)
    stored = "*u8" if hasattr(fmt.law, "type") else "*fp32"
    needs_amax = fmt.law.two_level or not view.whole
    pointers = {"amax_ptr": "*fp32" if needs_amax else None, "scales_ptr": stored if view.whole else None}
    moved = elements * 2 + elements // (2 if _in_pairs(fmt) else 1)
    moved += view.count * (1 if stored == "*u8" else 4) if view.whole else 4 * view.scales
    e2m1 = {arch: ("F2FP.SATFINITE.E2M1",)} if has_conversion(fmt, arch) else {}
    return Work(
        kernel="pack",
        shape=f"{'x'.join(map(str, shape))} bf16 {name}",
        fn=specialized(pack_kernel, fmt),
        signature={
            "w_ptr": "*bf16",
            "codes_ptr": "*u8",
            **{key: value for key, value in pointers.items() if value},
            **dict.fromkeys(_arguments(view), "i32"),
        },
        constants={**{key: None for key, value in pointers.items() if not value}, **_constants(view, fmt, arch)},
        configs=CANDIDATES[view.shape_class],
        programs=lambda config: view.programs(config.constants),
        bytes=lambda config: moved + (4 if fmt.law.two_level else 0),
        minimum_bytes=moved + (4 if fmt.law.two_level else 0),
        iterations=lambda config: view.tiles(config.constants),
        requires=e2m1,
        aligned=tuple(_arguments(view)),
        shape_class=view.shape_class,
        wide=0.9,
    )
