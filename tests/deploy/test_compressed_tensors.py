"""Layout "compressed-tensors", loaded by transformers and decompressed by compressed-tensors itself."""

import json

import pytest
import torch

import lotion_fx
from lotion_fx.deploy.layouts import compressed_tensors as layout
from lotion_fx.deploy.weights import QuantizedWeight, quantized
from lotion_fx.numerics.formats import formats, resolve
from tests.deploy.clients import KINDS, assert_same, loaded, logits, reference, tiny, trained
from tests.deploy.test_weights import hard
from tests.models import MLP

pytest.importorskip("compressed_tensors")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers", "5.24")
pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries that are not ours

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
EXACT = ["nvfp4/pow2", "mxfp4", "mxfp4/even", "mxfp8", "int4/bf16", "int4/64/bf16", "int3/tensor/bf16"]
EXACT += ["int8/bf16", "fp8/bf16"]
FP4 = ("nvfp4", "mxfp")
MISREAD = ("nvfp4", "nvfp4/pow2", "mxfp8")  # in experts


def export(model, folder, **options):
    return lotion_fx.export(model, folder / "packed", layout="compressed-tensors", **options)


@pytest.mark.parametrize(
    "fmt, dtype",
    [
        pytest.param("int4/bf16", FLOAT32, marks=pytest.mark.slow),
        ("nvfp4/pow2", FLOAT32),
        pytest.param("nvfp4", BFLOAT16, marks=pytest.mark.slow),
    ],
)
def test_a_llama_is_loaded_bit_for_bit(tmp_path, fmt, dtype):
    model = trained("llama", fmt, dtype)
    told = export(model, tmp_path)
    assert len(told.packed) == 8 and not told.dense
    if fmt.startswith(FP4):
        assert_same(model, tmp_path, BFLOAT16)  # as the file says, whatever was trained
    else:
        assert_same(model, tmp_path, dtype)
    if fmt == "int4/bf16":
        assert_same(model, tmp_path, BFLOAT16, dtype=BFLOAT16)
    else:
        whole = transformers.CompressedTensorsConfig(dequantize=True)
        assert_same(model, tmp_path, FLOAT32, dtype=FLOAT32, quantization_config=whole)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("fmt", [*EXACT, "nvfp4"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_model_in_every_format(tmp_path, kind, fmt, dtype):
    model = trained(kind, fmt, dtype, steps=3)
    misread = kind == "mixtral" and fmt in MISREAD
    if misread or (fmt == "nvfp4" and dtype == FLOAT32):
        with pytest.raises(ValueError, match="train with|train the experts with"):
            export(model, tmp_path)
        return
    try:
        export(model, tmp_path)
    except ValueError as error:
        assert fmt == "nvfp4" and "'nvfp4/pow2'" in str(error)  # it is exact by chance
        return
    assert_same(model, tmp_path, BFLOAT16 if fmt.startswith(FP4) else dtype)
    if kind != "mixtral" and dtype == FLOAT32:
        assert_same(model, tmp_path, BFLOAT16, dtype=BFLOAT16)


@pytest.mark.slow
def test_float16_scales_are_for_float16_models(tmp_path):
    model = lotion_fx.transform(tiny("llama").half(), "int4/fp16", inner="aot_eager").eval()
    logits(model)
    export(model, tmp_path)
    assert_same(model, tmp_path, torch.float16)


@pytest.mark.slow
def test_what_is_no_linear_is_dense_and_said(tmp_path):
    model = trained("gpt2", "int4/bf16")
    told = export(model, tmp_path)
    assert list(told.packed) == ["lm_head.weight"] and len(told.dense) == 4
    assert "Conv1D has its blocks along dimension 0" in str(told)
    assert_same(model, tmp_path, FLOAT32)


@pytest.mark.slow
def test_experts_are_apart_and_a_router_is_dense(tmp_path):
    model = trained("mixtral", "int4/bf16")
    told = export(model, tmp_path)
    assert told.dense == {"model.layers.0.mlp.gate.weight": "MixtralTopKRouter is no nn.Linear"}
    assert_same(model, tmp_path, FLOAT32)


@pytest.mark.slow
def test_formats_side_by_side(tmp_path):
    model = trained("llama", "mxfp4", only={"*.mlp.*": "int8/bf16", "lm_head.*": None})
    assert set(export(model, tmp_path).packed.values()) == {"mxfp4", "int8/bf16"}
    told = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert told["ignore"] == ["lm_head"] and told["format"] == "mixed-precision"
    assert_same(model, tmp_path, BFLOAT16)


@pytest.mark.parametrize("fmt", [*EXACT, "nvfp4"])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_our_tensors_are_decompressed_to_our_weights(fmt, dtype):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight = QuantizedWeight.of(hard(dtype, 256).clamp(-1e30, 1e30), resolve(fmt), 1)
    scheme = layout.scheme_of(weight.format)
    client = BaseCompressor.get_value_from_registry(scheme.format)
    parts = {key: layout._as_loaded(key, part, dtype) for key, part in layout.parts_of(weight).items()}
    told = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme.weights), format=scheme.format)
    read = client.decompress(parts, told)["weight"]
    assert torch.equal(read.to(dtype), weight.dequantize().to(torch.bfloat16 if fmt == "nvfp4" else dtype).to(dtype))


