"""The arithmetic of `benchmarks/accuracy.py --table`, by hand."""

from __future__ import annotations

import math

import pytest
from accuracy import table
from accuracy.log import Run

from lotion_fx.examples.paired import Mean, gap_recovered, paired


def run(method: str, seed: int, loss: float, full: float, fmt: str = "nvfp4") -> Run:
    return Run("text", fmt, method, seed, "abc", loss, full, full, 64, 20, 1.0, 0.0, "c0ffee", "2.13")


# Full precision is 1.6, 1.8 and 2.0: seeds differ by far more than the methods do. What is added, in hundredths:
ADDED = {"ptq": (3, 4, 5), "ptq+two_sided": (1, 2, 3), "lotion": (2, 2, 2), "lotion+two_sided": (0, 1, 2)}
RUNS = [
    run(method, seed, 1.6 + 0.2 * seed + 0.01 * added, 1.6 + 0.2 * seed)
    for method, each in ADDED.items()
    for seed, added in enumerate(each)
]


def test_means_are_of_paired_differences():
    found = table.excesses(RUNS)["nvfp4"]
    assert found["ptq"] == pytest.approx({0: 0.03, 1: 0.04, 2: 0.05})
    mean = Mean.of(list(found["ptq"].values()))
    # deviations -.01, 0, .01: variance .0002 / 2, standard error .01 / sqrt(3)
    assert mean == pytest.approx((0.04, 0.01 / math.sqrt(3), 3))
    assert str(mean) == ".0400 ± .0058"


def test_a_single_seed_has_no_error():
    mean = Mean.of([-0.0123])
    assert math.isnan(mean.error)
    assert str(mean) == "-.0123"
    assert str(Mean.of([1.2345, 1.2345])) == "1.2345 ± .0000"


def test_gap_recovered_is_a_ratio_of_means_over_common_seeds():
    found = table.excesses(RUNS)["nvfp4"]
    assert gap_recovered(found["ptq+two_sided"], found["ptq"]) == pytest.approx(1 - 6 / 12)
    assert gap_recovered({0: 0.03}, found["ptq"]) == pytest.approx(0)
    assert gap_recovered({0: 0.06}, found["ptq"]) == pytest.approx(-1)
    assert math.isnan(gap_recovered({0: 0.1}, {0: -0.1}))
    assert math.isnan(gap_recovered({0: 0.1}, {1: 0.1}))


def test_margins_pair_ours_with_the_best_rival():
    found = table.excesses(RUNS)["nvfp4"]
    assert (table.best(found, rival=True), table.best(found, rival=False)) == ("ptq+two_sided", "lotion+two_sided")
    assert table.margin(found, "nvfp4") == [
        "nvfp4", "LOTION + two-sided rounding", "PTQ + two-sided rounding", "-.0100 ± .0000", "3",
    ]  # fmt: skip
    difference = paired(found["lotion"], {1: 0.0, 2: 0.01, 7: 9.0})
    assert difference == pytest.approx((0.015, 0.005, 2))
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_a_row_of_fewer_seeds_says_so_and_is_not_the_best():
    runs = [each for each in RUNS if each.method != "lotion+two_sided" or each.seed == 0]
    found = table.excesses(runs)["nvfp4"]
    assert table.best(found, rival=False) == "lotion"
    assert table.cell(found, "lotion+two_sided") == ".0000 (1), 100%"


def test_the_table_has_a_line_a_row_and_a_column_a_format():
    runs = [*RUNS, run("ptq", 0, 2.8, 1.6, "int2"), run("lotion", 0, 1.9, 1.6, "int2")]
    lines = table.table(runs, ["nvfp4", "mxfp4", "int2"]).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["", "nvfp4", "int2"]
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (line.split("|") for line in lines[2:6])
    }
    assert rows == {
        "PTQ": [".0400 ± .0058", "**1.2000**"],
        "PTQ + two-sided rounding": ["**.0200 ± .0058, 50%**", ""],
        "LOTION": [".0200 ± .0000, 50%", "**.3000, 75%**"],
        "LOTION + two-sided rounding": ["**.0100 ± .0058, 75%**", ""],
    }
    assert "| int2     | LOTION" in lines[-1] and "-.9000" in lines[-1]


def test_a_page_keeps_what_is_around_the_markers():
    (begin, end), other = table.markers("text"), "\n".join(table.markers("encoder"))
    page = f"before\n{begin}\nold\n{end}\n{other}\nafter\n"
    assert table.between_markers(page, "text", "new") == f"before\n{begin}\nnew\n{end}\n{other}\nafter\n"
    with pytest.raises(ValueError, match="has no <!-- accuracy, text: begin -->"):
        table.between_markers("before\nafter\n", "text", "new")
