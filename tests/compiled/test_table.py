"""`lotion-fx kernels`: rows with all their fields, a table to read, one clear error for bad options."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from lotion_fx import cli
from lotion_fx.kernels import tuning
from lotion_fx.kernels.audit import aot, table
from lotion_fx.kernels.targets import TARGETS
from tests.harness.samples import doubled, product

FIELDS = {
    *("kernel", "arch", "shape", "config", "registers", "spills", "shared", "occupancy", "vector128", "instructions"),
    *("bytes", "minimum_bytes", "predicted_us"),
}
SAMPLES = [doubled(), product()]


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch, tmp_path):
    """A cache of its own for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def samples(monkeypatch):
    monkeypatch.setattr(table, "catalog", lambda arch, pattern="*": [w for w in SAMPLES if pattern in ("*", w.kernel)])


def run(*arguments: str):
    return CliRunner().invoke(cli.build(), ["kernels", *arguments])


def test_json_is_a_list_of_objects_with_every_field(samples):
    result = run("--arch", "sm_100", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert [row["kernel"] for row in found] == ["doubled", "product"]
    for row in found:
        assert set(row) >= FIELDS
        assert (row["arch"], row["spills"]) == ("sm_100", 0)
        assert row["bytes"] >= row["minimum_bytes"]
    assert any(name.startswith("UTCHMMA") for name in found[1]["instructions"])


def test_the_table_has_a_line_for_each_kernel_of_the_pattern(samples):
    output = run("--arch", "sm_80", "--kernel", "product").output
    assert "predicted us" in output
    assert "HMMA" in output
    assert "doubled" not in output


def test_a_kernel_that_does_not_compile_has_a_row_that_says_why(monkeypatch):
    lacking = replace(doubled(), signature={"x": "*fp8e4nv", "y": "*fp8e4nv", "n": "i32"})
    monkeypatch.setattr(table, "catalog", lambda arch, pattern="*": [lacking])
    (row,) = json.loads(run("--arch", "sm_80", "--json").output)
    assert set(row) >= FIELDS
    assert row["registers"] is None
    assert "type fp8e4nv not supported" in row["refused"]
    assert "type fp8e4nv not supported" in run("--arch", "sm_80").output


def test_by_default_there_are_two_architectures_and_nothing_that_inductor_emits(samples, monkeypatch):
    asked = []
    monkeypatch.setattr(table, "_emitted", lambda arch, pattern, kept: asked.append(arch) or [])
    assert {row["arch"] for row in json.loads(run("--json", "--kernel", "doubled").output)} == {"sm_80", "sm_100"}
    assert asked == []
    found = json.loads(run("--json", "--kernel", "doubled", "--arch", "all", "--emitted").output)
    assert [row["arch"] for row in found] == [target.name for target in TARGETS.values()]
    assert asked == list(TARGETS)
    assert run("--json", "--kernel", "emitted/*", "--arch", "sm_90").exit_code == 0
    assert asked == [*TARGETS, 90]


def test_the_second_time_nothing_is_compiled(samples, monkeypatch):
    monkeypatch.setattr(aot, "_known", {})
    first = run("--arch", "sm_80", "--json").output
    monkeypatch.setattr(aot, "_known", {})
    monkeypatch.setattr(aot, "_compiled", None)
    assert run("--arch", "sm_80", "--json").output == first


def test_a_bar_is_for_those_who_see_it(monkeypatch):
    results = iter(range(3))
    assert table._with_a_bar(results, 3) is results
    monkeypatch.setattr(table.sys.stderr, "isatty", lambda: True, raising=False)
    assert list(table._with_a_bar(results, 3)) == [0, 1, 2]
    monkeypatch.setitem(table.sys.modules, "tqdm", None)
    assert table._with_a_bar(results, 3) is results


def test_the_first_line_of_the_help_names_the_options_that_matter():
    described = run("--help").output.strip().splitlines()[2]
    assert "--kernel" in described and "--arch" in described


def test_tune_writes_the_table_and_the_evidence(samples, monkeypatch, tmp_path):
    written, evidence = tmp_path / "tuning.json", tmp_path / "evidence.json"
    written.write_text("{}")
    with monkeypatch.context() as patched:
        patched.setattr(tuning, "TABLE", written)
        tuning.forget()
        result = run("--arch", "sm_80", "--kernel", "doubled", "--tune", "--evidence", str(evidence), "--json")
    tuning.forget()
    assert result.exit_code == 0, result.output
    kept, (row,) = json.loads(written.read_text())["doubled"][""]["sm_80"], json.loads(result.output)
    assert row["config"] == kept[0]
    ranked = json.loads(evidence.read_text())["doubled"][""]["sm_80"]
    assert [entry["config"] for entry in ranked] == kept
    assert all(entry["evidence"] for entry in ranked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_70"], "unknown architecture 'sm_70'; expected one of sm_80, sm_86, sm_89, sm_90, sm_100"),
        (["--kernel", "smoooth"], "no kernel is named 'smoooth'; there are doubled, product"),
    ],
)
def test_user_errors_are_one_line(samples, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    *_, last = result.output.strip().splitlines()
    assert last.startswith("Error: ")
    assert message in last
