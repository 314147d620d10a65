"""What there is to run, and what the log holds of each run; what is in it is never run again."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from lotion_fx.examples import runlog
from lotion_fx.examples.reproduce.recipes import RECIPES, Recipe

Key = tuple[str, str, str, int, str]
Curve = list[tuple[int, float]]
"""(optimizer steps done, validation loss at the weights rounded to nearest)."""


@dataclass(frozen=True)
class Job:
    """One training: a method at a format from one seed.

    Args:
        conditions: the fingerprint of the recipe and of all else that the result depends on.
    """

    size: str
    format: str
    method: str
    seed: int
    conditions: str

    @property
    def recipe(self) -> Recipe:
        """How it is trained."""
        return RECIPES[self.method]

    @property
    def key(self) -> Key:
        """What tells whether the log has it."""
        return self.size, self.format, self.method, self.seed, self.conditions


@dataclass(frozen=True)
class Result:
    """What came of a job. Losses are means over the same held-out windows, in nats per token.

    Args:
        loss: at the weights that are deployed.
        randomized: at randomly rounded ones; None where they were rounded by `lotion_fx.round_`.
        latent: at the latent ones; of the method "ptq", the loss of full precision.
        curve: along training.
        seconds: of training and rounding, compilation included.
    """

    loss: float
    randomized: float | None
    latent: float
    curve: Curve
    seconds: float


@dataclass(frozen=True)
class Run:
    """A line of the log: a `Job` and its `Result`.

    Args:
        steps, step_tokens: optimizer steps, and the tokens of one.
        commit: of lotion_fx, with "+" where code differed from it.
        torch, device: what it ran on.
        date: of its end.
    """

    size: str
    format: str
    method: str
    seed: int
    conditions: str
    loss: float
    randomized: float | None
    latent: float
    curve: list[list[float]]
    seconds: float
    steps: int
    step_tokens: int
    commit: str
    torch: str
    device: str
    date: str

    @property
    def key(self) -> Key:
        """As a `Job` has it."""
        return self.size, self.format, self.method, self.seed, self.conditions


class Bench(Protocol):
    """What trains models of one size."""

    size: str
    steps: int
    step_tokens: int
    device: str
    writes: bool
    """Whether this process is the one that keeps the log."""

    def conditions(self, recipe: Recipe) -> str:
        """The fingerprint of a recipe under this bench's settings."""

    def run(self, job: Job) -> Result:
        """Does a job."""

    def agreed(self, value: bool) -> bool:
        """What the first of all processes says."""


def jobs(bench: Bench, formats: Sequence[str], methods: Sequence[str], seeds: int) -> Iterator[Job]:
    """All of them, seed by seed, so that a log that is not complete has all rows of its first seeds."""
    for seed in range(seeds):
        for fmt in formats:
            for method in methods:
                yield Job(bench.size, fmt, method, seed, bench.conditions(RECIPES[method]))


def read(path: Path) -> dict[Key, Run]:
    """The runs of a log, see `runlog.read`."""
    return {run.key: run for run in runlog.read(path, Run)}


def finished(wanted: Iterable[Job], path: Path) -> list[Run]:
    """Those of the jobs that the log has."""
    done = read(path)
    return [done[job.key] for job in wanted if job.key in done]


def recorded(path: Path, size: str, formats: Sequence[str], methods: Sequence[str], seeds: int) -> list[Run]:
    """What the log has of these, under whatever conditions they ran; of two with the same name the later one."""
    found = {
        (run.seed, run.format, run.method): run
        for run in read(path).values()
        if run.size == size and run.format in formats and run.method in methods and run.seed < seeds
    }
    return list(found.values())


def run_all(wanted: Sequence[Job], bench: Bench, path: Path, hours: float) -> None:
    """Does what the log does not have yet, and adds each to it as it ends; begins none after so many hours."""
    done, began = read(path), time.monotonic()
    missing = [job for job in wanted if job.key not in done]
    say = tqdm.write if bench.writes else (lambda text: None)
    say(f"{len(wanted) - len(missing)} of {len(wanted)} runs are in {path}")
    with tqdm(missing, disable=None if bench.writes else True, smoothing=0.05, unit="run") as bar:
        for job in bar:
            if not bench.agreed(time.monotonic() - began <= 3600 * hours):
                say(f"{hours:g} hours are over; the same command goes on from here")
                return
            label = f"seed {job.seed}, {job.format}, {job.method}"
            bar.set_description(label)
            result = bench.run(job)
            if bench.writes:
                runlog.add(path, _line(job, result, bench))
            say(f"{label}: {result.loss:.4f} rounded, {result.latent:.4f} latent, {result.seconds:.0f} s")


def _line(job: Job, result: Result, bench: Bench) -> Run:
    return Run(
        **vars(job),
        **{**vars(result), "curve": [list(point) for point in result.curve]},
        steps=bench.steps,
        step_tokens=bench.step_tokens,
        commit=runlog.commit(),
        torch=torch.__version__,
        device=bench.device,
        date=date.today().isoformat(),
    )
