"""TRL's SFTTrainer: one line differs, that with `lotion_fx`.

python examples/with_trl.py
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import lotion_fx


def main(folder: str = "build/with_trl", steps: int = 20, accumulation: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=2))
    rows = torch.randint(3, 64, (256, 16), generator=torch.Generator().manual_seed(0)).tolist()
    words = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="2"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="0", eos_token="1", pad_token="2")

    lotion_fx.transform(model, "int4")
    arguments = SFTConfig(
        folder,
        max_steps=steps,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        bf16=False,
        report_to=[],
        save_strategy="no",
    )
    SFTTrainer(
        model, arguments, train_dataset=Dataset.from_dict({"input_ids": rows}), processing_class=tokenizer
    ).train()
    return model


if __name__ == "__main__":
    print(lotion_fx.report(main()))
