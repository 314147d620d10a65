"""The pull of ``method="cage"``: in each step ``w -= lr * pull * ramp * (w - Q(w))``, beside the optimizer's update.

CAGE's decoupled form, as weight decay is decoupled in AdamW: the straight-through gradient of the loss alone makes the
optimizer's statistics, and the distance of a weight from its rounded value is subtracted on its own. ``ramp`` is 0 for
a silent share of the training and then grows linearly towards 1, so it is part of the schedule: ``"ste"`` is the silent
phase, ``"cage"`` the one in which it grows. The coupled forms, in which the distance enters the gradient or is divided
by Adam's root, are not here.

Source: CAGE, Tabesh et al., arXiv 2510.18784, the decoupled variant. The defaults, ``pull=10`` in the last 20 % of the
steps, growing linearly, are those of a copy of its authors' training script (``CAGE_LAMBDA=10``,
``CAGE_SILENCE_RATIO=0.8``, ``CAGE_SCHEDULE="linear_ramp"``); with which of them the paper's tables were made is open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lotion_fx.passes.attach.sharded import gathered, is_cut
from lotion_fx.shards import local_of, part_of, shared_amax
from lotion_fx.state import Weight
from lotion_fx.tally import Tally


@torch.no_grad()
def pull(tally: Tally, pairs: Sequence[tuple[Weight, Tensor]], optimizer: Any) -> None:
    """Pulls weights to their rounded values, just before their optimizer's own update, if the phase is one that does.

    Args:
        tally: of the model.
        pairs: its weights that the optimizer is about to step, with their parameters.
        optimizer: whose groups hold ``lr``.

    Raises:
        ValueError: there is no ``lr``, as in a loop that updates by hand.
    """
    settings = tally.settings
    factor = settings.pull * settings.schedule.ramp(tally.reached) if tally.phase.pulls else 0.0
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    skipped = getattr(optimizer, "found_inf", None)  # the step is then none, where the optimizer tells by itself
    for weight, parameter in pairs:
        if "lr" not in groups[parameter]:
            raise ValueError(
                f"method='cage' pulls {weight.name!r} by a share of the learning rate, and nothing tells it here; step "
                "with a torch.optim optimizer"
            )
        if not factor:
            continue
        rate = groups[parameter]["lr"] * factor
        rate = rate if skipped is None else rate * (1 - skipped.to(parameter.device))
        local_of(parameter).sub_((rate * _distance(weight, parameter)).to(parameter.dtype))


def _distance(weight: Weight, parameter: Tensor) -> Tensor:
    """``w - Q(w)`` on this rank, of which a shard may cut blocks in two."""
    local, quantizer = local_of(parameter), weight.quantizer
    if is_cut(quantizer, parameter):
        whole = gathered(parameter).detach()
        return part_of(parameter, weight.layout).cut(whole - quantizer.rtn(whole))
    return local - quantizer.rtn(local, amax_tensor=next(iter(shared_amax(quantizer, parameter)), None))
