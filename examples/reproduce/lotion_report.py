"""What is made of the runs of `lotion.py`: figures, tables, JSON and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lotion_fx.examples.reproduce.figures import added_bars, along_training, save
from lotion_fx.examples.reproduce.page import Report
from lotion_fx.examples.reproduce.recipes import RECIPES
from lotion_fx.examples.reproduce.results import added_table, falls_table, margins_table
from lotion_fx.examples.reproduce.runs import Run

IN_CURVES = ("ptq", "ste", "ste_scale", "lotion", "finish")
"""The methods whose loss at weights rounded to nearest says along training what they are worth."""


def figures(runs: Sequence[Run], formats: Sequence[str]) -> dict[str, Figure]:
    """The paper's three, by name: along training, where a run of ours shows most; bars at integers; bars at floats."""
    curve_format = "int4/tensor" if "int4/tensor" in formats else formats[0]
    integers = [fmt for fmt in formats if fmt.startswith("int")]
    floats = [fmt for fmt in formats if fmt not in integers]
    drawn = {"along_training": along_training(runs, curve_format, IN_CURVES)}
    for name, each in (("integers", integers), ("floats", floats)):
        if each:
            drawn[name] = added_bars(runs, each)
    return drawn


CAPTIONS = {
    "along_training": "The paper's figure at 150M over 15 B tokens, from our runs: the validation loss at weights "
    "rounded to nearest, along training. The band is one standard error over the seeds.",
    "integers": "The paper's figure at 300M, from our runs: what rounding adds, at the integer formats.",
    "floats": "The paper's figure at 150M and FP4, from our runs.",
}


def write_figures(runs: Sequence[Run], formats: Sequence[str], folder: Path) -> list[Path]:
    """Each figure as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    return [path for name, each in figures(runs, formats).items() for path in save(each, folder, f"lotion_{name}")]


def write_report(runs: Sequence[Run], formats: Sequence[str], command: str, path: Path) -> None:
    """One HTML page that a browser opens from disk."""
    size = runs[0].size
    report = Report(
        f"LOTION, language models, size {size}",
        "What rounding the weights adds to the validation loss, for each way to train: the loss at the weights that "
        "are deployed less that of full precision from the same seed. Means over seeds, with their standard errors.",
        command=command,
        configuration=configuration(runs),
        seeds=sorted({run.seed for run in runs}),
    )
    report.heading("What rounding adds to the loss")
    report.table(
        *added_table(runs, formats), caption="Nats per token; in per cent, how much of PTQ's gap is recovered."
    )
    report.table(*margins_table(runs, formats), caption="Paired by seed, nats per token; above 0 the second is ahead.")
    drawn = figures(runs, formats)
    for name in drawn:
        if name != "along_training":
            report.figure(drawn[name], CAPTIONS[name])
    report.heading("Along training")
    report.figure(drawn["along_training"], CAPTIONS["along_training"])
    curve_format = "int4/tensor" if "int4/tensor" in formats else formats[0]
    report.table(
        *falls_table(runs, curve_format), caption=f"{curve_format}: the last quarter of training, nats per token."
    )
    report.heading("Methods")
    for method in dict.fromkeys(run.method for run in runs):
        recipe = RECIPES[method]
        ending = "; weights rounded by round_ in the end" if recipe.two_sided else ""
        report.text(
            f"{recipe.label}: transform({', '.join(f'{k}={v!r}' for k, v in recipe.arguments.items())}){ending}"
        )
    report.write(path)


def configuration(runs: Sequence[Run]) -> dict[str, str]:
    """What the runs have in common, or each of what they have."""

    def each(name: str) -> str:
        return ", ".join(dict.fromkeys(str(getattr(run, name)) for run in runs))

    return {
        "size": each("size"),
        "formats": each("format"),
        "methods": each("method"),
        "optimizer steps": each("steps"),
        "tokens a step": each("step_tokens"),
        "device": each("device"),
        "commit of the runs": each("commit"),
        "torch of the runs": each("torch"),
        "dates of the runs": each("date"),
    }
