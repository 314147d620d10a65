"""The basin paper's picture, measured: do rounded weights leave the low-loss basin, and what brings them back?

After "Understanding Quantization-Aware Training: Gradients at Quantized Weights Bias to the Low-Loss Basin" (Li, Ma,
Cui 2026, arXiv 2606.09012). A small model is trained in full precision; from its end STE and LOTION go on, and full
precision too, by as many steps. Of each solution, at 2 to 8 bits: the loss on the way to its rounded weights, the
basin's width in roundings, and the cosines of the steps of training with the way back inside.

    python examples/reproduce/basin.py            # writes basin/report.html, its figures and basin.json
    python examples/reproduce/basin.py --quick    # one seed, two formats: a smoke run
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

from lotion_fx.examples.options import Json, a_new_folder, known_formats, some_of, start
from lotion_fx.examples.reproduce import basin_figures as figures
from lotion_fx.examples.reproduce.basin_runs import FINISH, GROWTH, METHODS, Found, Row, Seed, Size
from lotion_fx.examples.reproduce.basin_tasks import TASKS
from lotion_fx.examples.reproduce.page import Report, versions

BITS = (2, 3, 4, 8)
FORMATS = tuple(f"int{bits}/{block}" for block in ("tensor", "32") for bits in BITS)
SLICED = "int3/tensor"
LOOKED = ("int2/tensor", "int3/tensor")  # formats whose cosines are followed over training: where PTQ leaves
SIZE = Size(plain=300, tuned=100, looks=3, grid=17, inner="eager")
QUICK = Size(plain=60, tuned=20, looks=2, grid=7, inner="eager")
Table = tuple[list[str], list[list[str]], str]


def measure(tasks: Sequence[str], formats: Sequence[str], seeds: int, size: Size) -> Found:
    """All runs."""
    found = Found()
    with tqdm(total=len(tasks) * seeds * (1 + len(METHODS) * len(formats)), desc="trainings", disable=None) as bar:
        for name in tasks:
            task = TASKS[name]()
            for seed in range(seeds):
                runs = Seed(task, seed, size, found, lambda: bar.update() and None)
                for fmt in formats:
                    runs.run(fmt, looked=fmt in LOOKED, sliced=fmt == SLICED and seed == 0)
    return found


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard error over seeds."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def _by_format(found: Found, task: str, cells: Callable[[dict[str, list[Row]]], list[str]]) -> list[list[str]]:
    lines = []
    for fmt in dict.fromkeys(row.fmt for row in found.rows):
        by = {
            solution: [row for row in found.rows if (row.task, row.fmt, row.solution) == (task, fmt, solution)]
            for solution in figures.LABELS
        }
        lines.append([fmt, *cells(by)])
    return lines


def losses(found: Found, task: str) -> Table:
    """What each solution costs, paired by seed with full precision, and how many stay inside."""

    def cells(by: dict[str, list[Row]]) -> list[str]:
        return [
            f"{spread([row.above for row in rows])} ({sum(row.inside for row in rows)}/{len(rows)})"
            for rows in by.values()
        ]

    headers = ["format", *figures.LABELS.values()]
    return headers, _by_format(found, task, cells), (
        f"{task}: loss at the deployed weights above full precision's, nats, mean ± standard error over seeds; in "
        f"brackets how many of them lie inside the basin (up to {GROWTH:g})"
    )  # fmt: skip


def basin(found: Found, task: str) -> Table:
    """The basin's size in roundings."""

    def cells(by: dict[str, list[Row]]) -> list[str]:
        edges = [spread([row.edge for row in by[name]], 2) for name in figures.LABELS]
        return [spread([row.width for row in by["ptq"]], 2), *edges]

    headers = ["format", "random directions", *(f"to {label}" for label in figures.LABELS.values())]
    return headers, _by_format(found, task, cells), (
        f"{task}: how far the basin reaches from each solution's own weights, in lengths of its rounding (below 1 the "
        "rounding leaves it; inf: beyond 16). Random directions are from the full-precision weights"
    )  # fmt: skip


def inward(found: Found, task: str) -> Table:
    """The cosines at the solutions."""
    shown = [("ptq", "ste"), ("ptq", "chance"), ("ste", "ste"), ("ste", "chance"), ("round_", "ste"), ("ptq", "term"),
             ("ptq", "lotion"), ("lotion", "lotion")]  # fmt: skip
    names = {"ste": "-grad L(Q)", "chance": "by chance", "term": "term's step", "lotion": "LOTION's step"}

    def cells(by: dict[str, list[Row]]) -> list[str]:
        return [spread([getattr(row, name) for row in by[solution]]) for solution, name in shown]

    headers = ["format", *(f"at {figures.LABELS[solution]}: {names[name]}" for solution, name in shown)]
    return headers, _by_format(found, task, cells), (
        f"{task}: cosines with the way back inside, w - Q, over all weights; by chance: of -grad L after random steps "
        "of the same length"
    )  # fmt: skip


