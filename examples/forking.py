"""Trainings that share their beginning: those that begin by plain training go on from one plain run's checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Checkpoint:
    """A training in the middle.

    Args:
        step: how many are done.
        model: its state dict.
        optimizer: the state of each parameter.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: list[dict[str, Any]]

    @staticmethod
    def of(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Checkpoint:
        states = [optimizer.state[parameter] for parameter in model.parameters()]
        return Checkpoint(step, *copy.deepcopy((dict(model.state_dict()), states)))

    def resume(self, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
        """Gives an optimizer what it had for these parameters, without what a transformed model keeps there."""
        for parameter, state in zip(parameters, copy.deepcopy(self.optimizer), strict=True):
            optimizer.state[parameter] = state


def after_plain(arguments: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """The share of a training that is plain before anything else, and what the rest is as a training of its own.

    Args:
        arguments: of `lotion_fx.transform` for the whole.
    """
    schedule = arguments.get("schedule")
    if not isinstance(schedule, tuple) or schedule[0][0] != "plain" or len(schedule) == 1:
        return 0.0, dict(arguments)
    (_, share), *rest = schedule
    return share, {**arguments, "schedule": tuple((name, part / (1 - share)) for name, part in rest)}
