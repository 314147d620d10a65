"""What the quickstart makes of its runs: rows, a table, curves and a page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from tabulate import tabulate

from lotion_fx.examples.reproduce.page import Report

LABELS = {
    "full_precision": "full precision",
    "ptq": "PTQ",
    "ste": "STE",
    "ste_scale": "STE, scale differentiated",
    "ste_from_fp": "full precision, then STE",
    "lotion": "LOTION",
    "lotion_finish": "LOTION with finish",
    "adaptive": "LOTION for round_",
}
ROUNDING_LABELS = {"gptq": "+ GPTQ", "descent": "+ round_"}

Curve = list[tuple[int, float]]  # (step, validation loss at RTN weights)


@dataclass
class Row:
    """One row of one seed: validation losses in nats per byte.

    Args:
        method: with "+" and the rounding where that is not to nearest.
        loss: at the weights one would deploy.
        rr: at randomly rounded ones; None of what is rounded adaptively, and of full precision.
        latent: at the latent ones.
        seconds: of training and rounding, compilation included.
    """

    method: str
    fmt: str
    seed: int
    loss: float
    rr: float | None
    latent: float
    seconds: float


def gap_recovered(loss: float, ptq: float, full: float) -> float:
    """Share of the loss that PTQ adds to full precision which a method does not lose; nan where PTQ adds none."""
    return (ptq - loss) / (ptq - full) if ptq > full else math.nan


def spread(values: list[float]) -> str:
    """Mean, and its standard error when there is more than one value."""
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else mean


def label_of(method: str) -> str:
    name, _, rounding = method.partition("+")
    return f"{LABELS[name]} {ROUNDING_LABELS[rounding]}" if rounding else LABELS[name]


def cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers, and one line a method, over its seeds. What is added to full precision is paired, seed by seed."""

    def column(method: str, name: str) -> dict[int, float]:
        found = {row.seed: getattr(row, name) for row in rows if row.method == method}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(values: dict[int, float]) -> str:
        return f"{statistics.fmean(values.values()):.3f}" if values else ""

    lines, full = [], column("full_precision", "loss")
    means = [statistics.fmean(column(method, "loss").values()) for method in ("ptq", "full_precision")]
    for method in dict.fromkeys(row.method for row in rows):
        loss = column(method, "loss")
        line = [label_of(method), mean(loss), "", mean(column(method, "rr")), mean(column(method, "latent")), ""]
        if method != "full_precision":
            line[2] = spread([loss[seed] - full[seed] for seed in loss])
            share = gap_recovered(statistics.fmean(loss.values()), *means)  # of means: one seed's gap can be noise
            line[-1] = "" if math.isnan(share) else f"{share:.0%}"
        lines.append([*line, f"{statistics.fmean(column(method, 'seconds').values()):.0f}"])
    headers = ["method", "loss", "above full precision", "RR loss", "latent loss", "PTQ gap recovered", "seconds"]
    return headers, lines


def table(rows: list[Row]) -> str:
    """`cells` as text."""
    headers, lines = cells(rows)
    return tabulate(lines, headers, disable_numparse=True, colalign=("left", *["right"] * 6))


def plot(curves: dict[str, list[Curve]], full_precision: float, fmt: str, path: Path) -> Figure:
    """Validation loss against step, averaged over the seeds; the second half of training, where the methods part."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, runs in curves.items():
        points = [(run[0][0], statistics.fmean(loss for _, loss in run)) for run in zip(*runs, strict=True)]
        axes.plot(*zip(*points[len(points) // 2 :], strict=True), label=LABELS[method])
    axes.axhline(full_precision, color="black", linestyle="--", label="full precision, at the end")
    axes.set(xlabel="step", ylabel=f"validation loss at {fmt} RTN weights, nats per byte")
    axes.legend()
    figure.savefig(path, dpi=150)
    return figure


def write_page(rows: list[Row], figure: Figure, told: Mapping[str, object], command: str, path: Path) -> None:
    """The table and the curves as one HTML page.

    Args:
        told: the settings, ``"format"`` and ``"steps"`` among them.
        command: that makes the page again, but for its path.
    """
    title = f"A small GPT in {told['format']}, by every method"
    summary = (
        "Each method trains the same model from the same seed on the same batches. What counts is the loss at the "
        "weights one would deploy, less that of full precision at the same seed."
    )
    report = Report(title, summary, command, told, sorted({row.seed for row in rows}))
    report.table(*cells(rows), "Validation loss in nats per byte; RR: at randomly rounded weights")
    report.figure(figure, "The second half of training, at weights rounded to nearest: lower is better")
    report.write(path)
