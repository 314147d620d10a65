"""What the basin is looked at of: a convolutional network of handwritten digits, and a byte-level language model."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lotion_fx.examples import quickstart

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its data and its loss, in nats.

    Args:
        build: a fresh model, by torch's own seed.
        train, sample, held_out: all training data that batches are drawn from, a part of it that the loss is looked at
            on, and what is kept back; each inputs and targets.
        rows: of a training batch.
        rate: Adam's learning rate for the plain training; the fine-tuning takes a third of it.
    """

    name: str
    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    train: Batch
    sample: Batch
    held_out: Batch
    rows: int
    rate: float

    def batches(self, seed: int) -> Iterator[Batch]:
        """Training batches without end."""
        draw = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(self.train[0]), (self.rows,), generator=draw)
            yield self.train[0][chosen], self.train[1][chosen]


def convnet() -> nn.Module:
    """Three convolutions over images of 8 x 8, and a linear layer."""
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))


def digits() -> Task:
    """scikit-learn's 1797 digits."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, sample, held_out = ((images[at], labels[at]) for at in (order[:1400], order[:512], order[1400:]))
    return Task("digits", convnet, F.cross_entropy, train, sample, held_out, rows=64, rate=3e-3)


def language() -> Task:
    """A GPT of width 32 on the Python sources at hand; each next byte of 64."""
    kept, other = (quickstart.tokens(files) for files in quickstart.split_files(quickstart.source_files(_library())))
    train, sample, held_out = (_pairs(*part) for part in ((kept, 8192), (kept, 32), (other, 64)))
    return Task("language", gpt, quickstart.cross_entropy, train, sample, held_out, rows=16, rate=1e-2)


def gpt() -> nn.Module:
    return quickstart.GPT(width=32, depth=1, heads=2)


def _pairs(text: Tensor, count: int) -> Batch:
    windows = quickstart.spread_windows(text, count)
    return windows[:, :-1], windows[:, 1:]


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


TASKS = {"digits": digits, "language": language}
