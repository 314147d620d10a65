"""Layout "torchao", loaded by transformers and dequantized by torchao itself."""

import pytest
import torch

import lotion_fx
from lotion_fx.deploy.layouts import torchao as layout
from lotion_fx.deploy.weights import QuantizedWeight
from lotion_fx.numerics.formats import formats, resolve
from tests.deploy.clients import KINDS, assert_same, loaded, logits, trained
from tests.deploy.test_weights import hard

pytest.importorskip("torchao")
transformers = pytest.importorskip("transformers", "5.24")
pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries that are not ours

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
EXACT = [
    "nvfp4",
    "nvfp4/pow2",
    "int4",
    "int4/bf16",
    "int4/fp16",
    "int3/tensor",
    "int8",
    "int8/bf16",
    "fp8",
    "fp8/tensor",
]


def export(model, folder):
    return lotion_fx.export(model, folder / "packed", layout="torchao")


def test_a_llama_is_loaded_bit_for_bit(tmp_path):
    model = trained("llama", "nvfp4", only={"*.mlp.*": "int4", "*.o_proj.*": "fp8"})
    assert len(export(model, tmp_path).packed) == 8
    assert_same(model, tmp_path, FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("fmt", EXACT)
@pytest.mark.parametrize("kind", KINDS)
def test_every_model_in_every_format(tmp_path, kind, fmt, dtype):
    model = trained(kind, fmt, dtype, steps=3)
    told = export(model, tmp_path)
    rounds_before_bias = fmt.startswith("fp8") and kind == "bert" and dtype == BFLOAT16
    assert_same(model, tmp_path, dtype, bound=2**-6 if rounds_before_bias else 0.0)
    dense = {"gpt2": "Conv1D has its blocks along dimension 0", "mixtral": "stacked experts"}
    assert (dense[kind] in str(told)) if kind in dense else not told.dense


@pytest.mark.slow
def test_another_dtype_than_the_trained_one_fails_aloud(tmp_path):
    model = trained("llama", "nvfp4")
    export(model, tmp_path)
    with pytest.raises(RuntimeError, match="same dtype"):
        logits(loaded(model, tmp_path / "packed", dtype=BFLOAT16))


@pytest.mark.parametrize("fmt", EXACT)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_our_tensors_are_dequantized_and_multiplied_as_our_weights(fmt, dtype):
    weight = QuantizedWeight.of(hard(dtype, 256).clamp(-1e30, 1e30), resolve(fmt), 1)
    tensor, wanted = layout.tensor_of(weight), weight.dequantize()
    assert torch.equal(tensor.dequantize(), wanted)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(torch.nn.functional.linear(x, tensor), torch.nn.functional.linear(x, wanted))


def test_what_has_no_place_is_refused_with_what_to_train():
    refused = {name: why for name in formats() if (why := layout.TorchAO().refusal(resolve(name)))}
    assert "train with 'nvfp4' or 'int4'" in refused["mxfp4"] and "has int2 to int8" in refused["nf4"]
    assert set(formats()) - set(refused) == {"nvfp4", "fp8", *(f"int{bits}" for bits in range(2, 9))}
