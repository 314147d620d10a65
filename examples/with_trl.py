"""TRL's SFTTrainer: one line differs, that with `lotion_fx`.

python examples/with_trl.py
"""

from __future__ import annotations

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import lotion_fx
from lotion_fx.examples.tiny import VOCAB, llama, rows


def main(folder: str = "build/with_trl", steps: int = 20, accumulation: int = 1) -> LlamaForCausalLM:
    model = llama()
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="2"))
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
        model, arguments, train_dataset=Dataset.from_dict({"input_ids": rows(256).tolist()}), processing_class=tokenizer
    ).train()
    return model


if __name__ == "__main__":
    print(lotion_fx.report(main()))
