"""Small transformers language models, trained a few steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lotion_fx

VOCAB = 96


def make(kind: str, layers: int = 1, width: int = 64, **options: Any) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    if kind == "gpt2":
        special = {"bos_token_id": 0, "eos_token_id": 0}
        model = hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=VOCAB, n_embd=width, n_layer=layers, n_head=2, n_positions=64, **special, **options
            )
        )
        model.loss_type = "ForCausalLM"  # else a call that logs breaks the graph
        return model
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "vocab_size": VOCAB}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, **options}
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**shape))
    if kind == "qwen3":
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(**{"head_dim": width // 4, **shape}))
    assert kind == "mixtral"
    model = hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **shape))
    model.set_experts_implementation("batched_mm")
    return model


def rows(count: int = 2, length: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def under(model: Any, fmt: str, **options: Any) -> Any:
    """A transformed model in eval(), whose every parameter differs from its initial value: no norm is all ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        lotion_fx.transform(model.eval(), fmt, inner="eager", **options)
        model(input_ids=rows())
    return model


def trained(model: Any, fmt: str, steps: int, data: Tensor, lr: float = 1e-2) -> Any:
    lotion_fx.transform(model, fmt, inner="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for _ in range(steps):
        model(input_ids=data, labels=data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())