def test_a_tensor_scale_that_a_client_rounds_is_refused():
    torch.manual_seed(0)
    spread = torch.randn(200, 64, 16, 1).exp()
    random = (torch.randn(200, 64, 16, 16) * spread).flatten(-2).bfloat16()
    weights = [QuantizedWeight.of(w, resolve("nvfp4"), 1) for w in random]
    read = [layout._is_read_by_chance(weight) for weight in weights]
    assert any(read) and not all(read)
    with pytest.raises(ValueError, match="'nvfp4/pow2', whose weights are the same in any arithmetic"):
        layout._check_exact("w", weights[read.index(False)])


def test_what_has_no_place_is_refused_with_what_to_train(tmp_path):
    refused = {name: why for name in formats() if (why := layout.CompressedTensors().refusal(resolve(name)))}
    assert "'int4/bf16'" in refused["int4"] and "'fp8/bf16'" in refused["fp8"] and "mxfp8_e4m3" in refused["mxfp8_e5m2"]
    assert set(formats()) - set(refused) == {"nvfp4", "mxfp4", "mxfp8", "mxfp8_e4m3"}
    for fmt, dtype, match in [
        ("nvfp4", FLOAT32, "'nvfp4/pow2'"),
        ("int4/fp16", FLOAT32, "train with /bf16"),
        ("int4/bf16", torch.float16, "train with /fp16"),
        ("mxfp4", torch.float16, "train in bfloat16"),
    ]:
        weight = QuantizedWeight.of(torch.randn(32, 64).to(dtype), resolve(fmt), 1)
        with pytest.raises(ValueError, match=match):
            layout._check_exact("w", weight)
    model = lotion_fx.transform(MLP(), "mxfp4", inner="eager")
    model(torch.randn(2, 20))
    with pytest.raises(ValueError, match="model is a MLP, which is no model of transformers"):
        export(model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", MISREAD[1:])
def test_experts_that_transformers_misreads_are_refused_for_a_reason(tmp_path, monkeypatch, fmt):
    """Were one of these read right, its refusal could go."""
    model = trained("mixtral", fmt, BFLOAT16)
    with pytest.raises(ValueError, match="other weights would be read, unseen"):
        export(model, tmp_path)
    monkeypatch.setattr(layout, "_is_read_in_experts", lambda fmt: True)
    export(model, tmp_path)
    try:
        made = loaded(model, tmp_path / "packed").model.layers[0].mlp.experts.down_proj
    except Exception:  # whatever a client raises
        return
    assert not torch.equal(made, quantized(model)["model.layers.0.mlp.experts.down_proj"].dequantize())


@pytest.mark.slow
def test_float32_scales_would_be_cast(tmp_path, monkeypatch):
    """The reason of their refusal: another dtype than the trained one reads other weights, without a word."""
    monkeypatch.setattr(layout.CompressedTensors, "refusal", lambda self, fmt: "")
    model = trained("llama", "int4")
    export(model, tmp_path)
    assert_same(model, tmp_path, FLOAT32)
    name = "model.layers.0.mlp.up_proj.weight"
    made = loaded(model, tmp_path / "packed", dtype=BFLOAT16)
    logits(made)
    wanted = quantized(model)[name].dequantize().bfloat16()
    assert (dict(made.named_parameters())[name] != wanted).float().mean() > 0.01


def test_settings_are_the_models_own(tmp_path):
    model = lotion_fx.transform(tiny("llama"), "mxfp4", inner="eager").eval()
    logits(model)
    before = model.config.to_dict()
    export(model, tmp_path)
    assert model.config.to_dict() == before
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "packed").pad_token_id == 2


def test_one_tensor_scale_is_an_option_that_transformers_can_do_without(tmp_path):
    model = lotion_fx.transform(tiny("llama"), "nvfp4/pow2", inner="eager").eval()
    logits(model)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.k_proj.weight.mul_(2**-4)
        attention.k_proj.weight[0, :16].mul_(2**-13)
    with pytest.raises(ValueError, match=r"k_proj.weight' cannot take .*share=False"):
        export(model, tmp_path)
    export(model, tmp_path, share=False)
    assert torch.equal(
        logits(loaded(model, tmp_path / "packed")), logits(reference(model, tmp_path / "dense", BFLOAT16))
    )


@pytest.mark.slow
def test_a_tied_model_that_was_loaded_is_written_as_its_checkpoints_are(tmp_path):
    first = tiny("llama").config
    first.tie_word_embeddings = True
    transformers.LlamaForCausalLM(first).save_pretrained(tmp_path / "first")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "first")
    lotion_fx.transform(model, "int4/bf16", inner="aot_eager", only={"*embed_tokens*": "int4/bf16"}).eval()
    logits(model)
    assert list(export(model, tmp_path).dense) == ["model.embed_tokens.weight"]
    assert_same(model, tmp_path, FLOAT32)


def test_a_last_block_that_is_short_is_dense(tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 104, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, vocab_size=64))
    lotion_fx.transform(model, "mxfp4", inner="eager").eval()
    logits(model)
    dense = export(model, tmp_path).dense
    assert dense == {"model.layers.0.mlp.down_proj.weight": "its 104 inputs are no multiple of a block of 32"}
