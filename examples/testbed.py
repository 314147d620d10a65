"""What the two synthetic testbeds of the LOTION paper share: the methods, the search for a learning rate, the results.

A testbed is a model trained on its population loss, so that a run has no sampling noise: what differs between methods
is what they do about rounding. Every method gets the same grid of learning rates, the same starts and
the same targets. What counts is the loss at round-to-nearest (RTN) weights at the end.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import lotion_fx
from lotion_fx.examples.options import Json, ReportTo, a_picture, print_rows, some_of
from lotion_fx.examples.reproduce.page import Report

# The arguments of `lotion_fx.transform`, and what the table calls the method. "Exact": the loss that the model returns
# becomes its expectation, variances and all. "Second order": the term enters at the optimizer's step, with the diagonal
# of the Gauss-Newton matrix, as in the paper; the curvature of squared gradients would vanish with the residual.
METHODS: dict[str, dict[str, Any]] = {
    "ptq": {"method": "ptq"},
    "ste": {"method": "ste"},
    "ste_scale": {"method": "ste_scale"},
    "lotion_exact": {"method": "lotion", "loss_fn": "model"},
    "lotion_second": {"method": "lotion", "curvature": "ggn", "likelihood": "gaussian"},
}
LABELS = {
    "ptq": "PTQ",
    "ste": "STE, scale held",
    "ste_scale": "STE, scale differentiated",
    "lotion_exact": "LOTION, exact",
    "lotion_second": "LOTION, second order",
}
FORMAT = "int4/tensor"  # the paper's INT4: one scale for a whole weight
SUMMARY = (
    "Every method trains the same model on its population loss, without sampling noise, from the same starts, at the "
    "best of the same learning rates. What differs is what it does about rounding."
)
ROUNDINGS = "at weights rounded to nearest (RTN), which are deployed; rounded at random (RR); as they are (latent)"
SELECTION_SEEDS = 2  # the grid is run on the first of the seeds
EVALS = 25  # points on a curve
DRAWS = 8  # randomized roundings averaged

Curve = list[tuple[int, float]]  # (step, loss at RTN weights)


@dataclass(frozen=True)
class Testbed:
    """One problem and how it is trained.

    Args:
        name: of the plot's file.
        about: what the command's help says.
        build: a new model, its target and its start drawn from torch's default generator. Its forward takes nothing
            and returns a mean squared error, 0-d, and the prediction; times its ``scale`` that is the population loss.
        lrs: the grid of learning rates, ascending.
        steps: of Adam, the learning rate going down to 0 along a cosine.
    """

    __test__ = False  # no test, whatever pytest makes of the name

    name: str
    about: str
    build: Callable[[], nn.Module]
    lrs: tuple[float, ...]
    steps: int


@dataclass(frozen=True)
class Row:
    """One run: population losses at RTN, randomly rounded (RR) and latent weights."""

    method: str
    lr: float
    seed: int
    rtn: float
    rr: float
    latent: float
    seconds: float


# ------------------------------------------------------------------ the problems' data
def spectrum(size: int, power: float = 1.1) -> Tensor:
    """Power-law variances of the inputs, ``lambda_i = i ** -power``, i = 1 .. size, float32."""
    return torch.arange(1, size + 1, dtype=torch.float32) ** -power


# ------------------------------------------------------------------ training and evaluation
@torch.no_grad()
def evaluate(model: Any) -> float:
    """The population loss."""
    model.eval()  # the forward is now at RTN weights, unless a context below says otherwise
    loss = model()[0].item()
    model.train()
    return loss * model.scale


def train(bed: Testbed, method: str, lr: float, seed: int, steps: int) -> tuple[Row, Curve]:
    """One run, with its curve. All methods of one seed have the same target and the same start."""
    began = time.perf_counter()
    torch.manual_seed(seed)
    # "aot_eager": so small a model would spend more time in Inductor than in training. The graphs are the same.
    model = lotion_fx.transform(bed.build(), fmt=FORMAT, inner="aot_eager", **METHODS[method])
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99), eps=1e-15)  # the gradients are small
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    curve: Curve = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model()[0].backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // EVALS) == 0 or step == steps:
            curve.append((step, evaluate(model)))
    with lotion_fx.randomized(model):  # every forward draws anew
        rr = statistics.fmean(evaluate(model) for _ in range(DRAWS))
    with lotion_fx.full_precision(model):
        latent = evaluate(model)
    return Row(method, lr, seed, curve[-1][1], rr, latent, round(time.perf_counter() - began, 2)), curve


# ------------------------------------------------------------------ results
def best(losses: dict[float, float]) -> float:
    """The learning rate of the lowest loss; a loss that is not finite never wins."""
    return min(losses, key=lambda lr: losses[lr] if math.isfinite(losses[lr]) else math.inf)


def grid_table(grid: dict[str, dict[float, float]]) -> str:
    """Mean RTN loss by method and learning rate, the best of each method starred; and a warning where it is an edge."""
    lines, warnings = [], []
    for method, losses in grid.items():
        chosen, lrs = best(losses), list(losses)
        lines.append([LABELS[method], *(f"{losses[lr]:.3g}{'*' if lr == chosen else ' '}" for lr in lrs)])
        if chosen in (lrs[0], lrs[-1]) and len(lrs) > 2:
            warnings.append(f"warning: {LABELS[method]} is best at an edge of the grid, {chosen:g}; it may do better")
    headers = ["RTN loss at lr", *(f"{lr:g} " for lr in next(iter(grid.values())))]
    align = ("left", *["right"] * (len(headers) - 1))
    return "\n".join([tabulate(lines, headers, disable_numparse=True, colalign=align), *warnings])


def spread(values: list[float]) -> str:
    """Mean, and its standard error when there is more than one value, to three digits of the larger."""
    mean, error = statistics.fmean(values), 0.0
    if not math.isfinite(mean):
        return "diverged"
    if len(values) > 1:
        error = statistics.stdev(values) / math.sqrt(len(values))
    largest = max(abs(mean), error)
    places = 2 - math.floor(math.log10(largest)) if largest else 0
    if places > 7:
        return f"{mean:.1e}"
    return f"{mean:.{max(0, places)}f}" + (f" ± {error:.{max(0, places)}f}" if len(values) > 1 else "")


def cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers, and one line a method, over its seeds; the last column is paired by seed, which cancels what the target
    does."""
    by_method: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_method.setdefault(row.method, {})[row.seed] = row
    reference = next((name for name in ("lotion_exact", "lotion_second") if name in by_method), None)
    lines = []
    for method, runs in by_method.items():
        columns = [spread([getattr(row, name) for row in runs.values()]) for name in ("rtn", "rr", "latent")]
        above = ""
        if reference and method != reference:
            above = spread([row.rtn - by_method[reference][seed].rtn for seed, row in runs.items()])
        lines.append([LABELS[method], f"{next(iter(runs.values())).lr:g}", *columns, above])
    headers = ["method", "best lr", "RTN loss", "RR loss", "latent loss"]
    headers.append(f"RTN above {LABELS[reference]}" if reference else "")
    return headers, lines


