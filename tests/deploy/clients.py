"""Tiny Hugging Face models, trained a few steps, and what a client's model is compared with."""

from __future__ import annotations

import copy
from typing import Any

import torch

import lotion_fx
from lotion_fx.deploy.content import plain_copy
from lotion_fx.deploy.weights import quantized

VOCAB = 64
KINDS = ("llama", "qwen3", "bert", "gpt2", "mixtral")


def tiny(kind: str, hidden: int = 64, layers: int = 1) -> Any:
    """One of `KINDS`, its parameters random, the same ones at each call."""
    import transformers as hf

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 64}
    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**shape, **special, num_key_value_heads=2))
    if kind == "qwen3":
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(**shape, **special, num_key_value_heads=2, head_dim=16))
    if kind == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(**shape))
    if kind == "gpt2":
        special["tie_word_embeddings"] = False  # with it nothing but Conv1D would be left
        own = {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": 64}
        config = hf.GPT2Config(vocab_size=VOCAB, **own, **special)
        model = hf.GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"  # of its own accord it logs, which breaks the graph
        return model
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**shape, **special, **experts))
    model.set_experts_implementation("batched_mm")
    return model


def ids(rows: int = 2, length: int = 12, seed: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def trained(kind: str, fmt: Any, dtype: torch.dtype = torch.float32, steps: int = 1, **options: Any) -> Any:
    """A tiny model after a few steps of AdamW under `transform`, in eval()."""
    model = lotion_fx.transform(tiny(kind).to(dtype), fmt, inner="aot_eager", **options)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        batch = ids(seed=step)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def loaded(model: Any, folder: Any, **load: Any) -> Any:
    """What `from_pretrained` makes of an exported model, by default with no argument at all."""
    made = type(model).from_pretrained(folder, **load).eval()
    if model.config.model_type == "mixtral":
        made.set_experts_implementation("batched_mm")
    return made


def reference(model: Any, folder: Any, dtype: torch.dtype) -> Any:
    """The model at its rounded weights in a dense checkpoint, loaded as a client's: buffers keep their dtypes."""
    plain_copy(model, quantized(model)).save_pretrained(folder)
    return loaded(model, folder, dtype=dtype)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def tokens(model: Any, count: int = 8) -> torch.Tensor:
    """What it says next, greedily."""
    settings = copy.deepcopy(model.generation_config)
    settings.update(do_sample=False, max_new_tokens=count, min_new_tokens=count)
    with torch.no_grad():
        return model.generate(ids(), generation_config=settings, attention_mask=torch.ones_like(ids()))


def assert_same(model: Any, folder: Any, computed: torch.dtype, bound: float = 0.0, **load: Any) -> None:
    """A client's model of ``folder / "packed"`` is the trained one: parameters, logits, tokens.

    Args:
        computed: the dtype of the model that is loaded.
        bound: of the difference of logits, relative to the largest; weights and tokens are equal in any case.
    """
    made, wanted = loaded(model, folder / "packed", **load), reference(model, folder / "dense", computed)
    assert made.dtype == computed
    found, expected = logits(made), logits(wanted)
    assert (found - expected).abs().max() <= bound * expected.abs().max()
    parameters = dict(made.named_parameters())
    for name, parameter in wanted.named_parameters():
        read = parameters[name].data
        read = read.dequantize() if hasattr(read, "dequantize") and type(read) is not torch.Tensor else read
        assert read.dtype == computed and torch.equal(read, parameter), name
    if wanted.can_generate():
        assert torch.equal(tokens(made), tokens(wanted))
