"""Layout "gguf": what gguf reads, and what llama.cpp computes, is what was trained."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import lotion_fx
from tests.deploy.hf import VOCAB, distance, logits, make, rows, trained, under

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

TYPES = {"int4/32/fp16": "Q4_0", "int8/32/fp16": "Q8_0", "mxfp4": "MXFP4", "nvfp4/pow2": "NVFP4"}
BITS = {"Q4_0": 4.5, "Q8_0": 8.5, "MXFP4": 4.25, "NVFP4": 4.5}
BOUND = 1.5e-2  # of llama.cpp's logits: its activations have 8 bits


def tensors(path):
    return {each.name: each for each in gguf.GGUFReader(path).tensors}


def by_llama_cpp(path, ids):
    llama_cpp = pytest.importorskip("llama_cpp")
    # A float32 cache: the default is float16, which rounds keys and values.
    model = llama_cpp.Llama(
        str(path),
        n_ctx=64,
        n_batch=64,
        logits_all=True,
        verbose=False,
        n_threads=1,
        n_threads_batch=1,
        type_k=0,
        type_v=0,
    )
    model.eval(ids.tolist())
    found = torch.from_numpy(np.array(model.scores[: len(ids)]))
    model.close()
    return found


@pytest.mark.parametrize("fmt", TYPES)
def test_a_llama_is_in_blocks_of_its_format_and_dense_elsewhere(tmp_path, fmt):
    model = under(make("llama"), fmt)
    told = lotion_fx.export(model, tmp_path / "model.gguf", "gguf")
    assert len(told.packed) == 8 and not told.dense
    found, weights = tensors(told.path), lotion_fx.quantized(model)
    for name, ours in (
        ("output.weight", "lm_head.weight"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
    ):
        assert found[name].tensor_type.name == TYPES[fmt]
        assert found[name].n_bytes * 8 == BITS[TYPES[fmt]] * found[name].n_elements
        read = gguf.dequantize(found[name].data, found[name].tensor_type)
        scale = found[name.replace("weight", "scale")].data[0] if TYPES[fmt] == "NVFP4" else np.float32(1)
        np.testing.assert_array_equal(read * scale, weights[ours].dequantize().numpy())
    embedding = found["token_embd.weight"]
    assert embedding.tensor_type.name == "F32"
    np.testing.assert_array_equal(embedding.data, model.model.embed_tokens.weight.detach().numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_16_bits_are_read_in_their_dtype(tmp_path, dtype):
    model = under(make("llama").to(dtype), "mxfp4")
    assert len(lotion_fx.export(model, tmp_path / "model.gguf", "gguf").packed) == 8


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mixtral"])
def test_llama_cpp_computes_what_eval_computes(tmp_path, kind):
    model, ids = under(make(kind), "mxfp4"), rows(1)
    told = lotion_fx.export(model, tmp_path / "model.gguf", "gguf")
    assert not told.dense
    each = (by_llama_cpp(told.path, ids[0]) - logits(model, ids)[0]).norm(dim=-1) / logits(model, ids)[0].norm(dim=-1)
    # Where two experts are nearly equal, 8 bits of activations may take the other one: a token of a hundred.
    assert each.median() < BOUND and (kind == "mixtral" or each.max() < 2 * BOUND)


def test_a_tied_head_is_the_embedding(tmp_path):
    options = {"only": lotion_fx.preset("all")}
    ids = rows(1)
    for fmt, dense in (("mxfp4", 0), ("nvfp4/pow2", 1)):
        model = under(make("llama", tie_word_embeddings=True), fmt, **options)
        told = lotion_fx.export(model, tmp_path / "model.gguf", "gguf")
        assert "output.weight" not in tensors(told.path)
        assert len(told.packed) == 8 - dense and len(told.dense) == dense
        assert distance(by_llama_cpp(told.path, ids[0]), logits(model, ids)[0]) < BOUND


def test_rotary_frequencies_of_llama_3_are_written(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    rope["original_max_position_embeddings"] = 16
    model, ids = under(make("llama", rope_parameters=rope), "mxfp4"), rows(1, 48)
    told = lotion_fx.export(model, tmp_path / "model.gguf", "gguf")
    assert tensors(told.path)["rope_freqs.weight"].data.max() == 8
    assert distance(by_llama_cpp(told.path, ids[0]), logits(model, ids)[0]) < BOUND


def test_rows_that_are_no_whole_blocks_are_dense_and_said_so(tmp_path):
    model = under(make("llama", width=96, intermediate_size=64), "nvfp4/pow2")
    told = lotion_fx.export(model, tmp_path / "model.gguf", "gguf")
    assert list(told.packed) == ["model.layers.0.mlp.down_proj.weight"]
    assert told.dense["lm_head.weight"] == "its rows have 96 weights, and NVFP4 wants a multiple of 64"
    read = tensors(told.path)["output.weight"].data
    np.testing.assert_array_equal(read, lotion_fx.quantized(model)["lm_head.weight"].dequantize().numpy())


@pytest.mark.parametrize(
    ("fmt", "message"),
    [
        ("int4", "block scales are no float16 numbers, which is what ggml stores; train with int4/32/fp16"),
        ("int8/32", "train with int8/32/fp16"),
        ("nvfp4", "no power of two: .* train with nvfp4/pow2"),
        ("nf4", "no place for .* in nf4: ggml has no type .*; train with int4/32/fp16"),
    ],
)
def test_a_format_without_a_place_is_refused(tmp_path, fmt, message):
    model = under(make("llama"), fmt)
    with pytest.raises(ValueError, match=message):
        lotion_fx.export(model, tmp_path / "model.gguf", "gguf")
    assert not any(tmp_path.iterdir())


def test_other_blocks_grids_and_scales_have_no_type():
    from lotion_fx.deploy.layouts import ggml_blocks

    for fmt in ("int4/64/fp16", "int4/channel", "int8", "int3", "fp4", "fp8", "mxfp6", "mxfp8"):
        assert "train with" in ggml_blocks.refusal(lotion_fx.numerics.formats.resolve(fmt)), fmt


def test_scales_that_happen_to_be_float16_are_taken(tmp_path):
    model = make("llama")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                p.copy_(p.clamp(-1, 1).mul_(2).round_().div_(4))
                p[:, ::32] = 7 / 16  # the largest of each block: its scale is 1 / 16
    lotion_fx.transform(model, "int4", inner="eager").eval()(rows(1))
    assert len(lotion_fx.export(model, tmp_path / "model.gguf", "gguf").packed) == 8


def test_models_that_llama_cpp_computes_otherwise_are_refused(tmp_path):
    from lotion_fx.deploy.layouts.gguf_models import Architecture

    with pytest.raises(ValueError, match="GPT-2 without the tensor scale of NVFP4; train with mxfp4"):
        lotion_fx.export(under(make("gpt2"), "nvfp4/pow2"), tmp_path / "model.gguf", "gguf")
    with pytest.raises(ValueError, match="its activation is 'gelu'"):
        Architecture(make("llama", hidden_act="gelu"))
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    with pytest.raises(ValueError, match="rotary embedding is of type 'yarn'"):
        Architecture(make("llama", rope_parameters=yarn))
    with pytest.raises(ValueError, match="sliding_window is 8"):
        Architecture(make("mixtral", sliding_window=8))
    plain = lotion_fx.transform(nn.Linear(64, 64), "mxfp4", inner="eager").eval()
    plain(torch.randn(2, 64))
    with pytest.raises(ValueError, match="not Linear; layout='lotion' takes any"):
        lotion_fx.export(plain, tmp_path / "model.gguf", "gguf")


def test_a_changed_code_is_seen(tmp_path, monkeypatch):
    from lotion_fx.deploy.layouts import ggml_blocks

    relaid = ggml_blocks.relaid

    def wrong(name, weight):
        blocks = relaid(name, weight)
        if "down_proj" in name:
            blocks.rows[3, 5] ^= 1
        return blocks

    monkeypatch.setattr(ggml_blocks, "relaid", wrong)
    with pytest.raises(ValueError, match="reads another 'model.layers.0.mlp.down_proj.weight' than was trained"):
        lotion_fx.export(under(make("llama"), "mxfp4"), tmp_path / "model.gguf", "gguf")


# ------------------------------------------------------------------------------------------------------- the tokenizer


def tokenizer(pattern=None):
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"), split])
    made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the cat sat on the mat, and 12345 others didn't; there they sat"] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>")


@pytest.mark.parametrize("which", [None, 0, 1])
def test_llama_cpp_splits_text_as_the_tokenizer_does(tmp_path, which):
    from lotion_fx.deploy.layouts.gguf_tokenizer import PRE_TOKENIZERS

    llama_cpp = pytest.importorskip("llama_cpp")
    pattern = None if which is None else list(PRE_TOKENIZERS)[which]
    made, model = tokenizer(pattern), under(make("llama", vocab_size=330), "mxfp4")
    lotion_fx.export(model, tmp_path / "model.gguf", "gguf", tokenizer=made)
    client = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    for text in ("the cat sat, 123456 of them didn't", " there\n\n  they Sat; été 日本 \U0001f600", "<s>the mat"):
        expected = made(text)["input_ids"]
        assert client.tokenize(text.encode(), add_bos=False, special=True) == expected
        assert client.detokenize(expected, special=True).decode() == text
    client.close()


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    model = under(make("llama", vocab_size=330), "mxfp4")
    with pytest.raises(ValueError, match="pass pre_tokenizer="):
        lotion_fx.export(model, tmp_path / "model.gguf", "gguf", tokenizer=tokenizer(r"\p{L}+|\p{N}+"))
    made = tokenizer(r"\p{L}+|\p{N}+")
    lotion_fx.export(model, tmp_path / "model.gguf", "gguf", tokenizer=made, pre_tokenizer="default")
    told = json.loads(made.backend_tokenizer.to_str())
    told["pre_tokenizer"] = {"type": "Whitespace"}
    made.backend_tokenizer.pre_tokenizer = type(made.backend_tokenizer).from_str(json.dumps(told)).pre_tokenizer
    with pytest.raises(ValueError, match="writes byte-level BPE"):
        lotion_fx.export(model, tmp_path / "model.gguf", "gguf", tokenizer=made)
    with pytest.raises(ValueError, match=f"a vocabulary of {VOCAB}"):
        lotion_fx.export(under(make("llama"), "mxfp4"), tmp_path / "m.gguf", "gguf", tokenizer=tokenizer())


# ------------------------------------------------------------------------------------------------------ the whole table


@pytest.mark.slow
@pytest.mark.parametrize("fmt", TYPES)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mixtral"])
def test_the_table_of_llama_cpp(tmp_path, kind, fmt):
    if (kind, fmt) == ("gpt2", "nvfp4/pow2"):
        pytest.skip("refused")
    model, ids = under(make(kind, layers=2), fmt), rows(1, 48)
    told = lotion_fx.export(model, tmp_path / "model.gguf", "gguf")
    assert all(".mlp.gate." in name for name in told.dense)
    expected = logits(model, ids)[0]
    each = (by_llama_cpp(told.path, ids[0]) - expected).norm(dim=-1) / expected.norm(dim=-1)
    # Mixtral: a token whose router takes the other of two equal experts is .2 off, and those after it attend to it.
    assert each.median() < (2 * BOUND if kind == "mixtral" else BOUND)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["int4/32/fp16", "int8/32/fp16", "mxfp4"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_transformers_reads_the_same_model(tmp_path, kind, fmt):
    import transformers

    options = {"head_dim": 128} if kind == "qwen3" else {}  # which transformers does not read from the file
    model, ids = under(make(kind, **options), fmt), rows(1)
    told = lotion_fx.export(model, tmp_path / "model.gguf", "gguf")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=told.path.name, dtype=torch.float32)
    assert torch.equal(logits(read, ids), logits(model, ids))


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["int4/32/fp16", "mxfp4", "nvfp4/pow2"])
def test_llama_cpp_generates_the_tokens_that_eval_does(tmp_path, fmt):
    llama_cpp = pytest.importorskip("llama_cpp")
    data = rows(4, 48)  # learned by heart, so that the next token is far ahead of all others
    model = trained(make("llama", layers=2), fmt, steps=150, data=data)
    told = lotion_fx.export(model, tmp_path / "model.gguf", "gguf")
    for row in data:
        ids = row[:8].tolist()
        expected, margin = list(ids), float("inf")
        for _ in range(32):
            first, second = logits(model, torch.tensor([expected]))[0, -1].topk(2)[0].tolist()
            margin = min(margin, first - second)
            expected.append(int(logits(model, torch.tensor([expected]))[0, -1].argmax()))
        client = llama_cpp.Llama(str(told.path), n_ctx=64, verbose=False, n_threads=1, type_k=0, type_v=0)
        found = list(ids)
        for token in client.generate(ids, temp=0.0, repeat_penalty=1.0):
            found.append(token)
            if len(found) == len(expected):
                break
        client.close()
        assert found == expected, f"the smallest margin of a token is {margin:.3f}"
