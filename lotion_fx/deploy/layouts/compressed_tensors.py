"""Layout "compressed-tensors": what transformers and vLLM load; FP4 and MX formats, and integers with 16-bit scales.

Of a Linear's weight the file has, as compressed-tensors 0.20 names them,

    nvfp4             weight_packed u8 [N, K/2], weight_scale e4m3 [N, K/16], weight_global_scale f32 [1], which divides
    mxfp4             weight_packed u8 [N, K/2], weight_scale u8 [N, K/32]
    mxfp8             weight e4m3 [N, K], weight_scale u8 [N, K/32]
    int2 to int8      weight_packed i32 [N, ceil(bits K / 32)], weight_scale [N, blocks], weight_shape i64 [2]
    fp8               weight e4m3 [N, K], weight_scale [N, 1]

The client computes weights in the dtype of the scales that it holds: it decompresses FP4 and MX to bfloat16, and casts
other scales to the dtype that the model is loaded in. So FP4 and MX models say ``dtype: bfloat16``, whatever they were
trained in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lotion_fx.deploy import huggingface
from lotion_fx.deploy.content import Content
from lotion_fx.deploy.elements import E2M1, E4M3, integers, is_integer, is_nvfp4
from lotion_fx.deploy.layout import Layout
from lotion_fx.deploy.sharing import is_power_of_two, shared
from lotion_fx.deploy.weights import QuantizedWeight
from lotion_fx.numerics.formats import Format
from lotion_fx.numerics.grids import Integer, Minifloat
from lotion_fx.numerics.scales import PowerOfTwoScale, TwoLevelScale


class Scheme(NamedTuple):
    """What compressed-tensors calls a format: its name, and the arguments of the weights."""

    format: str
    weights: dict[str, Any]


class CompressedTensors(Layout):
    name = "compressed-tensors"
    packages = ("compressed_tensors", "transformers", "accelerate", "safetensors")

    def refusal(self, fmt: Format) -> str:
        law, block = fmt.law, fmt.block
        if isinstance(law, TwoLevelScale):
            return "" if is_nvfp4(fmt) else "of formats of two scales compressed-tensors has nvfp4"
        if isinstance(law, PowerOfTwoScale):
            known = fmt.grid in (E2M1, E4M3) and block == 32
            return "" if known else "of MX formats it takes mxfp4 and mxfp8_e4m3; train with one of them"
        if not (is_integer(fmt.grid) or (fmt.grid == E4M3 and not isinstance(block, int))):
            return (
                "compressed-tensors has int2 to int8, fp8, nvfp4, mxfp4 and mxfp8_e4m3; train with one of them, or "
                "export it as layout='lotion'"
            )
        if law.stored == torch.float32:
            return (
                "its float32 scales are cast to the dtype that a client loads the model in, and then other weights are "
                f"read than were trained; train with {fmt.name + '/bf16'!r}, whose scales survive"
            )
        return ""

    def write(self, content: Content, place: Path, *, share: bool = True) -> dict[str, str]:
        """
        Args:
            share: gives nvfp4/pow2's q, k and v, and gate and up, one tensor scale, as vLLM's fused layers need it.
                transformers needs it not.
        """
        huggingface.check(content, self.name)
        dense = {name: why for name in content.weights if (why := huggingface.unplaced(content, name))}
        weights = {name: weight for name, weight in content.weights.items() if name not in dense}
        for name, weight in weights.items():
            _check_exact(name, weight)
        if share:
            weights = shared(weights)
        others = {**content.others, **{name: content.weights[name].dequantize() for name in dense}}
        tensors = huggingface.as_saved(content.model, others)
        for name, weight in weights.items():
            for saved, rows in huggingface.matrices(content, name).items():
                matrix = huggingface.rows_of(weight, rows)
                if len(weight.shape) == 3 and matrix.scales.dtype != torch.uint8:
                    # transformers decompresses experts in their scales' dtype, and casts neither these nor the result
                    matrix = replace(matrix, scales=matrix.scales.to(weight.dtype))
                for part, tensor in parts_of(matrix).items():
                    tensors[saved.removesuffix("weight") + part] = tensor
        huggingface.save_tensors(tensors, place)
        in_bfloat16 = any(_is_decompressed_to_bfloat16(weight.format) for weight in weights.values())
        dtype = torch.bfloat16 if in_bfloat16 else next((weight.dtype for weight in weights.values()), None)
        huggingface.save_settings(content, place, _configuration(content.model, weights), dtype)
        return dense

    def read(self, place: Path, content: Content) -> Iterator[tuple[str, Tensor]]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig
        from safetensors.torch import load_file

        modules = huggingface.by_module(load_file(place / huggingface.FILE))
        told = json.loads((place / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        groups = QuantizationConfig.model_validate(told).config_groups
        weights = {n: weight for n, weight in content.weights.items() if not huggingface.unplaced(content, n)}
        for name, weight in weights.items():
            scheme = groups[f"group_{_formats(weights).index(weight.format.name)}"]
            client = BaseCompressor.get_value_from_registry(scheme.format)
            read = {}
            for saved in huggingface.matrices(content, name):
                held = modules[saved.removesuffix(".weight")]
                held = {key: _as_loaded(key, tensor, weight.dtype) for key, tensor in held.items()}
                read[saved] = client.decompress(held, scheme)["weight"]
            yield name, huggingface.whole(content, name, read)

    def outputs(self, place: Path, model: nn.Module, inputs: Any) -> Tensor:
        return huggingface.loaded_outputs(place, inputs)


def parts_of(weight: QuantizedWeight) -> dict[str, Tensor]:
    """A matrix [N, K], blocks along K, as compressed-tensors' tensors of a module."""
    grid, law = weight.format.grid, weight.format.law
    if isinstance(law, TwoLevelScale):
        assert weight.tensor_scale is not None
        return {
            "weight_packed": weight.codes,
            "weight_scale": weight.scales.view(torch.float8_e4m3fn),
            "weight_global_scale": (1 / weight.tensor_scale).reshape(1),
        }
    if grid == E2M1:
        return {"weight_packed": weight.codes, "weight_scale": weight.scales}
    if isinstance(grid, Minifloat):
        return {"weight": weight.codes.view(torch.float8_e4m3fn), "weight_scale": weight.scales}
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return {
        "weight_packed": pack_to_int32(integers(weight), grid.bits),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.shape),
    }


