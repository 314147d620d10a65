"""`round_`'s rounds: codes changed by the gradient that the loss has at the rounded weights.

Curvature is read where the model is not rounded, layer by layer; what layers do to each other, and what is not of
second order, it does not know. The gradient at the rounded weights does. So each round takes one, over all batches,
changes codes of all weights by it and by the curvature, and is kept if the batches' loss has fallen; else the next one
is more careful. The curvature has no unit of its own: how far the gradient moved from the latent weights to the rounded
ones gives it one (Levenberg 1944, Marquardt 1963, for codes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lotion_fx.loss_graph import LossGraph
from lotion_fx.numerics.adaptive import Curvature, stepped, stiffness
from lotion_fx.numerics.formats import Format
from lotion_fx.progress import with_a_bar

CAREFUL = 10.0  # times the stiffness, in the first round; the layers' changes add up, and each knows of itself alone
BOLDER, MORE_CAREFUL = 1 / 1.5, 4.0  # after a round that was kept, and after one that was not
BOLDEST = 0.1  # below which no code is changed for the sake of a change


class Known(NamedTuple):
    """What a round knows of a weight: what it is rounded from, its format and axis, and the view of its curvature.

    Args:
        latent: shifted, where it makes up for others.
        scaled_as: what its scales are made of.
    """

    latent: Tensor
    format: Format
    axis: int
    shape: tuple[int, int, int]
    curvature: Curvature
    scaled_as: Tensor


def refined(
    graphs: Sequence[LossGraph],
    known: Mapping[str, Known],
    latent: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    rounds: int,
    goal: float,
) -> dict[str, Tensor]:
    """The rounded values after so many rounds, or fewer where the batches' loss is down at a goal.

    Args:
        graphs: of the loss, a batch each.
        known: the weights whose codes are changed, by name.
        latent: these as they were before rounding.
        values: of all rounded weights.
        goal: what the loss was before rounding: below it rounds would learn the batches by heart.
    """
    wanted = list(known)
    before, _ = _gradients(graphs, {name: latent[name] for name in wanted}, wanted)
    values = dict(values)
    gradients, loss = _gradients(graphs, values, wanted)
    units = {}
    for name, each in known.items():
        error = (latent[name] - values[name]).reshape(each.shape)
        units[name] = stiffness(error, each.curvature, (gradients[name] - before[name]).reshape(each.shape))
    care = CAREFUL
    for _ in with_a_bar("rounds", range(rounds), rounds):
        if loss <= goal:
            break
        tried = _stepped(known, values, gradients, units, care)
        while care > BOLDEST and all(torch.equal(tried[name], values[name]) for name in wanted):
            care *= BOLDER  # levels are so far apart that no change pays, at such care
            tried = _stepped(known, values, gradients, units, care)
        found, now = _gradients(graphs, tried, wanted)
        if now < loss:
            values, gradients, loss, care = tried, found, now, care * BOLDER
        else:
            care *= MORE_CAREFUL
    return values


def _stepped(
    known: Mapping[str, Known],
    values: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    units: Mapping[str, float],
    care: float,
) -> dict[str, Tensor]:
    """All values, those of known weights changed by the gradients."""
    steps = {
        name: stepped(each.latent, values[name], *each[1:5], gradients[name], care * units[name], each.scaled_as)
        for name, each in known.items()
        if units[name] > 0
    }
    return {**values, **steps}


def _gradients(
    graphs: Sequence[LossGraph], values: Mapping[str, Tensor], wanted: Sequence[str]
) -> tuple[dict[str, Tensor], float]:
    """The mean loss of the batches with some parameters replaced, and its gradient by those wanted, float64."""
    sums = {name: torch.zeros_like(values[name], dtype=torch.float64) for name in wanted}
    loss = 0.0
    for graph in graphs:
        leaves = {name: values[name].detach().clone().requires_grad_() for name in wanted}
        with torch.enable_grad():
            found = graph.loss({**values, **leaves})
            gradients = torch.autograd.grad(found, list(leaves.values()), allow_unused=True)
        loss += float(found) / len(graphs)
        for name, gradient in zip(wanted, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient.double() / len(graphs)
    return sums, loss
