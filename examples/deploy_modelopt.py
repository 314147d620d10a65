"""ModelOpt: an NVFP4 checkpoint for TensorRT-LLM, vLLM and SGLang, here read by compressed-tensors' converter.

python examples/deploy_modelopt.py
"""

from __future__ import annotations

from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter
from safetensors.torch import load_file

import lotion_fx
from lotion_fx.examples.tiny_text import trained


def main(folder: str = "build/deploy_modelopt") -> bool:
    model = trained("nvfp4/pow2")  # whose weights are the same in any client's arithmetic
    print(lotion_fx.export(model, folder, layout="modelopt"))

    tensors = ModelOptNvfp4Converter(targets=["Linear"]).process(load_file(f"{folder}/model.safetensors"))
    scales = [tensors[f"model.layers.0.self_attn.{name}_proj.weight_global_scale"] for name in "qkv"]
    return bool(scales[0] == scales[1] == scales[2])


if __name__ == "__main__":
    print("one tensor scale for q, k and v:", main())
