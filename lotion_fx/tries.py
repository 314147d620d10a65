"""A model's weights as one call of `round_` rounds them: with scales of one kind, one after another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lotion_fx.making_up import MakingUp
from lotion_fx.numerics.adaptive import Curvature, Rounded, fixed_point
from lotion_fx.numerics.formats import Format
from lotion_fx.numerics.searched import clipped, limited
from lotion_fx.refining import Known
from lotion_fx.state import Weight


@dataclass
class Try:
    """A model's weights, rounded in one way.

    Args:
        scales: "absmax" or "searched".
        scaled: what scales are made of, by name.
        done: what became of each weight.
        is_nearest: all are rounded to nearest, which is not what was asked for.
        making_up: where weights are rounded in order.
        views: what rounds know of the weights.
    """

    scales: str
    scaled: Mapping[str, Tensor]
    done: dict[str, Rounded] = field(default_factory=dict)
    is_nearest: bool = False
    making_up: MakingUp | None = None
    views: dict[str, Known] = field(default_factory=dict)

    def view(self, name: str, weight: Weight, latent: Tensor, curvature: Curvature) -> Known:
        """What a weight is rounded from, and by."""
        if self.making_up is None:
            return known_of(latent, self.scaled[name], weight, curvature)
        goal, inputs = self.making_up.shifted(name, weight, latent)
        scaled_as = self.scaled[name] if goal is latent else scaled_by(self.scales, {name: goal}, {name: weight})[name]
        return known_of(goal, scaled_as, weight, curvature.replaced_by(inputs))

    def finish(self, name: str, rounded: Rounded) -> None:
        """A weight is rounded."""
        self.done[name] = rounded
        if self.making_up is not None:
            self.making_up.put(name, rounded.values)

    def leave(self, weights: Mapping[str, Weight]) -> None:
        """Weights are rounded to nearest, in the end."""
        if self.making_up is not None:
            for name, rounded in to_nearest(self.scaled, weights, {}).items():
                self.making_up.put(name, rounded.values)


def scaled_by(scales: str, latent: dict[str, Tensor], weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """What each weight's scales are made of, in its shape: for "absmax" the weight itself, else a clipped one."""
    return latent if scales == "absmax" else {n: clipped(latent[n], *format_of(w)) for n, w in weights.items()}


def known_of(latent: Tensor, scaled_as: Tensor, weight: Weight, curvature: Curvature) -> Known:
    """What a weight is rounded by: its goal is ``latent``, no further out than its scales reach."""
    fmt, axis = format_of(weight)
    goal = latent if scaled_as is latent else limited(latent, scaled_as, fmt, axis)
    return Known(goal, fmt, axis, weight.layout.factors, curvature, scaled_as)


def to_nearest(
    values: Mapping[str, Tensor], weights: Mapping[str, Weight], done: Mapping[str, Rounded]
) -> dict[str, Rounded]:
    """All weights rounded to nearest, with what that costs those that were rounded adaptively, by their curvature."""
    costs = {name: done[name].nearest if name in done else math.nan for name in weights}
    return {
        name: Rounded(fixed_point(values[name], *format_of(weight)), "nearest", costs[name], costs[name])
        for name, weight in weights.items()
    }


def format_of(weight: Weight) -> tuple[Format, int]:
    """The format of a weight that is selected, and the dimension that its blocks run along."""
    assert weight.format is not None
    return weight.format, weight.axis
