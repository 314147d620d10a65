"""Layout "modelopt": nvfp4 as NVIDIA's ModelOpt exports it, which TensorRT-LLM, vLLM and SGLang load.

Of a Linear's weight the file has ``weight`` u8 [N, K/2], ``weight_scale`` e4m3 [N, K/16] and ``weight_scale_2`` f32
[1], which multiplies and is one for q, k and v and for gate and up; ``input_scale`` is 1 and stands there for readers
that ask for it. ``hf_quant_config.json`` and config.json say what it is. transformers has no reader of its own and
refuses the shapes; compressed-tensors converts the checkpoint into one that it reads.

Readers invert the tensor scale, or multiply in an order of their own: with a power of two, all get the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lotion_fx.deploy import huggingface
from lotion_fx.deploy.content import Content
from lotion_fx.deploy.elements import is_nvfp4
from lotion_fx.deploy.layout import Layout
from lotion_fx.deploy.sharing import is_power_of_two, shared
from lotion_fx.numerics.formats import Format


class ModelOpt(Layout):
    name = "modelopt"
    packages = ("compressed_tensors", "transformers", "safetensors")

    def refusal(self, fmt: Format) -> str:
        if not is_nvfp4(fmt):
            return "of ModelOpt's formats nvfp4 is written; train with 'nvfp4/pow2'"
        if not is_power_of_two(fmt):
            return (
                "its clients hold one tensor scale for q, k and v and for gate and up, and each rounds its product "
                "with a block's scale in its own way; train with 'nvfp4/pow2', whose weights are the same in any"
            )
        return ""

    def write(self, content: Content, place: Path) -> dict[str, str]:
        huggingface.check(content, self.name)
        dense = {name: why for name in content.weights if (why := huggingface.unplaced(content, name))}
        weights = shared({name: weight for name, weight in content.weights.items() if name not in dense})
        others = {**content.others, **{name: content.weights[name].dequantize() for name in dense}}
        tensors = huggingface.as_saved(content.model, others)
        for name, weight in weights.items():
            for saved, rows in huggingface.matrices(content, name).items():
                matrix, own = huggingface.rows_of(weight, rows), saved.removesuffix("weight")
                assert matrix.tensor_scale is not None
                tensors[saved] = matrix.codes
                tensors[f"{own}weight_scale"] = matrix.scales.view(torch.float8_e4m3fn)
                tensors[f"{own}weight_scale_2"] = matrix.tensor_scale.reshape(1)
                tensors[f"{own}input_scale"] = torch.ones(1)
        huggingface.save_tensors(tensors, place)
        owners = {name.rpartition(".")[0] for name in weights}
        linear = [name for name, module in content.model.named_modules() if isinstance(module, nn.Linear)]
        told = {
            "quant_algo": "W4A16_NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": [name for name in linear if name not in owners],
        }
        producer = {"name": "modelopt", "version": "0.47.0"}  # whose layout this is; readers look at it
        hf_quant_config = {"producer": producer, "quantization": told}
        (place / "hf_quant_config.json").write_text(json.dumps(hf_quant_config, indent=2) + "\n", encoding="utf-8")
        ignored = {"ignore": told["exclude_modules"]}
        quantization = {"quant_method": "modelopt", "producer": producer, **told, **ignored}
        huggingface.save_settings(content, place, quantization, torch.bfloat16)
        return dense

    def read(self, place: Path, content: Content) -> Iterator[tuple[str, Tensor]]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter
        from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
        from safetensors.torch import load_file

        told = json.loads((place / "hf_quant_config.json").read_text(encoding="utf-8"))["quantization"]
        converter = ModelOptNvfp4Converter(targets=[r"re:.*"], ignore=told["exclude_modules"])
        modules = huggingface.by_module(converter.process(load_file(place / huggingface.FILE)))
        scheme: QuantizationScheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
        client = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
        for name in content.weights:
            if huggingface.unplaced(content, name):
                continue
            read = {}
            for saved in huggingface.matrices(content, name):
                read[saved] = client.decompress(modules[saved.removesuffix(".weight")], scheme)["weight"]
            yield name, huggingface.whole(content, name, read)
