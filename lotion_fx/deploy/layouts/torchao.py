"""Layout "torchao": nvfp4, int2 to int8 and fp8 as torchao's tensors, in the checkpoint that transformers loads.

A Linear's weight is, as torchao 0.18 names them,

    nvfp4             NVFP4Tensor: qdata u8 [N, K/2], scale e4m3 [N, K/16], per_tensor_scale f32, which multiplies
    int2 to int8      IntxUnpackedToInt8Tensor: qdata i8 [N, K], a byte a code whatever its bits; scale [N, blocks]
    fp8               Float8Tensor: qdata e4m3 [N, K], scale [N, 1]

with each tensor's class and attributes in the metadata of the safetensors file. A tensor has the dtype that it was
trained in, and a model loaded in another fails in its first forward. (Int8Tensor, which int8 per channel could be too,
multiplies by scales after the product: the same weights, other logits. Float8Tensor adds a bias to the rounded product,
which bfloat16 logits show.)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lotion_fx.deploy import huggingface
from lotion_fx.deploy.content import Content
from lotion_fx.deploy.elements import E4M3, integers, is_integer, is_nvfp4
from lotion_fx.deploy.layout import Layout
from lotion_fx.deploy.weights import QuantizedWeight
from lotion_fx.numerics.formats import Format
from lotion_fx.numerics.scales import PowerOfTwoScale, TwoLevelScale


class TorchAO(Layout):
    name = "torchao"
    packages = ("torchao", "transformers", "safetensors")

    def refusal(self, fmt: Format) -> str:
        if isinstance(fmt.law, PowerOfTwoScale):
            return (
                "a linear layer of torchao takes MX weights with MX activations alone; train with 'nvfp4' or 'int4', "
                "or export it as layout='compressed-tensors'"
            )
        if isinstance(fmt.law, TwoLevelScale):
            return "" if is_nvfp4(fmt) else "of formats of two scales torchao has nvfp4"
        if is_integer(fmt.grid) or (fmt.grid == E4M3 and not isinstance(fmt.block, int)):
            return ""
        return "torchao has int2 to int8, fp8 and nvfp4; train with one of them, or export it as layout='lotion'"

    def write(self, content: Content, place: Path) -> dict[str, str]:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
        from transformers import TorchAoConfig

        huggingface.check(content, self.name)
        dense = _dense(content)
        packed = {}
        for name, weight in content.weights.items():
            if name not in dense:
                (saved,) = huggingface.matrices(content, name)
                packed[saved] = tensor_of(weight)
        others = {**content.others, **{name: content.weights[name].dequantize() for name in dense}}
        tensors, metadata = flatten_tensor_state_dict({**huggingface.as_saved(content.model, others), **packed})
        huggingface.save_tensors(tensors, place, metadata)
        first = next((weight.format for name, weight in content.weights.items() if name not in dense), None)
        if first is not None:
            huggingface.save_settings(content, place, TorchAoConfig(_configuration(first)).to_dict())
        return dense

    def read(self, place: Path, content: Content) -> Iterator[tuple[str, Tensor]]:
        from safetensors import safe_open
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        with safe_open(place / huggingface.FILE, framework="pt") as file:
            held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
            tensors, _ = unflatten_tensor_state_dict(held, file.metadata())
        dense = _dense(content)
        for name in content.weights:
            if name not in dense:
                (saved,) = huggingface.matrices(content, name)
                yield name, tensors[saved].dequantize()

    def outputs(self, place: Path, model: nn.Module, inputs: Any) -> Tensor:
        return huggingface.loaded_outputs(place, inputs)


def _dense(content: Content) -> dict[str, str]:
    reasons = {name: huggingface.unplaced(content, name) for name in content.weights}
    stacked = "stacked experts: torchao's tensors are written for matrices alone"
    reasons |= {name: stacked for name, w in content.weights.items() if not reasons[name] and len(w.shape) == 3}
    return {name: why for name, why in reasons.items() if why}


def tensor_of(weight: QuantizedWeight) -> Tensor:
    """A matrix [N, K], blocks along K, as a tensor of torchao."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.quantization import Float8Tensor, IntxUnpackedToInt8Tensor

    fmt, (rows, length) = weight.format, weight.shape
    if fmt.law.two_level:
        scales = weight.scales.view(torch.float8_e4m3fn)
        return NVFP4Tensor(weight.codes, scales, 16, weight.dtype, per_tensor_scale=weight.tensor_scale)
    whole = fmt.block == "tensor"
    scales = weight.scales.reshape(1, 1) if whole else weight.scales
    if fmt.grid == E4M3:
        block = [rows, length] if whole else [1, length]
        return Float8Tensor(weight.codes.view(torch.float8_e4m3fn), scales, block_size=block, dtype=weight.dtype)
    levels = integers(weight)
    scales = scales.expand(rows, 1).contiguous() if whole else scales
    group = fmt.block if isinstance(fmt.block, int) else length
    zeros, kind = torch.zeros_like(scales, dtype=torch.int8), getattr(torch, f"int{fmt.grid.bits}")
    return IntxUnpackedToInt8Tensor(levels, scales, zeros, kind, (1, group), weight.dtype, None)


def _configuration(fmt: Format) -> Any:
    """What torchao would make such weights with. A loader of packed weights needs one, and uses none of it."""
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
    )

    if fmt.law.two_level:
        return NVFP4WeightOnlyConfig()
    if fmt.grid == E4M3:
        return Float8WeightOnlyConfig()
    part = PerGroup(fmt.block) if isinstance(fmt.block, int) else PerAxis(0)
    return IntxWeightOnlyConfig(getattr(torch, f"int{fmt.grid.bits}"), part)
