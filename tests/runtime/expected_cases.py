"""Models with every rounding enumerated, and batches of a small language model, for expected losses and calibration."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx
from tests.enumeration import expectation, unbiased
from tests.models import ids


def affine(sizes: list[int], bias: bool, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(sizes))).double()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.dim() == 2}


def enumerated(model: nn.Module, x: Tensor, y: Tensor, fmt: str, loss_fn=F.mse_loss, up=unbiased) -> Tensor:
    weights = weights_of(model)
    fixed = {name: p for name, p in model.named_parameters() if name not in weights}

    def loss(values: list[Tensor]) -> Tensor:
        parameters = {**fixed, **dict(zip(weights, values, strict=True))}
        return loss_fn(torch.func.functional_call(model, parameters, (x,)), y)

    with lotion_fx.full_precision(model):
        return expectation(loss, list(weights.values()), lotion_fx.resolve(fmt), up)


def lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def lm_batch(seed: int) -> tuple[Tensor, Tensor]:
    tokens = ids(16, 6, seed)
    return tokens, tokens.roll(-1, 1)
