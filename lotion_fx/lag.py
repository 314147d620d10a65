"""How far the moving average of curvature is behind the curvature of a step.

In a training's first steps curvature grows tenfold, or falls as residuals vanish, and an average of all steps so far
tells half of it, or five times too much.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lotion_fx.state import Weight

YOUNG = 40
"""After t steps curvature is believed to be 1 + (YOUNG / t)^2 times its average at most: later, where it grows, it is a
training that runs away, and a term that grew with it would help it."""

SHARE = 0.5
"""Of what one step tells, in what is believed."""


class Median:
    """Of what the optimizers of one step tell of their weights, one after another."""

    def __init__(self) -> None:
        self.known: list[float] = []
        self.value = 0.0

    def tell(self, values: Iterable[float]) -> float:
        """Some more are told; returns by how much the median moves, from 0 of none."""
        before = self.value
        self.known += values
        self.value = statistics.median(self.known) if self.known else 0.0
        return self.value - before


class Lag:
    """Of one model.

    Attributes:
        log: the logarithm of a step's curvature over its moving average, of late.
        before: the same before the step under way.
        moves: the logarithms of what the step's averages are over those that were seen last.
    """

    def __init__(self, log: float = 0.0) -> None:
        self.log = self.before = log
        self.moves, self._logs = Median(), Median()

    def step_comes(self) -> None:
        """A step that looks at curvature begins."""
        self.before, self.moves, self._logs = self.log, Median(), Median()

    def seen(self, averages: Mapping[Weight, float], fresh: Mapping[Weight, float]) -> float | None:
        """The median over the weights of a step, those of the optimizers before among them; None of none.

        Args:
            averages, fresh: the sums of the weights' curvature on average, and as the step has it.
        """
        both = ((h, fresh.get(weight, 0.0)) for weight, h in averages.items())
        self._logs.tell(math.log(now / h) for h, now in both if h > 0 and 0 < now < math.inf)
        return self._logs.value if self._logs.known else None

    def learn(self, seen: float, steps: int) -> float:
        """What a step told after so many is believed in part; returns by how much the logarithm moves."""
        now = self.log
        self.log = (1 - SHARE) * self.before + SHARE * bounded(seen, steps)
        return self.log - now


def bounded(log: float, steps: int) -> float:
    """A lag, as far as it is believed after so many steps."""
    return min(log, math.log1p((YOUNG / max(steps, 1)) ** 2))
