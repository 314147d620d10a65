"""What the log of runs says: losses added by quantization, and curves along training, paired by seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tabulate import tabulate

from lotion_fx.examples.paired import Mean, gap_recovered, paired
from lotion_fx.examples.reproduce.recipes import RECIPES
from lotion_fx.examples.reproduce.runs import Run

BySeed = dict[int, float]


def full_precision(runs: Iterable[Run]) -> BySeed:
    """The loss of plain training by seed: the latent one of the runs of "ptq"."""
    return {run.seed: run.latent for run in runs if run.method == "ptq"}


def added(runs: Sequence[Run], fmt: str) -> dict[str, BySeed]:
    """What a format adds to the loss of full precision of the same seed, by method and seed, in the recipes' order."""
    full = full_precision(runs)
    found: dict[str, BySeed] = {}
    for method in RECIPES:
        each = {run.seed: run.loss for run in runs if (run.method, run.format) == (method, fmt)}
        if common := each.keys() & full.keys():
            found[method] = {seed: each[seed] - full[seed] for seed in sorted(common)}
    return found


def bars(runs: Sequence[Run], fmt: str) -> dict[str, Mean]:
    """`added`, over the seeds."""
    return {method: Mean.of(list(each.values())) for method, each in added(runs, fmt).items()}


def curves(runs: Sequence[Run], fmt: str) -> dict[str, dict[int, BySeed]]:
    """The loss at rounded weights less full precision's in the end, by method, tokens seen and seed.

    The points of a curve are means over a part of the held-out windows; it is shifted so that its end is that over all.
    """
    full = full_precision(runs)
    found: dict[str, dict[int, BySeed]] = {}
    for run in runs:
        if run.format == fmt and run.seed in full and not RECIPES[run.method].two_sided:
            shift = run.loss - run.curve[-1][1] - full[run.seed]
            for step, loss in run.curve:
                points = found.setdefault(run.method, {})
                points.setdefault(round(step) * run.step_tokens, {})[run.seed] = loss + shift
    return {method: found[method] for method in RECIPES if method in found}


def fall(curve: Mapping[int, BySeed], share: float = 0.25) -> BySeed:
    """By how much a curve falls over the last share of the training, by seed; of seeds that have both its ends."""
    end = max(curve)
    begin = max((tokens for tokens in curve if tokens <= (1 - share) * end), default=end)
    return {seed: curve[begin][seed] - curve[end][seed] for seed in curve[begin].keys() & curve[end].keys()}


def added_table(runs: Sequence[Run], formats: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: a method a line, a format a column; the mean, its error, the share of PTQ's gap recovered.

    The share is left out where a method adds more than twice what PTQ does: a gap that small is noise.
    """
    found = {fmt: each for fmt in formats if (each := added(runs, fmt))}
    rows = []
    for method, recipe in RECIPES.items():
        cells = [_cell(each, method) for each in found.values()]
        if any(cells):
            rows.append([recipe.label, *cells])
    return ["method", *found], rows


def _cell(found: Mapping[str, BySeed], method: str) -> str:
    if method not in found:
        return ""
    mean, share = Mean.of(list(found[method].values())), gap_recovered(found[method], found.get("ptq", {}))
    most = max(map(len, found.values()))
    words = str(mean) if mean.seeds == most else f"{mean} ({mean.seeds})"
    return f"{words}, {share:.0%}" if method != "ptq" and share >= -1 else words  # nan is not


def margins_table(runs: Sequence[Run], formats: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: PTQ and QAT less LOTION, by format, paired by seed; above 0 LOTION is ahead."""
    pairs = [("ptq", "lotion"), ("ste", "lotion"), ("ste_scale", "lotion"), ("ste_scale", "finish"), ("ptq", "round_")]
    headers = ["format", *(f"{RECIPES[a].label} less {RECIPES[b].label}" for a, b in pairs)]
    found = {fmt: each for fmt in formats if (each := added(runs, fmt))}
    rows = [[fmt, *(_difference(each, a, b) for a, b in pairs)] for fmt, each in found.items()]
    return headers, rows


def _difference(found: Mapping[str, BySeed], a: str, b: str) -> str:
    mean = paired(found.get(a, {}), found.get(b, {}))
    return "" if mean is None else str(mean)


def falls_table(runs: Sequence[Run], fmt: str) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: how much each method's curve falls in the last quarter, and how much more than QAT's."""
    falls = {method: fall(curve) for method, curve in curves(runs, fmt).items()}
    rows = []
    for method, each in falls.items():
        more = paired(each, falls.get("ste", {}))
        rows.append([RECIPES[method].label, str(Mean.of(list(each.values()))), "" if more is None else str(more)])
    return ["method", "falls by", "more than QAT by"], rows


def markdown(table: tuple[list[str], list[list[str]]]) -> str:
    """A table as it stands in a page."""
    headers, rows = table
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)
