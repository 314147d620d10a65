"""A weight as it is deployed, for the kernels that make and multiply it: codes, stored scales, the tensor's scale."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import Format, resolve

# Rows of activations up to which a step is a decoding one: the height of a tensor core's tile.
FEW = 16


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


def in_pairs(fmt: Format) -> bool:
    """Whether a byte holds two codes, the even element's in the low half."""
    return fmt.grid.bits <= 4


def cuts_bytes(fmt: Format) -> str:
    """Why codes of a format cannot be packed, two in a byte; empty if they can."""
    if in_pairs(fmt) and isinstance(fmt.block, int) and fmt.block % 2:
        return f"two codes of a byte would lie in two blocks of {fmt.block}; use an even block"
    return ""


def check_format(fmt: Format) -> None:
    """Raises `ValueError` where two codes of a byte would lie in two blocks, or the format's name is not its own."""
    if cut := cuts_bytes(fmt):
        raise ValueError(f"fmt={fmt.name!r}: {cut}")
    if resolve(fmt.name) != fmt:
        raise ValueError(f"fmt={fmt.name!r}: another format has this name; register_format yours under its own")


def pack_in_aten(w: Tensor, fmt: Format) -> Packed:
    """Codes and scales of a weight [..., K], on any device: `pack` without its kernel, and without Triton."""
    check_format(fmt)
    amax = torch.linalg.vector_norm(w, torch.inf, dtype=torch.float32) if fmt.law.two_level else None
    return Packed(*reference(w, fmt, amax), None if amax is None else fmt.law.tensor_scale(amax, fmt.grid))


def reference(w: Tensor, fmt: Format, amax: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales in ATen."""
    known = amax if fmt.law.two_level or fmt.block == "tensor" else None
    scales, tensor_scale = rounding.scale_parts(w, fmt, amax_tensor=known)
    s = scales if tensor_scale is None else scales * tensor_scale
    blocks = rounding.to_blocks(w, fmt).to(torch.float32)
    codes = rounding.from_blocks(fmt.grid.encode(fmt.grid.nearest(blocks / s)), fmt, -1, w.shape)
    if in_pairs(fmt):
        if codes.shape[-1] % 2:
            zero = fmt.grid.encode(torch.zeros_like(codes[..., :1], dtype=torch.float32))
            codes = torch.cat([codes, zero], -1)
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    type = getattr(fmt.law, "type", None)
    scales = scales.squeeze(-1)
    return codes, scales if type is None else type.encode(scales)


def unpack(packed: Packed, fmt: str | Format, length: int) -> Tensor:
    """The float32 weight [..., length] that was packed."""
    format = resolve(fmt)
    codes = packed.codes
    if in_pairs(format):
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :length]
    type = getattr(format.law, "type", None)
    scales = packed.scales if type is None else type.decode(packed.scales)
    if packed.tensor_scale is not None:
        scales = scales * packed.tensor_scale
    blocks = rounding.to_blocks(format.grid.decode(codes), format)
    return rounding.from_blocks(blocks * scales.unsqueeze(-1), format, -1, codes.shape)


def check(
    features: int, codes: Tensor, scales: Tensor, tensor_scale: Tensor | None, bias: Tensor | None, fmt: Format
) -> None:
    """Raises `ValueError` where a packed weight has not the shapes and dtypes of ``features`` inputs in its format."""
    width = -(-features // 2) if in_pairs(fmt) else features
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] != width:
        raise ValueError(
            f"codes: got {codes.dtype} {list(codes.shape)}, expected torch.uint8 [outputs, {width}] for {features} "
            f"inputs in {fmt.name}"
        )
    blocks = -(-features // fmt.block) if isinstance(fmt.block, int) else 1
    shape = [1] if fmt.block == "tensor" else [codes.shape[0], blocks]
    stored = fmt.law.held
    if scales.dtype != stored or list(scales.shape) != shape:
        raise ValueError(
            f"scales: got {scales.dtype} {list(scales.shape)}, expected {stored} {shape} for {features} inputs "
            f"in {fmt.name}"
        )
    if (tensor_scale is not None) != fmt.law.two_level:
        raise ValueError(f"tensor_scale={tensor_scale!r}: {fmt.name} has {'one' if fmt.law.two_level else 'none'}")
    if bias is not None and bias.shape != codes.shape[:1]:
        raise ValueError(f"bias: got {list(bias.shape)}, expected [{codes.shape[0]}]")


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product in float32 (float64 for float64 activations), rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)


def step_of(rows: int) -> str:
    """The shape class of so many rows of activations."""
    return "decode" if rows <= FEW else "prefill"
