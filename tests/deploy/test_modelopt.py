"""Layout "modelopt", converted by compressed-tensors and then loaded by transformers."""

import json

import pytest
import torch

import lotion_fx
from lotion_fx.deploy.layouts import modelopt as layout
from lotion_fx.numerics.formats import formats, resolve
from tests.deploy.clients import KINDS, assert_same, loaded, trained

pytest.importorskip("compressed_tensors")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers", "5.24")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries that are not ours


def converted(model, folder):
    """Exports, converts the checkpoint, and says that activations stay as they are, which the converter does not."""
    from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter, convert_checkpoint

    told = lotion_fx.export(model, folder / "modelopt", layout="modelopt")
    excluded = json.loads((folder / "modelopt" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    converter = ModelOptNvfp4Converter(targets=["Linear"], ignore=excluded)
    convert_checkpoint(folder / "modelopt", folder / "packed", converter, max_workers=1)
    file = folder / "packed" / "config.json"
    config = json.loads(file.read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
    file.write_text(json.dumps(config))
    return told


def test_a_llama_is_loaded_bit_for_bit(tmp_path):
    model = trained("llama", "nvfp4/pow2")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.div_(8)
    assert len(converted(model, tmp_path).packed) == 8
    assert_same(model, tmp_path, torch.bfloat16)
    written = safetensors.load_file(tmp_path / "modelopt" / "model.safetensors")
    block = "model.layers.0.self_attn."
    assert len({float(written[f"{block}{name}_proj.weight_scale_2"]) for name in "qkv"}) == 1
    with pytest.raises(RuntimeError):  # transformers has no reader of it, and says so by shapes
        loaded(model, tmp_path / "modelopt")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mixtral"])
def test_every_model(tmp_path, kind, dtype):
    model = trained(kind, "nvfp4/pow2", dtype, steps=3)
    converted(model, tmp_path)
    assert_same(model, tmp_path, torch.bfloat16)
    whole = transformers.CompressedTensorsConfig(dequantize=True)
    if dtype == torch.float32:
        assert_same(model, tmp_path, torch.float32, dtype=torch.float32, quantization_config=whole)


@pytest.mark.slow
def test_experts_are_read_apart(tmp_path):
    """The export itself compares every weight, through the converter; transformers would drop their tensor scale."""
    told = lotion_fx.export(trained("mixtral", "nvfp4/pow2"), tmp_path / "packed", layout="modelopt")
    assert len(told.packed) == 7 and list(told.dense) == ["model.layers.0.mlp.gate.weight"]


def test_what_has_no_place_is_refused_with_what_to_train():
    for name in formats():
        assert "'nvfp4/pow2'" in layout.ModelOpt().refusal(resolve(name))
    assert not layout.ModelOpt().refusal(resolve("nvfp4/pow2"))
