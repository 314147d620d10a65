"""The LOTION paper's figures of language models, drawn from our runs; titles say what the numbers say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from lotion_fx.examples.paired import Mean
from lotion_fx.examples.reproduce.recipes import RECIPES
from lotion_fx.examples.reproduce.results import bars, curves, fall
from lotion_fx.examples.reproduce.runs import Run

MARGIN = 2.0  # standard errors that a title calls a difference


def along_training(runs: Sequence[Run], fmt: str, methods: Sequence[str] | None = None) -> Figure:
    """Loss at rounded weights against tokens seen, with a band of one standard error; the second half of training."""
    found = {method: each for method, each in curves(runs, fmt).items() if methods is None or method in methods}
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for method, curve in found.items():
        late = {tokens: Mean.of(list(each.values())) for tokens, each in curve.items() if 2 * tokens >= max(curve)}
        x, mean = [tokens / 1e6 for tokens in late], [each.value for each in late.values()]
        error = [0.0 if math.isnan(each.error) else each.error for each in late.values()]
        color = RECIPES[method].color
        axes.plot(x, mean, color=color, label=RECIPES[method].label)
        low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    axes.axhline(0, color="black", linestyle="--", linewidth=1, label="full precision, at its end")
    axes.set(
        xlabel="tokens seen, millions",
        ylabel=f"loss at {fmt} weights, nats per token\nabove full precision's at its end",
        title=along_title(runs, fmt),
    )
    axes.legend(fontsize=8)
    return figure


def along_title(runs: Sequence[Run], fmt: str) -> str:
    """Whether LOTION's curve falls more than QAT's over the last quarter of training."""
    found = curves(runs, fmt)
    if not {"ste", "lotion"} <= found.keys():
        return f"{fmt}: the loss at rounded weights along training"
    ours, theirs = fall(found["lotion"]), fall(found["ste"])
    more = Mean.of([ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()])
    if math.isnan(more.error) or abs(more.value) < MARGIN * more.error:
        return f"{fmt}: LOTION and QAT fall alike over the last quarter"
    return f"{fmt}: LOTION falls {'more' if more.value > 0 else 'less'} than QAT over the last quarter"


def added_bars(runs: Sequence[Run], formats: Sequence[str], methods: Sequence[str] | None = None) -> Figure:
    """What quantization adds to the loss: a group of bars a format, with one standard error, on an axis of its own."""
    found = {fmt: each for fmt in formats if (each := bars(runs, fmt))}
    figure = Figure(figsize=(max(7.2, 3.8 * len(found)), 4.4), layout="constrained")
    for axes, (fmt, each) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        shown = {method: mean for method, mean in each.items() if methods is None or method in methods}
        for place, (method, mean) in enumerate(shown.items()):
            error = None if math.isnan(mean.error) else mean.error
            axes.bar(place, mean.value, yerr=error, capsize=3, color=RECIPES[method].color)
        axes.axhline(0, color="black", linewidth=0.8)
        labels = [RECIPES[method].label for method in shown]
        axes.set_xticks(range(len(shown)), labels, rotation=40, ha="right", fontsize=8)
        axes.set(ylabel="loss above full precision, nats per token", title=bars_title(fmt, shown))
        axes.title.set_fontsize(10)
    return figure


def bars_title(fmt: str, found: dict[str, Mean]) -> str:
    """Which method adds least, and what PTQ adds beside it."""
    best = min(found, key=lambda method: found[method].value)
    if best == "ptq" or "ptq" not in found:
        return f"{fmt}: {RECIPES[best].label} adds least"
    return f"{fmt}: PTQ adds {found['ptq'].value:.4f},\n{RECIPES[best].label} {found[best].value:.4f}"


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes a figure as PNG and as SVG."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # letters as letters, and the same file each time
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
