"""Hugging Face's Trainer: one line differs, that with `lotion_fx`. A resume needs none.

python examples/with_trainer.py
"""

from __future__ import annotations

from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import lotion_fx
from lotion_fx.examples.tiny import llama, rows


def main(folder: str = "build/with_trainer", steps: int = 40, resume: bool = False) -> LlamaForCausalLM:
    model = llama()
    data = [{"input_ids": row, "labels": row} for row in rows(256)]

    lotion_fx.transform(model, "int4", finish=0.4, steps=40)
    arguments = TrainingArguments(
        folder, max_steps=steps, save_steps=10, learning_rate=1e-2, lr_scheduler_type="constant", report_to=[]
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return model


if __name__ == "__main__":
    print(lotion_fx.report(main()))
