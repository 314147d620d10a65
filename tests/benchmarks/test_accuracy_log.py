"""The log of `benchmarks/accuracy.py`: what is in it is not run again; a killed process spoils one line at most."""

from __future__ import annotations

import dataclasses

import pytest
from accuracy import log, recipes, runs
from accuracy.text import Text

from lotion_fx.examples import runlog

RUN = log.Run("text", "nvfp4", "ptq", 0, "abc", 1.7, 1.65, 1.6, 64, 20, 1.5, 0.0, "c0ffee", "2.13")


class Trainer:
    """Stands where `Trainings` does; only `runs.run` would look into it."""


@pytest.fixture
def done(monkeypatch) -> list[runs.Job]:
    """The jobs that were run, each of which gives a run in no time."""
    found: list[runs.Job] = []

    def run(job: runs.Job, trainings: Trainer) -> log.Run:
        found.append(job)
        setting, fmt, method, seed, recipe = job.key
        return dataclasses.replace(RUN, setting=setting, format=fmt, method=method, seed=seed, recipe=recipe)

    monkeypatch.setattr(runs, "run", run)
    return found


def wanted(methods: list[str], seeds: int = 2, setting: Text | None = None) -> list[runs.Job]:
    return list(runs.jobs(setting or Text(), ["nvfp4", "int3"], methods, seeds))


def test_what_was_added_is_read(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    assert log.read(path) == {}
    other = dataclasses.replace(RUN, seed=1, loss=0.1 + 0.2)
    runlog.add(path, RUN)
    runlog.add(path, other)
    assert log.read(path) == {RUN.key: RUN, other.key: other}
    assert RUN.excess == pytest.approx(0.1)


def test_a_line_that_a_killed_process_cut_is_done_again(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    runlog.add(path, RUN)
    with path.open("a") as file:
        file.write('{"setting": "text", "for')
    assert log.read(path) == {RUN.key: RUN}
    assert "runs.jsonl:2: cut off" in capsys.readouterr().out
    other = dataclasses.replace(RUN, seed=1)
    runlog.add(path, other)
    assert log.read(path) == {RUN.key: RUN, other.key: other}


def test_a_bad_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"setting": "text"}\n')
    runlog.add(path, RUN)
    with pytest.raises(ValueError, match=r"runs\.jsonl:1: no run of this log"):
        log.read(path)


def test_a_second_command_runs_only_what_is_missing(tmp_path, done):
    path = tmp_path / "runs.jsonl"
    runs.run_all(wanted(["ptq"]), Trainer(), path, hours=1)
    assert [(job.seed, job.format, job.method) for job in done] == [
        (0, "fp32", "full_precision"), (0, "nvfp4", "ptq"), (0, "int3", "ptq"),
        (1, "fp32", "full_precision"), (1, "nvfp4", "ptq"), (1, "int3", "ptq"),
    ]  # fmt: skip
    before = path.read_bytes()
    done.clear()
    runs.run_all(wanted(["ptq"]), Trainer(), path, hours=1)
    assert not done and path.read_bytes() == before
    runs.run_all(wanted(["ptq", "lotion+two_sided"], seeds=1), Trainer(), path, hours=1)
    assert [(job.format, job.method) for job in done] == [("nvfp4", "lotion+two_sided"), ("int3", "lotion+two_sided")]


def test_a_changed_recipe_or_setting_runs_again(tmp_path, done, monkeypatch):
    path = tmp_path / "runs.jsonl"
    runs.run_all(wanted(["lotion"], seeds=1), Trainer(), path, hours=1)
    done.clear()
    relabelled = dataclasses.replace(recipes.RECIPES["lotion"], label="another name")
    monkeypatch.setitem(recipes.RECIPES, "lotion", relabelled)
    runs.run_all(wanted(["lotion"], seeds=1), Trainer(), path, hours=1)
    assert not done
    stronger = dataclasses.replace(relabelled, arguments={"method": "lotion", "strength": 2.0})
    monkeypatch.setitem(recipes.RECIPES, "lotion", stronger)
    runs.run_all(wanted(["lotion"], seeds=1), Trainer(), path, hours=1)
    assert [job.method for job in done] == ["lotion", "lotion"]  # of two formats; full precision is as it was
    done.clear()
    runs.run_all(wanted(["lotion"], seeds=1, setting=Text(steps=30)), Trainer(), path, hours=1)
    assert len(done) == 3


def test_no_run_begins_after_the_hours(tmp_path, done):
    runs.run_all(wanted(["ptq"]), Trainer(), tmp_path / "runs.jsonl", hours=-1)
    assert not done


def test_every_row_has_a_key_of_its_own():
    setting = Text()
    keys = [job.key for job in runs.jobs(setting, runs.FORMATS, list(recipes.rows()), 3)]
    rows = [recipe for recipe, _ in recipes.rows().values() if recipe not in setting.left_out]
    assert len(set(keys)) == len(keys) == 3 * (1 + len(runs.FORMATS) * len(rows))
