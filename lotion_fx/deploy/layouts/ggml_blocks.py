"""Codes and scales as ggml's blocks of bytes, and back.

A block is a scale and then its codes, two to a byte where they have 4 bits: of 32 codes the first 16 are in the low
halves. NVFP4 has 64 weights to a block, four E4M3 scales before four groups of 16, and a float32 beside the tensor that
multiplies it. E2M1's codes are its bit patterns, Q4_0's are offset by 8, Q8_0's are two's complement.
"""

from __future__ import annotations

from typing import NamedTuple

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from lotion_fx.deploy.weights import QuantizedWeight
from lotion_fx.numerics.formats import Format
from lotion_fx.numerics.grids import Integer, Minifloat
from lotion_fx.numerics.scales import PowerOfTwoScale

_E2M1, _E4M3 = Minifloat(2, 1, 6.0), Minifloat(4, 3, 448.0)
_INTEGERS = {Integer(7): Type.Q4_0, Integer(127): Type.Q8_0}


class Blocks(NamedTuple):
    """
    Args:
        rows: uint8 [*rows, bytes].
        type: ggml's.
        scale: float32 that multiplies the tensor; None where there is none.
    """

    rows: Tensor
    type: Type
    scale: float | None


def type_of(fmt: Format) -> Type | None:
    """The type whose blocks hold a format's codes; None where there is none."""
    if fmt.block == 32 and not hasattr(fmt.law, "type") and not fmt.law.two_level and isinstance(fmt.grid, Integer):
        return _INTEGERS.get(fmt.grid)
    if fmt.grid == _E2M1 and fmt.block == 32 and isinstance(fmt.law, PowerOfTwoScale):
        return Type.MXFP4
    if fmt.grid == _E2M1 and fmt.block == 16 and fmt.law.two_level and getattr(fmt.law, "type", None) == _E4M3:
        return Type.NVFP4
    return None


def refusal(fmt: Format) -> str:
    if type_of(fmt) is not None:
        return ""
    advice = "int4/32/fp16 (Q4_0), int8/32/fp16 (Q8_0), mxfp4 or nvfp4/pow2"
    return f"ggml has no type with these levels, blocks and scales; train with {advice}"


def indivisible(weight: QuantizedWeight) -> str:
    """Why a weight's rows are not whole blocks; empty if they are."""
    type = type_of(weight.format)
    assert type is not None
    block, _ = gguf.GGML_QUANT_SIZES[type]
    if weight.length % block == 0:
        return ""
    return f"its rows have {weight.length} weights, and {type.name} wants a multiple of {block}"


def relaid(name: str, weight: QuantizedWeight) -> Blocks:
    """A weight's bytes.

    Raises:
        ValueError: its scales are no numbers of the type that the blocks hold.
    """
    type, codes = type_of(weight.format), weight.each_code()
    if type is Type.MXFP4:
        return Blocks(torch.cat([weight.scales.unsqueeze(-1), _halves(codes, 32)], -1).flatten(-2), type, None)
    if type is Type.NVFP4:
        assert weight.tensor_scale is not None
        scale = float(weight.tensor_scale)
        if torch.frexp(weight.tensor_scale).mantissa != 0.5:
            raise ValueError(
                f"layout='gguf': the tensor scale of {name!r} is {scale:.6g}, no power of two: llama.cpp multiplies by "
                "it after the product, which is not the weight that was trained, bit for bit; train with nvfp4/pow2"
            )
        groups = _halves(codes, 16).unflatten(-2, (-1, 4)).flatten(-2)
        return Blocks(torch.cat([weight.scales.unflatten(-1, (-1, 4)), groups], -1).flatten(-2), type, scale)
    assert type is not None
    half = _float16(name, weight).view(torch.uint8).unflatten(-1, (-1, 2))
    packed = _halves(codes, 32) if type is Type.Q4_0 else (codes ^ 128).unflatten(-1, (-1, 32))
    return Blocks(torch.cat([half, packed], -1).flatten(-2), type, None)


def _float16(name: str, weight: QuantizedWeight) -> Tensor:
    scales = weight.block_scales()
    half = scales.to(torch.float16)
    if wrong := int((half.float() != scales).sum()):
        bits = weight.format.grid.bits
        raise ValueError(
            f"layout='gguf': of {name!r} in {weight.format.name}, {wrong} of {scales.numel()} block scales are no "
            f"float16 numbers, which is what ggml stores; train with int{bits}/32/fp16"
        )
    return half


def _halves(codes: Tensor, block: int) -> Tensor:
    """Codes [..., K] as bytes [..., K / block, block / 2]: the first half of a block low, the second high."""
    first, second = codes.unflatten(-1, (-1, 2, block // 2)).unbind(-2)
    return first | second << 4


def dequantized(tensor: gguf.ReaderTensor, scale: float | None) -> Tensor:
    """The float32 values [*rows, K] of a tensor that gguf has read, by gguf's own arithmetic."""
    values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    return values if scale is None else values * scale
