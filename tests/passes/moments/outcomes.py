"""What the moment rules say of a function, and every outcome of its few two-point variables."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from lotion_fx import private
from lotion_fx.passes.moments import random_tensor
from lotion_fx.passes.moments.interpret import interpret
from lotion_fx.passes.moments.random_tensor import Random

Function = Callable[..., Tensor]


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(function: Function, *inputs: Tensor, spread: float = 0.3) -> tuple[Random, list[Tensor]]:
    """What the rules say of a function whose inputs are independent, with their standard deviations."""
    deviations = [spread * (0.5 + torch.rand_like(x)) for x in inputs]
    gm = private.trace(lambda *args: [function(*args)], inputs)
    values = [
        random_tensor.weight(str(i), x, d.square()) for i, (x, d) in enumerate(zip(inputs, deviations, strict=True))
    ]
    out = interpret(gm, values).outputs[0]
    assert isinstance(out, Random)
    return out, deviations


def all_outcomes(function: Function, inputs: tuple[Tensor, ...], deviations: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance over every outcome of variables that are x - d or x + d, each with probability 1/2."""
    x, d = (torch.cat([t.flatten() for t in group]) for group in (inputs, deviations))
    assert len(x) <= 12
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(x))), dtype=x.dtype)

    def at(flat: Tensor) -> Tensor:
        parts = flat.split([t.numel() for t in inputs])
        return function(*(part.view(t.shape) for part, t in zip(parts, inputs, strict=True)))

    values = torch.stack([at(x + sign * d) for sign in signs])
    return values.mean(0), values.var(0, correction=0)


X, W, B = double(2, 3), double(2, 3, seed=1), double(2, seed=2)
IMAGE, KERNEL = double(2, 2, 4, 4), double(2, 1, 2, 2, seed=1)
COLUMN = double(3, 1, seed=5)
# Constants are made here: drawn inside a traced function they would be drawn again.
C2, C3, C4, C5, C6, M22, M23, M55 = (
    double(*shape, seed=7) for shape in ((2,), (3,), (4,), (5,), (6,), (2, 2), (2, 3), (5, 5))
)
TALL, STACK = double(40, 2, seed=7), double(2, 2, 4, seed=7)
C3P, SIGNAL, THREE = C3.square() + 0.5, double(1, 2, 5), torch.tensor(3.0, dtype=torch.float64)
LOGITS, LABELS = double(4, 5), torch.tensor([1, 0, -100, 4])
