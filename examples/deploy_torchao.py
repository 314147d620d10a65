"""torchao: a checkpoint that transformers loads as torchao's tensors, at the weights that were trained, bit for bit.

python examples/deploy_torchao.py
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

import lotion_fx
from lotion_fx.examples.tiny_text import text, trained


def main(folder: str = "build/deploy_torchao") -> bool:
    model = trained("nvfp4")
    print(lotion_fx.export(model, folder, layout="torchao"))

    loaded = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return torch.equal(loaded(text(2)).logits, model(text(2)).logits)


if __name__ == "__main__":
    print("the same logits, bit for bit:", main())
