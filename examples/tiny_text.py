"""What the examples that deploy start from: a language model of one layer, after five steps on Python's own source."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lotion_fx

LENGTH = 32


def text(rows: int, start: int = 0) -> Tensor:
    """Bytes of functools.py as token ids, int64 [rows, 32]."""
    with open(functools.__file__, "rb") as file:
        found = torch.tensor(list(file.read()))
    return found[start : start + rows * LENGTH].reshape(rows, LENGTH)


def trained(fmt: str) -> LlamaForCausalLM:
    """A Llama of width 64 after five steps, in eval(), at its rounded weights."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 256}
    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, **special))
    lotion_fx.transform(model, fmt, inner="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(5):
        batch = text(8, start=step * 8 * LENGTH)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
