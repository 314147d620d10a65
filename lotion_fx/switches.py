"""What a user switches while training: the last phase, and the forward inside a context."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from lotion_fx.passes.attach.attach import LATENT, RR
from lotion_fx.scalars import check_flag
from lotion_fx.scale_training import check_scales
from lotion_fx.state import smoothings_of, weights_of


def finish(model: nn.Module, *, term: bool = True) -> None:
    """Moves the training forward to rounded weights for the last part of training, scales differentiated.

    An optimizer's state holds this from its next step on, as it holds all that a resume needs.

    Args:
        term: whether the expected-loss term stays on.
    """
    weights_of(model)
    check_flag("term", term)
    for smoothing in smoothings_of(model):
        smoothing.tally.measuring.holding.put_back()
        smoothing.tally.enter("finish" if term and smoothing.settings.schedule.has_term else "ste_scale")


def hold_codes(model: nn.Module) -> None:
    """From the next step on each weight keeps its codes, and the scale of each block is trained.

    For the last part of a training, best after `round_`, whose cancelling errors stay as they are; beside all that is
    not quantized. Forwards run at the rounded weights. The optimizer is the one that trains the weights, and its
    learning rate is still that of weights, of which a scale follows the mean. As a part of a schedule, or of a training
    of its own, it is the phase ``"scales"``. Of scales that are powers of two none moves. An optimizer's state holds
    this from its next step on.

    Raises:
        ValueError: all of the model's scales are powers of two, or a format's levels reach further on one side of zero,
            and a block may change when it is rounded again.
    """
    check_scales(weight for weight in weights_of(model) if weight.selected)
    for smoothing in smoothings_of(model):
        smoothing.tally.measuring.holding.put_back()
        smoothing.tally.enter("scales")


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
