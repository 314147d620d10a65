"""PEFT: a LoRA trained against its base at the 4 bits that will be deployed, then merged, and rounded again.

python examples/with_peft.py
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import lotion_fx
from lotion_fx.examples.tiny import llama, rows


def main(steps: int = 40) -> Any:
    base, batch = llama(), rows(16)

    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    lotion_fx.transform(model, "int4")  # the frozen base runs rounded; adapters stay in full precision
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(steps):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    trained = main()
    print(lotion_fx.report(trained))  # what a server of base and adapter computes in eval()
    merged = trained.merge_and_unload()  # what one without adapters does: the merged weights are rounded
    print(lotion_fx.report(merged.eval()))
