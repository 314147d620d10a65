"""compressed-tensors: a checkpoint that transformers and vLLM load, at the weights that were trained, bit for bit.

python examples/deploy_compressed_tensors.py
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

import lotion_fx
from lotion_fx.examples.tiny_text import text, trained


def main(folder: str = "build/deploy_compressed_tensors") -> bool:
    model = trained("int4/bf16")  # with bfloat16 scales, which survive a client's cast
    print(lotion_fx.export(model, folder, layout="compressed-tensors"))

    loaded = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return torch.equal(loaded(text(2)).logits, model(text(2)).logits)


if __name__ == "__main__":
    print("the same logits, bit for bit:", main())
