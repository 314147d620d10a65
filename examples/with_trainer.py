"""Hugging Face's Trainer: one line differs, that with `lotion_fx`. A resume needs none.

python examples/with_trainer.py
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lotion_fx


def main(folder: str = "build/with_trainer", steps: int = 40, resume: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=2))
    rows = torch.randint(3, 64, (256, 16), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]

    lotion_fx.transform(model, "int4", finish=0.4, steps=40)
    arguments = TrainingArguments(
        folder, max_steps=steps, save_steps=10, learning_rate=1e-2, lr_scheduler_type="constant", report_to=[]
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return model


if __name__ == "__main__":
    print(lotion_fx.report(main()))