def table(rows: list[Row]) -> str:
    """`cells` as text."""
    headers, lines = cells(rows)
    return tabulate(lines, headers, disable_numparse=True, colalign=("left", *["right"] * 5))


def plot(curves: dict[str, list[Curve]], title: str, path: Path) -> Figure:
    """Loss at RTN weights against step, averaged over the seeds."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, runs in curves.items():
        points = [(run[0][0], statistics.fmean(loss for _, loss in run)) for run in zip(*runs, strict=True)]
        axes.plot(*zip(*points, strict=True), label=LABELS[method])
    axes.set(xlabel="step", ylabel=f"population loss at {FORMAT} RTN weights", yscale="log", title=title)
    axes.legend()
    figure.savefig(path, dpi=150)
    return figure


# ------------------------------------------------------------------ command line
known_methods = some_of("method", METHODS)


def command(bed: Testbed) -> Callable[..., None]:
    """The testbed as a typer command."""
    picture = Path(f"{bed.name}.png")

    def main(
        seeds: Annotated[int | None, typer.Option(min=1, help="Runs per method [default: 5; 2 with --quick].")] = None,
        steps: Annotated[int | None, typer.Option(min=10, help="Training steps [default: the testbed's].")] = None,
        methods: Annotated[str, typer.Option(callback=known_methods, help="Which to compare.")] = ",".join(METHODS),
        quick: Annotated[bool, typer.Option("--quick", help="A smoke run, too short to rank the methods.")] = False,
        as_json: Json = False,
        plot_to: Annotated[Path, typer.Option("--plot", callback=a_picture, help="Write the curves.")] = picture,
        report_to: ReportTo = None,
    ) -> None:
        torch.set_num_threads(1)  # so small a model gains nothing from more, and suffers from them on a busy machine
        seeds, steps = seeds or (2 if quick else 5), steps or (20 if quick else bed.steps)
        lrs = bed.lrs[::3] if quick else bed.lrs
        say = partial(typer.echo, err=as_json)
        rows, curves = compare(bed, methods.split(","), lrs, seeds, steps, say)
        say("\n" + table(rows))
        if quick:
            say("A quick run shows that everything works; it is too short to rank the methods.")
        figure = plot(curves, bed.about, plot_to)
        say(f"curves: {plot_to}")
        if report_to is not None:
            told = {"format": FORMAT, "methods": methods, "learning rates": lrs, "steps": steps}
            again = f"{command} --methods {methods} --steps {steps} --seeds {seeds}"
            report = Report(bed.about, SUMMARY, again, told, range(seeds))
            report.table(*cells(rows), f"Population loss, {ROUNDINGS}; mean and standard error over the seeds")
            report.figure(figure, f"While training, {ROUNDINGS.split(';')[0]}; mean over the seeds: lower is better")
            report.write(report_to)
            say(f"report: {report_to}")
        if as_json:
            print_rows(rows)

    command = f"lotion-fx reproduce {bed.name.replace('_', '-')}"
    main.__doc__ = f"{bed.about}\n\n{command} --quick\n\n{command} --methods ptq,lotion_exact --json > rows.json"
    return main


def compare(
    bed: Testbed,
    methods: list[str],
    lrs: tuple[float, ...],
    seeds: int,
    steps: int,
    say: Callable[[str], None] = typer.echo,
) -> tuple[list[Row], dict[str, list[Curve]]]:
    """Each method's learning rate from the grid, on the first seeds, then its runs on all of them."""
    selection = range(min(SELECTION_SEEDS, seeds))
    say(f"{bed.about}\n{steps} steps; learning rates chosen on {len(selection)} of {seeds} seeds\n")
    run = cache(lambda method, lr, seed: train(bed, method, lr, seed, steps))  # the grid's runs are not run again
    grid: dict[str, dict[float, float]] = {}
    rows: list[Row] = []
    curves: dict[str, list[Curve]] = {}
    for method in tqdm(methods, leave=False, disable=None):
        grid[method] = {lr: statistics.fmean(run(method, lr, seed)[0].rtn for seed in selection) for lr in lrs}
        runs = [run(method, best(grid[method]), seed) for seed in range(seeds)]
        rows += [row for row, _ in runs]
        curves[method] = [curve for _, curve in runs]
    say(grid_table(grid))
    return rows, curves