def verdict(found: Found) -> str:
    """Who is deployed inside the basin, in one sentence a task."""
    said = []
    for task in dict.fromkeys(row.task for row in found.rows):
        parts = []
        for solution, label in figures.LABELS.items():
            rows = [row for row in found.rows if (row.task, row.solution) == (task, solution)]
            outside = sorted({row.fmt for row in rows if not row.inside})
            parts.append(f"{label} outside at {', '.join(outside) or 'none'}")
        said.append(f"{task}: {'; '.join(parts)}.")
    return f"Deployed outside the basin ({GROWTH:g} nats above full precision) in some seed: " + " ".join(said)


def write(found: Found, report: Report, folder: Path, formats: Sequence[str]) -> None:
    """The page, and each figure as PNG and SVG beside it."""
    for task in dict.fromkeys(row.task for row in found.rows):
        report.heading(f"{task}: deployed losses")
        report.table(*losses(found, task))
        drawn: list[tuple[str, Figure | None, str]] = [
            ("lines", figures.lines(found, task, formats[:4]), "Loss along w + t (Q(w) - w), means over seeds."),
            ("slices", figures.slices(found, task), "Planes through full precision, PTQ and a third solution; seed 0."),
            ("cosines", figures.cosines(found, task, formats), "Cosines over training, means over seeds."),
        ]
        report.heading(f"{task}: the basin against the grid")
        report.table(*basin(found, task))
        for name, figure, caption in drawn[:2]:
            _add(report, folder, f"{task}_{name}", figure, caption)
        report.heading(f"{task}: which steps lead back")
        report.table(*inward(found, task))
        _add(report, folder, f"{task}_cosines", drawn[2][1], drawn[2][2])
    report.write(folder / "report.html")


def _add(report: Report, folder: Path, name: str, figure: Figure | None, caption: str) -> None:
    if figure is None:
        return
    report.figure(figure, caption)
    for kind in ("png", "svg"):
        figure.savefig(folder / f"{name}.{kind}", dpi=150)


def _finite(value: Any) -> Any:
    """Without inf and nan, which JSON does not have: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------ command line
known_tasks = some_of("task", TASKS)


def main(
    tasks: Annotated[str, typer.Option(callback=known_tasks, help="What to train.")] = ",".join(TASKS),
    fmts: Annotated[str, typer.Option(callback=known_formats, help="Formats.")] = ",".join(FORMATS),
    seeds: Annotated[int | None, typer.Option(min=1, help="Of each task [default: 3; 1 with --quick].")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run, too short to conclude from.")] = False,
    folder: Annotated[
        Path, typer.Option("--to", callback=a_new_folder, help="Folder of report.html and basin.json.")
    ] = Path("basin"),
    as_json: Json = False,
) -> None:
    """Whether rounded weights leave the basin of the loss, and what leads them back: tables, figures, one HTML page.

    lotion-fx reproduce basin --quick

    lotion-fx reproduce basin --tasks digits --fmts int2/tensor,int4 --to basin --json
    """
    say = partial(typer.echo, err=as_json)
    torch.set_num_threads(1)
    formats = [fmt for fmt in fmts.split(",") if not quick or fmt in LOOKED] or fmts.split(",")
    size, count = (QUICK if quick else SIZE), seeds or (1 if quick else 3)
    found = measure(tasks.split(","), formats, count, size)
    folder.mkdir(exist_ok=True)
    command = shlex.join(["python", *sys.argv])
    configuration = {**asdict(size), "tasks": tasks, "formats": ", ".join(formats), "growth, nats": GROWTH,
                     "finish": FINISH}  # fmt: skip
    for task in tasks.split(","):
        for headers, rows, caption in (losses(found, task), basin(found, task), inward(found, task)):
            say(f"\n{caption}\n{tabulate(rows, headers, disable_numparse=True)}")
    say("\n" + verdict(found))
    report = Report("Do rounded weights leave the basin, and what leads back?", verdict(found), command,
                    configuration, range(count))  # fmt: skip
    write(found, report, folder, formats)
    numbers = {"command": command, "configuration": configuration, "versions": versions(), **asdict(found)}
    text = json.dumps(_finite(numbers), indent=1, allow_nan=False)
    (folder / "basin.json").write_text(text + "\n")
    if as_json:
        typer.echo(text)
    say(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    start(main)
