"""What an optimizer knows of its parameters, whatever its class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lotion_fx.shards import local_of

_MOMENTS = ("exp_avg", "momentum_buffer")


def ascending(optimizer: Any) -> set[Tensor]:
    """The parameters whose gradients an optimizer goes up: their loss is the negative of what backward saw."""
    return {p for group in optimizer.param_groups if group.get("maximize") for p in group["params"]}


def first_moments(optimizer: Any, parameters: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """The optimizer's moving averages of gradients, float32, if it keeps one of each of these parameters.

    None where it lacks one: an optimizer whose state is divided among ranks would tell each rank something else.
    """
    states = optimizer.state, getattr(getattr(optimizer, "optim", None), "state", {})
    found = {}
    for parameter in parameters:
        known = [state.get(parameter, {}).get(name) for state in states for name in _MOMENTS]
        moment = next((moment for moment in known if isinstance(moment, Tensor)), None)
        if moment is None or moment.shape != parameter.shape:
            return {}
        found[parameter] = local_of(moment).float()
    return found
