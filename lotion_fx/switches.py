"""What a user switches while training: the finishing phase, and the forward inside a context."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from lotion_fx.passes.attach.attach import LATENT, RR
from lotion_fx.scalars import check_flag
from lotion_fx.state import smoothings_of, weights_of


def finish(model: nn.Module, *, term: bool = True) -> None:
    """Moves the training forward to rounded weights for the last part of training, scales differentiated.

    Args:
        term: whether the expected-loss term stays on.
    """
    weights_of(model)
    check_flag("term", term)
    for smoothing in smoothings_of(model):
        smoothing.tally.measuring.put_back()
        smoothing.tally.finish(term=term)


@contextlib.contextmanager
def full_precision(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, forwards run at the latent weights, whatever the mode and method."""
    weights_of(model)
    with switched(model, override=LATENT):
        yield model


@contextlib.contextmanager
def randomized(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, every forward runs at a fresh randomized rounding of the weights."""
    weights_of(model)
    with switched(model, override=RR):
        yield model


@contextlib.contextmanager
def switched(model: nn.Module, **fields: Any) -> Iterator[None]:
    """Inside, some fields of the `Tally` of everything smoothed in a model have other values."""
    with contextlib.ExitStack() as stack:
        for smoothing in smoothings_of(model):
            stack.enter_context(smoothing.tally.switched(**fields))
        yield
