"""Times of steps that are compared: rounds interleave them in a random order, and ratios are taken within a round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from lotion_fx.progress import with_a_bar


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """The time of one step, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def interleaved(
    steps: Mapping[str, Callable[[], float]], rounds: int, base: str = "plain"
) -> dict[str, dict[str, float]]:
    """Each step's median milliseconds, and its ratio to the base's step of the same round with the quartiles.

    Args:
        steps: each gives its own time in seconds.
        rounds: two or more, for there to be quartiles.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in with_a_bar("timing", range(rounds), rounds):
        for name in random.sample(list(steps), len(steps)):
            times[name].append(steps[name]())
    found = {}
    for name, mine in times.items():
        low, middle, high = statistics.quantiles((a / b for a, b in zip(mine, times[base], strict=True)), n=4)
        found[name] = {"step_ms": 1e3 * statistics.median(mine), "ratio": middle, "ratio_low": low, "ratio_high": high}
    return found
