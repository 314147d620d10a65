"""The table made of the log: what quantization adds to the loss of full precision, paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from tabulate import tabulate

from accuracy.log import Run
from accuracy.recipes import RECIPES, label_of, rows
from lotion_fx.examples.paired import Mean, gap_recovered, paired

Excesses = dict[str, dict[int, float]]  # of one format: by row, by seed


def excesses(runs: Iterable[Run]) -> dict[str, Excesses]:
    """By format, by row, by seed."""
    found: dict[str, Excesses] = {}
    for run in runs:
        found.setdefault(run.format, {}).setdefault(run.method, {})[run.seed] = run.excess
    return found


def is_rival(row: str) -> bool:
    """Whether a row is one that ours is to be at or below."""
    return RECIPES[rows()[row][0]].rival


def best(found: Excesses, rival: bool) -> str | None:
    """The row with the least mean of those that have the most seeds, among rivals or among ours."""
    ours = {row: found[row] for row in rows() if row in found and is_rival(row) == rival}
    most = max(map(len, ours.values()), default=0)
    complete = {row: statistics.fmean(each.values()) for row, each in ours.items() if len(each) == most}
    return min(complete, key=complete.__getitem__, default=None)


def cell(found: Excesses, row: str) -> str:
    """One row of one format."""
    if row not in found:
        return ""
    mean, share = Mean.of(list(found[row].values())), gap_recovered(found[row], found.get("ptq", {}))
    words = str(mean) if mean.seeds == max(map(len, found.values())) else f"{mean} ({mean.seeds})"
    words += "" if row == "ptq" or math.isnan(share) else f", {share:.0%}"
    return f"**{words}**" if row in (best(found, True), best(found, False)) else words


def table(runs: Iterable[Run], formats: Sequence[str]) -> str:
    """Markdown: a line a row, a column a format; then ours against the rivals."""
    runs = list(runs)
    found = excesses(runs)
    shown = [fmt for fmt in formats if fmt in found]
    lines = [[label_of(row), *(cell(found[fmt], row) for fmt in shown)] for row in rows()]
    lines = [line for line in lines if any(line[1:])]
    text = tabulate(lines, ["", *shown], tablefmt="github", disable_numparse=True)
    against = [margin(found[fmt], fmt) for fmt in shown if best(found[fmt], True) and best(found[fmt], False)]
    headers = ["format", "best with LOTION", "best rival", "difference", "seeds"]
    margins = tabulate(against, headers, tablefmt="github", disable_numparse=True)
    return f"{text}\n\n{margins}" if against else text


def margin(found: Excesses, fmt: str) -> list[str]:
    """The best row of ours less the best rival, paired."""
    mine, other = best(found, False), best(found, True)
    assert mine is not None and other is not None
    difference = paired(found[mine], found[other])
    count = "" if difference is None else str(difference.seeds)
    return [fmt, label_of(mine), label_of(other), "" if difference is None else str(difference), count]


def markers(setting: str) -> tuple[str, str]:
    """What a setting's table stands between, on a page."""
    return f"<!-- accuracy, {setting}: begin -->", f"<!-- accuracy, {setting}: end -->"


def between_markers(page: str, setting: str, text: str) -> str:
    """A page with the text in the place of what stands between the markers of a setting.

    Raises:
        ValueError: the page has no markers.
    """
    begin, end = markers(setting)
    if begin not in page or end not in page:
        raise ValueError(f"the page has no {begin} and {end} to write the table between; put them where it belongs")
    return page[: page.index(begin) + len(begin)] + f"\n{text}\n" + page[page.index(end) :]
