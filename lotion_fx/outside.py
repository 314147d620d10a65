"""Weights that no graph contains: recurrent modules, which Dynamo skips, and whatever a graph break leaves to Python.

Their expected-loss term takes the Fisher form at the step. What is left is that a forward outside of training must run
at rounded weights as everywhere, so their values are swapped for the length of the call; and that T, where no joint
graph counts it, is counted at the model's output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from lotion_fx import rounding
from lotion_fx.passes.smooth import LATENT, RR
from lotion_fx.state import Smoothing, Weight


def watch(call: Callable[..., Any], smoothing: Smoothing) -> Callable[..., Any]:
    """Wraps a transformed model's forward, so that no weight is left out because no graph contains it.

    The call raises ValueError where such a weight needs a rounded training forward, or is sharded.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        smoothing.told = False
        first = smoothing.unreached is None
        with _rounded(_still_unreached(smoothing)):
            out = call(*args, **kwargs)
        if first:
            smoothing.unreached = [w for w in smoothing.weights if w.selected and w.uses is None]
            if any(_mode(weight) != LATENT for weight in smoothing.unreached):
                with _rounded(smoothing.unreached):  # which weights it leaves out, only a first forward could tell
                    out = call(*args, **kwargs)
        if not smoothing.told and smoothing.has_term and torch.is_grad_enabled():
            _count_rows(out, smoothing)
        return out

    return forward


def _still_unreached(smoothing: Smoothing) -> list[Weight]:
    if smoothing.unreached:
        smoothing.unreached = [weight for weight in smoothing.unreached if weight.uses is None]
    return smoothing.unreached or []


def _mode(weight: Weight) -> str:
    """The forward that a weight is to take now."""
    smoothing = weight.smoothing
    # Finishing begins in the middle of a training: what no graph contains goes on at its latent values there.
    training = LATENT if smoothing.finishing else smoothing.forward_mode
    return smoothing.override or (training if weight.training else "rtn")


@contextlib.contextmanager
def _rounded(weights: list[Weight]) -> Iterator[None]:
    latent: list[tuple[Tensor, Tensor]] = []
    try:
        for weight in weights:
            mode, parameter = _mode(weight), weight.held()
            if mode == LATENT or parameter is None or weight.format is None:
                continue
            if weight.training and not weight.smoothing.override:
                raise ValueError(
                    f"method={weight.smoothing.method!r} needs a rounded training forward, and no compiled graph "
                    f"contains {weight.name!r}; use method='lotion', or leave it out: only={{{weight.name!r}: None}}"
                )
            if isinstance(parameter, DTensor):
                raise ValueError(f"no compiled graph contains {weight.name!r}, and it is sharded: put it into regions=")
            rounding_of = rounding.rr if mode == RR else rounding.rtn
            latent.append((parameter, parameter.data))
            parameter.data = rounding_of(parameter.detach(), weight.format, weight.axis)
        yield
    finally:
        for parameter, values in latent:
            parameter.data = values


def _count_rows(out: Any, smoothing: Smoothing) -> None:
    """T is the number of rows with non-zero gradient in the first output that has rows."""
    for leaf in tree_leaves(out):
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.dim() > 1:
            leaf.register_hook(smoothing.count_rows)
            return
