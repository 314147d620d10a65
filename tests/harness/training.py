"""Training steps that two ways of compiling them must agree on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Step = dict[str, list[Tensor]]

STRENGTH = 100.0  # makes the term a good part of the gradient


def train(model: nn.Module, loss_of: Callable[[nn.Module, Tensor], Tensor], batches: Iterable[Tensor]) -> Step:
    """Trains a transformed model a few steps.

    Returns:
        Losses of all steps; of the last one each parameter's gradient, what the term added to it, and the new value.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.03)
    losses, gradients = [], []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.detach())
        gradients = [p.grad.clone() for p in parameters]
        optimizer.step()
    terms = [p.grad - gradient for p, gradient in zip(parameters, gradients, strict=True)]
    return {"losses": losses, "gradients": gradients, "terms": terms, "parameters": [p.data for p in parameters]}


def assert_same(found: Step, expected: Step, term: bool) -> None:
    """To 1e-5 of the largest element of each tensor; the term, where there is one, is no negligible part."""
    for name in expected:
        for at, (a, b) in enumerate(zip(found[name], expected[name], strict=True)):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max(), f"{name} {at}"
    shares = [t.abs().max() / g.abs().max() for t, g in zip(expected["terms"], expected["gradients"], strict=True)]
    assert (max(shares) > 0.1) == term
