"""Accelerate: one line differs from a plain loop of it, that with `lotion_fx`. `save_state` and `load_state` need none.

python examples/with_accelerate.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import lotion_fx


def main(folder: str = "build/with_accelerate", steps: int = 40, resume: bool = False) -> nn.Module:
    torch.manual_seed(0)
    x, accelerator = torch.randn(512, 20), Accelerator()
    model = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 7))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :7].argmax(1)), batch_size=32)

    lotion_fx.transform(model, "int4", finish=0.4, steps=40)
    model, optimizer, data = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3), data)
    if resume:
        accelerator.load_state(folder)
    for _ in range(steps // len(data)):
        for inputs, targets in data:
            accelerator.backward(F.cross_entropy(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state(folder)
    return model


if __name__ == "__main__":
    print(lotion_fx.report(main()))
