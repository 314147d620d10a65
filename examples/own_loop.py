"""A loop of your own: three lines differ from plain PyTorch, those with `lotion_fx`.

python examples/own_loop.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import lotion_fx


def main() -> None:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    )

    lotion_fx.transform(model, "int2", noise="adaptive", schedule="auto", steps=300)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        rows = torch.randint(1500, (64,))
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    print(lotion_fx.report(model))
    batches = [(images[rows], labels[rows]) for rows in torch.arange(1500).split(188)]
    print(lotion_fx.round_(model, batches, F.cross_entropy, method="descent"))
    model.eval()  # from here on the forward pass is at the weights that will be deployed
    with torch.no_grad():
        hits = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    print(f"accuracy with 2-bit weights on the last 297 digits: {hits:.1%}")


if __name__ == "__main__":
    main()
