"""The basin experiment on tiny settings: all its parts are there, and its numbers agree with each other."""

import json
import math

import pytest
import torch
import typer

from lotion_fx.examples.reproduce import basin
from lotion_fx.examples.reproduce.basin_runs import Found, Seed, Size
from lotion_fx.examples.reproduce.basin_tasks import digits

TINY = Size(plain=12, tuned=4, looks=1, grid=4, inner="eager")


def test_a_slice_holds_all_three_solutions() -> None:
    found = Found()
    run = Seed(digits(), 0, TINY, found, lambda: None)
    run.run("int2/tensor", looked=False, sliced=True)
    rows = {row.solution: row for row in found.rows}
    assert list(rows) == ["ptq", "round_", "ste", "lotion", "lotion_finish"]
    full = {name: p.detach() for name, p in run.full.named_parameters()}
    nearest = run.deployed(run.under(run.full, "int2/tensor", "ptq"))
    assert math.isclose(run.loss_at(nearest, run.task.sample), rows["ptq"].loss, rel_tol=1e-5)
    other = {name: p + 0.1 * torch.randn_like(p) for name, p in full.items()}
    plane = run.slice("int2/tensor", "ste", full, nearest, other)
    length = math.sqrt(sum(float((nearest[n] - full[n]).square().sum()) for n in full))
    away = math.sqrt(sum(float((other[n] - full[n]).square().sum()) for n in full))
    assert math.isclose(math.hypot(*plane.at) * length, away, rel_tol=1e-5)
    assert len(plane.losses) == len(plane.y) == 4 and all(len(row) == len(plane.x) for row in plane.losses)


def test_it_writes_a_report_figures_and_numbers(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(basin, "SIZE", TINY)
    basin.main(tasks="digits", fmts="int3/tensor", seeds=2, folder=tmp_path / "basin", as_json=True)
    page = (tmp_path / "basin" / "report.html").read_text()
    assert page.count("<figure>") == 3 and page.count("<table>") == 5
    for name in ("lines", "slices", "cosines"):
        for kind in ("png", "svg"):
            assert (tmp_path / "basin" / f"digits_{name}.{kind}").stat().st_size > 1000
    numbers = json.loads((tmp_path / "basin" / "basin.json").read_text())
    assert len(numbers["rows"]) == 2 * 5 and len(numbers["looks"]) == 2 * 2 * 2 and len(numbers["slices"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out) == numbers and "PTQ outside at" in said.err


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match="unknown task 'cats'; expected some of digits,language"):
        basin.known_tasks("cats")
