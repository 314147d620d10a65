"""Means over seeds with their standard errors, of values that are paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Mean(NamedTuple):
    """A mean with its standard error, nan of a single value."""

    value: float
    error: float
    seeds: int

    @staticmethod
    def of(values: Sequence[float]) -> Mean:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return Mean(statistics.fmean(values), error, len(values))

    def __str__(self) -> str:
        sign = "-" if self.value < 0 else ""
        mean = f"{sign}{abs(self.value):.4f}".replace("0.", ".", 1)
        return mean if math.isnan(self.error) else f"{mean} ± {self.error:.4f}".replace("± 0.", "± .")


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Mean | None:
    """The difference ``a - b`` over the seeds that both have; None where there is none."""
    common = sorted(a.keys() & b.keys())
    return Mean.of([a[seed] - b[seed] for seed in common]) if common else None


def gap_recovered(method: Mapping[int, float], ptq: Mapping[int, float]) -> float:
    """Share of what PTQ adds to the loss that a method does not add: a ratio of means over the seeds of both.

    Of means, for the gap of a single seed can be smaller than its noise. nan where PTQ adds nothing.
    """
    common = method.keys() & ptq.keys()
    gap = sum(ptq[seed] for seed in common)
    return 1 - sum(method[seed] for seed in common) / gap if gap > 0 else math.nan
