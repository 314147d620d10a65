"""The model and the data of the examples that show a pipeline: a language model of one layer, and random tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 64  # 0, 1 and 2 begin, end and fill


def llama() -> LlamaForCausalLM:
    """A Llama of width 32, the same one at each call."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, vocab_size=VOCAB, **special))


def rows(count: int) -> Tensor:
    """Token ids [count, 16], int64, the same ones at each call."""
    return torch.randint(3, VOCAB, (count, 16), generator=torch.Generator().manual_seed(0))
