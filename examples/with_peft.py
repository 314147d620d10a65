"""PEFT: a LoRA trained against its base at the 4 bits that will be deployed, then merged, and rounded again.

python examples/with_peft.py
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lotion_fx


def main(steps: int = 40) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    base = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=2))
    batch = torch.randint(3, 64, (16, 16), generator=torch.Generator().manual_seed(0))

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
