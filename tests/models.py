"""Small models and batches that several tests share."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx

VOCAB = 23

counted = partial(lotion_fx.transform, calibrate=False)
"""`lotion_fx.transform` with the term at its counted size, from the first step on."""


class MLP(nn.Module):
    """Two linear layers of odd sizes."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(20, 33, bias=bias)
        self.down = nn.Linear(33, 7, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class LM(nn.Module):
    """Embedding, a residual block, a head: the parts of a language model, none of its cost."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCAB, 16)
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16))
        self.head = nn.Linear(16, VOCAB, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        return self.head(self.norm(x + self.mlp(x)))


def ids(batch: int = 8, length: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def lm_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean next-token loss, the targets being the inputs shifted around."""
    return F.cross_entropy(model(batch).flatten(0, 1), batch.roll(-1, 1).flatten())
