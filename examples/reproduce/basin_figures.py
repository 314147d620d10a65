"""The figures of the basin experiment."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from lotion_fx.examples.reproduce.basin_runs import GROWTH, Found

LABELS = {
    "ptq": "PTQ",
    "round_": "PTQ, two-sided rounding",
    "ste": "STE",
    "lotion": "LOTION",
    "lotion_finish": "LOTION, last 40 % STE",
}
COLOURS = {"ptq": "#b3423a", "round_": "#c98a1b", "ste": "#1f5fa8", "lotion": "#2c7d4f", "lotion_finish": "#7a4fa3"}


def lines(found: Found, task: str, formats: Sequence[str]) -> Figure:
    """The loss along w -> Q(w), a panel for each format, means over seeds."""
    figure = Figure(figsize=(max(9.0, 3.1 * len(formats)), 3.4), layout="constrained")
    panels = figure.subplots(1, len(formats), sharey=True, squeeze=False)[0]
    for axes, fmt in zip(panels, formats, strict=True):
        for solution, label in LABELS.items():
            rows = [row for row in found.rows if (row.task, row.fmt, row.solution) == (task, fmt, solution)]
            points = list(zip(*(row.line for row in rows), strict=True))
            t = [each[0][0] for each in points]
            above = [
                statistics.fmean(loss - row.full for (_, loss), row in zip(each, rows, strict=True)) for each in points
            ]
            axes.plot(t, above, color=COLOURS[solution], label=label, linewidth=1.5)
        axes.axhline(GROWTH, color="0.5", linestyle=":", linewidth=1)
        axes.axvline(1, color="0.8", linewidth=0.8, zorder=0)
        axes.set(title=fmt, xlabel="t, roundings from w towards Q(w)")
        axes.set_yscale("symlog", linthresh=GROWTH)
    panels[0].set_ylabel("loss above full precision, nats")
    panels[0].legend(fontsize=7)
    figure.suptitle(f"{task}: what is deployed (t = 1) lies outside where a line is above the dotted one")
    return figure


def slices(found: Found, task: str) -> Figure | None:
    """The loss on the planes through the solutions."""
    drawn = [each for each in found.slices if each.task == task]
    if not drawn:
        return None
    figure = Figure(figsize=(5.2 * len(drawn), 4.4), layout="constrained")
    for axes, each in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        shown = axes.contourf(
            each.x, each.y, [[max(loss, 1e-3) for loss in row] for row in each.losses], cmap="viridis_r",
            levels=[0.001, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4], norm="log", extend="max",
        )  # fmt: skip
        axes.contour(each.x, each.y, each.losses, levels=[GROWTH], colors="white", linewidths=1.4)
        for (x, y), name in (((0, 0), "full precision"), ((1, 0), "PTQ"), (each.at, LABELS[each.solution])):
            axes.plot(x, y, "o", color="white", markeredgecolor="black", markersize=7)
            axes.annotate(name, (x, y), (6, 6), textcoords="offset points", fontsize=9, color="black",
                          bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1})  # fmt: skip
        axes.set(xlabel="along PTQ's rounding, roundings", ylabel="across, roundings")
        axes.set_title(f"{each.fmt}: is {LABELS[each.solution]} back inside?", fontsize=10)
        figure.colorbar(shown, ax=axes, label="loss above full precision, nats")
    figure.suptitle(f"{task}: the basin (white edge, {GROWTH:g} nats) and where each solution is deployed")
    return figure


def cosines(found: Found, task: str, formats: Sequence[str]) -> Figure | None:
    """Cosines over training, means over seeds."""
    present = [fmt for fmt in formats if any((each.task, each.fmt) == (task, fmt) for each in found.looks)]
    if not present:
        return None
    figure = Figure(figsize=(max(8.0, 4.6 * len(present)), 3.8), layout="constrained")
    panels = figure.subplots(1, len(present), sharey=True, squeeze=False)[0]
    for axes, fmt in zip(panels, present, strict=True):
        for method, style in (("ste", "-"), ("lotion", "--")):
            looks = [each for each in found.looks if (each.task, each.fmt, each.method) == (task, fmt, method)]
            steps = sorted({each.step for each in looks})
            for name, label, colour in (
                ("ste", "-grad L(Q(w))", COLOURS["ste"]),
                ("chance", "-grad L after a random step", "0.5"),
                ("lotion", "LOTION's step", COLOURS["lotion"]),
            ):
                means = [statistics.fmean(getattr(each, name) for each in looks if each.step == step) for step in steps]
                axes.plot(
                    steps, means, style, color=colour, marker="o", markersize=3, label=f"{LABELS[method]}: {label}"
                )
        axes.axhline(0, color="0.7", linewidth=0.8)
        axes.set(title=fmt, xlabel="step of the training from the plain solution")
    panels[0].set_ylabel("cosine with the way back, w - Q(w)")
    panels[0].legend(fontsize=7)
    figure.suptitle(f"{task}: the gradient at rounded weights leads back (> 0); more than by chance?")
    return figure
