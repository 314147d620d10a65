"""Layout "bitsandbytes", loaded by transformers and dequantized by bitsandbytes itself."""

import pytest
import torch

import lotion_fx
from lotion_fx.deploy.layouts import bitsandbytes as layout
from lotion_fx.numerics.formats import formats, resolve
from tests.deploy.clients import KINDS, loaded, logits, reference, tokens, trained

bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")
pytest.importorskip("transformers", "5.24")
pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries that are not ours

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
BOUND = 1e-2  # of logits in eval(), where bitsandbytes multiplies in bfloat16, relative to the largest
ROUTED = 1e-1  # where a token may then go to another expert


def check(model, folder):
    """Weights and, in train(), logits and tokens are equal; in eval() logits are near."""
    made, wanted = loaded(model, folder / "packed"), reference(model, folder / "dense", model.dtype)
    assert made.dtype == model.dtype
    for name, parameter in wanted.named_parameters():
        read = made.get_parameter(name)
        if state := getattr(read, "quant_state", None):
            read = bnb.functional.dequantize_4bit(read.data, state)
            is_turned = type(wanted.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"
            read = read.t() if is_turned else read
        assert torch.equal(read, parameter), name
    linear = [module for module in made.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for module in linear:
        module.train()
    assert torch.equal(logits(made), logits(wanted))
    if wanted.can_generate():
        assert torch.equal(tokens(made), tokens(wanted))
    for module in linear:
        module.eval()
    bound = ROUTED if model.config.model_type == "mixtral" else BOUND
    assert (logits(made) - logits(wanted)).abs().max() <= bound * logits(wanted).abs().max()


def test_a_llama_is_loaded_bit_for_bit(tmp_path):
    model = trained("llama", "nf4")
    assert len(lotion_fx.export(model, tmp_path / "packed", layout="bitsandbytes").packed) == 8
    check(model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("fmt", ["nf4", "nf4/64", "nf4/bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_model(tmp_path, kind, fmt, dtype):
    model = trained(kind, fmt, dtype, steps=3)
    told = lotion_fx.export(model, tmp_path / "packed", layout="bitsandbytes")
    assert ("stacked experts" in str(told)) if kind == "mixtral" else not told.dense  # GPT-2's Conv1D has a place
    check(model, tmp_path)


@pytest.mark.slow
def test_what_is_not_rounded_stays_a_linear(tmp_path):
    model = trained("llama", "nf4", only={"lm_head.*": None})
    lotion_fx.export(model, tmp_path / "packed", layout="bitsandbytes")
    assert type(loaded(model, tmp_path / "packed").lm_head) is torch.nn.Linear
    check(model, tmp_path)


def test_what_has_no_place_is_refused_with_what_to_train():
    refused = {name: why for name in formats() if (why := layout.BitsAndBytes().refusal(resolve(name)))}
    assert set(formats()) - set(refused) == {"nf4"} and "train with 'nf4'" in refused["fp4"]
    assert layout.BitsAndBytes().refusal(resolve("nf4/48")) and layout.BitsAndBytes().refusal(resolve("nf4/channel"))
