"""What there is to run, in which order, and what becomes of each run in the log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from accuracy import log
from accuracy.recipes import RECIPES, row_name, rows
from accuracy.setting import Setting
from accuracy.training import Trainings
from lotion_fx.examples import runlog

POWERS_OF_TWO = ("mxfp4",)
FORMATS = ("nvfp4", "int4/tensor", "mxfp4", "int3", "int2", "int4")


@dataclass(frozen=True)
class Job:
    """One row of one seed.

    Args:
        format: "fp32" for the full-precision run.
        recipe, rounding: of `RECIPES` and `ROUNDINGS`.
    """

    setting: Setting
    format: str
    recipe: str
    rounding: str
    seed: int

    @property
    def method(self) -> str:
        return "full_precision" if self.format == "fp32" else row_name(self.recipe, self.rounding)

    @property
    def key(self) -> log.Key:
        """As the log has it."""
        fingerprint = RECIPES[self.recipe].fingerprint(**self.setting.conditions, rounding=self.rounding)
        return self.setting.name, self.format, self.method, self.seed, fingerprint


def jobs(setting: Setting, formats: Sequence[str], methods: Sequence[str], seeds: int) -> Iterator[Job]:
    """All of them, seed by seed, so that a log that is not complete has all rows of its first seeds."""
    for seed in range(seeds):
        yield Job(setting, "fp32", "ptq", "nearest", seed)
        for fmt in formats:
            for recipe, rounding in (rows()[method] for method in methods):
                if recipe not in setting.left_out and not (RECIPES[recipe].trains_scales and fmt in POWERS_OF_TWO):
                    yield Job(setting, fmt, recipe, rounding, seed)


def run(job: Job, trainings: Trainings) -> log.Run:
    """Does a job."""
    setting, full = job.setting, trainings.full_precision(job.seed)
    trained = full if job.format == "fp32" else trainings.trained(job.recipe, job.format, job.seed)
    loss, seconds = trained.deployed, 0.0
    if job.format == "fp32":
        loss = trained.latent
    if loss is None:
        model, seconds = trainings.rounded(trained.state, job.format, job.rounding, job.seed, job.recipe)
        loss = setting.evaluate(model)
    return log.Run(
        *job.key,
        loss=loss,
        latent=trained.latent,
        full_precision=full.latent,
        windows=setting.windows,
        steps=setting.steps,
        seconds=round(trained.seconds, 1),
        rounding_seconds=round(seconds, 1),
        commit=runlog.commit(),
        torch=torch.__version__,
    )


def run_all(wanted: Sequence[Job], trainings: Trainings, path: Path, hours: float) -> None:
    """Does what the log does not have yet, and adds each to it as it ends; begins none after so many hours."""
    done, began = log.read(path), time.monotonic()
    missing = [job for job in wanted if job.key not in done]
    tqdm.write(f"{len(wanted) - len(missing)} of {len(wanted)} runs are in {path}")
    for job in (bar := tqdm(missing, disable=None, smoothing=0.05, unit="run")):
        if time.monotonic() - began > 3600 * hours:
            tqdm.write(f"{hours:g} hours are over; the same command goes on from here")
            return
        bar.set_description(f"seed {job.seed}, {job.format}, {job.method}")
        found = run(job, trainings)
        runlog.add(path, found)
        tqdm.write(f"seed {job.seed}, {job.format}, {job.method}: {found.loss:.4f}, {found.excess:+.4f}")
