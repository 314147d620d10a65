"""What a training step costs under lotion_fx beside the plain compiled step, for any model that can be made twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from tabulate import tabulate

from lotion_fx.arguments import check_model
from lotion_fx.progress import with_a_bar
from lotion_fx.subject import Subject
from lotion_fx.timing import interleaved, seconds
from lotion_fx.transformation import transform

PLAIN, AGAIN = "plain", "plain again"
WARM = 3  # steps before the clock: graphs compile in the first, those that read Adam's state in the second


@dataclass(frozen=True)
class StepTime:
    """One method's steps.

    Args:
        method: of `transform`, or ``"plain"``; ``"plain again"`` is a second plain model, whose spread is the noise.
        step_ms: the median.
        ratio: the median over rounds of its step over the plain one of the same round.
        ratio_low, ratio_high: the quartiles of these.
    """

    method: str
    step_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


def step_times(
    make: Callable[[], Subject], fmt: str, methods: Sequence[str], rounds: int, inner: str
) -> tuple[StepTime, ...]:
    """Interleaved rounds of whole training steps by AdamW, in one process, every model from one seed.

    Args:
        make: the plain model, its batch and its loss, anew at each call.
        fmt, inner: as `transform` takes them; ``inner`` compiles the plain model too.
        methods: of `transform`.
        rounds: two or more.

    Raises:
        ValueError: there is no loss, or a model is transformed already.
    """
    names = [PLAIN, AGAIN, *methods]
    steps = {name: _step(make, fmt, name, inner) for name in with_a_bar("compiling", names, len(names))}
    timed = interleaved(steps, rounds, PLAIN)
    return tuple(StepTime(name, **timed[name]) for name in names)


def table(times: Sequence[StepTime]) -> str:
    """One line a method."""
    rows = [[t.method, f"{t.step_ms:.2f}", f"{t.ratio:.3f}", f"{t.ratio_low:.3f} .. {t.ratio_high:.3f}"] for t in times]
    return tabulate(rows, ["method", "ms", "step ratio", "middle half"], disable_numparse=True)


def _step(make: Callable[[], Subject], fmt: str, name: str, inner: str) -> Callable[[], float]:
    """One training step of a new model, which gives its time in seconds."""
    torch.manual_seed(0)
    subject = make()
    check_model(subject.model)  # a transformed one would be no plain one to compare with
    if name in (PLAIN, AGAIN):
        if inner != "eager":
            subject.model.compile(backend=inner)
    else:
        transform(subject.model, fmt, method=name, inner=inner)
    parameters = list(subject.model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise ValueError("source: no parameter of its model requires a gradient, so that there is no step to time")
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        subject.loss().backward()
        optimizer.step()

    for _ in range(WARM):
        step()
    return partial(seconds, step, parameters[0].device)
