"""What a training loop does by hand: its updates, or data parallelism, averaging ``.grad`` over processes itself.

Of the latter nothing tells who the others are, and a collective of ours would hang where they do not train. So a
gradient that is another one at the step than backward left is told once, and `transform` takes the group.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lotion_fx.shards import sample

if TYPE_CHECKING:
    from lotion_fx.state import Weight
    from lotion_fx.tally import Tally

PATIENCE = 5
"""Backward passes without a step after which something is said."""

SAME = 0.9999
"""Cosine of a gradient to itself, scaled or clipped by its norm, with room for rounding."""


def is_alone(tally: Tally) -> bool:
    """Whether there are other processes, and nothing says that the model's training is divided among them."""
    if tally.group is not None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return False
    return not any(isinstance(weight.master, DTensor) for weight in tally.weights)


def warn_of_no_step(tally: Tally) -> None:
    """Warns once where backward passes go by without an optimizer's step; not where their gradients were dropped."""
    if tally.backwards == PATIENCE == tally.dropped + 1 and not tally.steps:
        warnings.warn(
            f"{PATIENCE} backward passes went by, and no torch.optim optimizer that holds a transformed weight "
            "took a step: the expected-loss term enters there, and an update written by hand goes without it",
            stacklevel=3,
        )


def warn_of_reduction(tally: Tally, pairs: Sequence[tuple[Weight, Tensor]]) -> None:
    """Warns where a step's gradients are others than backward left. Reads the device, in the first step alone.

    Args:
        pairs: weights that an optimizer steps, with their parameters.
    """
    watched = tally.watched
    grad = next((p.grad for weight, p in pairs if watched is not None and weight is watched[0]), None)
    if watched is None or grad is None:
        return
    tally.watched_is_seen()
    then, now = watched[1].double(), sample(grad).double()
    scale = then.norm() * now.norm()
    if not scale.isfinite() or scale == 0 or then @ now >= SAME * scale:
        return
    warnings.warn(
        f"gradients changed between backward() and step(), in one of {dist.get_world_size()} processes without "
        "DistributedDataParallel or FSDP2: if your loop averages them over processes, curvature must be too, or these "
        "drift apart; pass lotion_fx.transform(..., process_group=torch.distributed.group.WORLD)",
        stacklevel=2,
    )
