"""bitsandbytes: a checkpoint that transformers loads as Linear4bit, at the weights that were trained, bit for bit.

In eval() bitsandbytes may multiply in bfloat16, on CPUs that can: then logits are near, and in train() equal.

python examples/deploy_bitsandbytes.py
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

import lotion_fx
from lotion_fx.examples.tiny_text import text, trained


def main(folder: str = "build/deploy_bitsandbytes") -> bool:
    model = trained("nf4")
    print(lotion_fx.export(model, folder, layout="bitsandbytes"))

    loaded = LlamaForCausalLM.from_pretrained(folder).train()  # a Llama drops nothing out
    with torch.no_grad():
        return torch.equal(loaded(text(2)).logits, model(text(2)).logits)


if __name__ == "__main__":
    print("the same logits, bit for bit:", main())