def scheme_of(fmt: Format) -> Scheme:
    """
    Args:
        fmt: one that is not refused.
    """
    common = {"symmetric": True, "dynamic": False, "num_bits": fmt.grid.bits}
    if isinstance(fmt.law, TwoLevelScale):
        place = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
        return Scheme("nvfp4-pack-quantized", {**common, **place, "type": "float"})
    if isinstance(fmt.law, PowerOfTwoScale):
        place = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        name = "mxfp4-pack-quantized" if fmt.grid == E2M1 else "mxfp8-quantized"
        return Scheme(name, {**common, **place, "type": "float"})
    place = {"strategy": "group", "group_size": fmt.block} if isinstance(fmt.block, int) else {"strategy": fmt.block}
    if isinstance(fmt.grid, Integer):
        return Scheme("pack-quantized", {**common, **place, "type": "int"})
    return Scheme("float-quantized", {**common, **place, "type": "float"})


def _configuration(model: nn.Module, weights: dict[str, QuantizedWeight]) -> dict[str, Any]:
    """``quantization_config`` of config.json."""
    owners = {name.rpartition(".")[0]: weight.format for name, weight in weights.items()}
    formats = _formats(weights)
    stacked = next((name for name, weight in weights.items() if len(weight.shape) == 3), None)
    if stacked is not None and len(formats) > 1:
        raise ValueError(
            f"layout='compressed-tensors': transformers reads experts in one format alone, {stacked!r} is in "
            f"{weights[stacked].format.name}, and formats here are {', '.join(formats)}; train with one of them"
        )
    groups = {}
    for i, name in enumerate(formats):
        fmt = next(weight.format for weight in weights.values() if weight.format.name == name)
        scheme = scheme_of(fmt)
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(formats) == 1 else sorted(o for o, f in owners.items() if f.name == name),
            "weights": scheme.weights,
            "input_activations": None,
            "output_activations": None,
            "format": scheme.format,
        }
    whole = {group["format"] for group in groups.values()}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {
        "quant_method": "compressed-tensors",
        "format": whole.pop() if len(whole) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linear if name not in owners],
    }


def _formats(weights: dict[str, QuantizedWeight]) -> list[str]:
    return sorted({weight.format.name for weight in weights.values()})


def _check_exact(name: str, weight: QuantizedWeight) -> None:
    """Raises `ValueError` where a client would compute another weight in the dtype that it loads the model in."""
    law, dtype = weight.format.law, str(weight.dtype).removeprefix("torch.")
    where = f"layout='compressed-tensors' has no place for {name!r} in {weight.format.name}"
    if len(weight.shape) == 3 and not _is_read_in_experts(weight.format):
        raise ValueError(
            f"{where}: transformers decompresses experts without their tensor scale, and those of 8 bits with codes "
            "for scales, so other weights would be read, unseen; train the experts with 'mxfp4' or 'int4/bf16', or "
            "export the model as layout='lotion'"
        )
    if _is_decompressed_to_bfloat16(weight.format):
        if weight.dtype == torch.float16:
            raise ValueError(f"{where} and float16: clients hold it in bfloat16; train in bfloat16 or float32")
        if isinstance(law, TwoLevelScale) and not is_power_of_two(weight.format) and not _is_read_by_chance(weight):
            raise ValueError(
                f"{where}: clients divide by the tensor scale and round to bfloat16, which does not give these {dtype} "
                "weights; train with 'nvfp4/pow2', whose weights are the same in any arithmetic"
            )
    elif (law.stored == torch.float16) != (weight.dtype == torch.float16):
        option = "fp16" if weight.dtype == torch.float16 else "bf16"
        raise ValueError(
            f"{where}: clients cast its scales to the dtype that they load the model in, and {dtype} models are loaded "
            f"in {'float16' if option == 'fp16' else 'bfloat16 too'}; train with /{option} in place of its last option"
        )


def _is_read_by_chance(weight: QuantizedWeight) -> bool:
    """Whether nvfp4 with any tensor scale, in bfloat16, is read bit for bit: of random weights 98.5 % are."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    name, arguments = scheme_of(weight.format)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments), format=name)
    read = BaseCompressor.get_value_from_registry(name).decompress(parts_of(weight), scheme)["weight"]
    return weight.dtype == torch.bfloat16 and torch.equal(read, weight.dequantize())


def _is_read_in_experts(fmt: Format) -> bool:
    """Whether transformers 5.24 decompresses stacked experts in this format as it does a Linear's weight."""
    return not isinstance(fmt.law, TwoLevelScale) and not (isinstance(fmt.law, PowerOfTwoScale) and fmt.grid.bits == 8)


def _is_decompressed_to_bfloat16(fmt: Format) -> bool:
    return isinstance(fmt.law, (TwoLevelScale, PowerOfTwoScale))


def _as_loaded(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As `from_pretrained` holds it: scales that are floating-point numbers are cast to the dtype of the model."""
    is_cast = key == "weight_scale" and tensor.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return tensor.to(dtype) if is_cast else tensor
