"""The `lotion-fx` command: help, JSON, and user errors without a traceback."""

from __future__ import annotations

import json
import sys
from importlib.metadata import entry_points

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import lotion_fx
from lotion_fx import cli, doctor, progress
from tests.runtime import subjects

HERE = "tests.runtime.subjects"
EVERY = [[name] for name in cli.COMMANDS] + [["reproduce", name] for name in cli.REPRODUCE]


def run(*arguments: str):
    return CliRunner().invoke(cli.build(), arguments)


def test_help_lists_the_subcommands():
    result = run("--help")
    assert result.exit_code == 0
    assert all(f"  {name} " in result.output for name in [*cli.COMMANDS, "reproduce"])
    assert all(f"  {name} " in run("reproduce", "--help").output for name in cli.REPRODUCE)


def test_version():
    assert run("--version").output == f"lotion_fx {lotion_fx.__version__}, torch {torch.__version__}\n"


@pytest.mark.parametrize("command", EVERY, ids=" ".join)
def test_every_help_has_an_example_and_offers_json(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert f"\n  lotion-fx {' '.join(command)}" in result.output
    assert "--json" in result.output and "PATH" not in result.output.split("--json")[1].splitlines()[0]


def test_quickstart_help_lists_its_options():
    output = run("quickstart", "--help").output
    for option in ("--fmt", "--seeds", "--steps", "--methods", "--quick", "--json", "--plot"):
        assert option in output


def told(*arguments: str):
    """What a command prints as JSON; nothing else is on stdout."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_report_tells_the_estimators_after_a_step():
    found = told("report", f"{HERE}:classifier", "--fmt", "int4/bf16")
    assert [row["format"] for row in found["parameters"]] == ["int4/bf16", None, "int4/bf16", None]
    assert found["parameters"][0]["estimator"] == "analytic" and found["term"] > 0
    assert told("report", f"{HERE}:alone", "--fmt", "int4", "--only", "all")["term"] == 0  # nothing ran
    assert told("report", f"{HERE}:transformed")["coverage"] > 0.9
    assert "analytic" in run("report", f"{HERE}:classifier", "--fmt", "int4").output


def test_expected_loss_is_the_library_s():
    found = told("expected-loss", f"{HERE}:classifier", "--fmt", "int4", "--samples", "4")
    torch.manual_seed(0)
    model, batch, loss_fn = subjects.classifier()
    lotion_fx.transform(model, "int4", inner="aot_eager", calibrate=False)
    by_hand = lotion_fx.expected_loss(model, batch, loss_fn)
    assert found["loss"] == float(by_hand.loss) == F.cross_entropy(subjects.alone()(batch[0]), batch[1]).item()
    assert found["expected"] == float(by_hand.total.detach())
    terms = {name: float(term.detach()) for name, term in by_hand.terms.items()}
    assert {row["name"]: row["increase"] for row in found["parameters"]} == terms
    assert found["samples"] == 4 and all(row["measured_alone"] is not None for row in found["parameters"])


def test_bench_compares_with_plain_steps():
    arguments = (f"{HERE}:classifier", "--methods", "lotion,ste", "--inner", "aot_eager", "--rounds", "3")
    found = {row["method"]: row for row in told("bench", *arguments)}
    assert list(found) == ["plain", "plain again", "lotion", "ste"] and found["plain"]["ratio"] == 1
    assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] and row["step_ms"] > 0 for row in found.values())


def test_doctor_s_exit_code_says_whether_training_runs(monkeypatch):
    assert told("doctor")["is_fit"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = run("doctor", "--json")
    assert result.exit_code == 1
    (lacking,) = [check for check in json.loads(result.stdout)["checks"] if check["is_required"] and not check["found"]]
    assert lacking["name"] == "C++ compiler"
    assert run("doctor").exit_code == 1 and "MISSING" in run("doctor").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart", "--fmt", "nvpf4"], "nvpf4"),
        (["quickstart", "--methods", "ptq,sgd"], "unknown method 'sgd'"),
        (["quickstart", "--seeds", "0"], "--seeds"),
        (["quickstart", "--plot", "/no/such/folder/curves.png"], "there is no folder /no/such/folder"),
        (["report", f"{HERE}:alone"], "it needs a format, such as int4 or nvfp4/pow2"),
        (["report", f"{HERE}:alone", "--fmt", "nvpf4"], "nvpf4"),
        (["report", f"{HERE}:alone", "--fmt", "int4", "--only", "some"], "some"),
        (["report", f"{HERE}:number", "--fmt", "int4"], "it returned int"),
        (["expected-loss", f"{HERE}:alone", "--fmt", "int4"], "it gives a model alone"),
        (["expected-loss", "no/such", "--fmt", "int4"], "no Hugging Face checkpoint is there"),
        (["bench", f"{HERE}:classifier", "--methods", "sgd"], "expected some of ptq, ste"),
        (["bench", f"{HERE}:alone"], "it gives a model alone"),
        (["bench", f"{HERE}:transformed_classifier"], "is already transformed"),
        (["bench", f"{HERE}:classifier", "--rounds", "1"], "--rounds"),
        (["bench", f"{HERE}:classifier", "--inner", "tvm"], "'tvm' is none; expected one of inductor"),
        (["bench", f"{HERE}:classifier", "--methods", "cage"], "'cage' is none"),
        (["bench", f"{HERE}:frozen"], "no parameter of its model requires a gradient"),
        (["report", f"{HERE}:by_name", "--fmt", "int4"], "its loss_fn is 'cross_entropy'; expected a function"),
        (["report", f"{HERE}:raising", "--fmt", "int4"], "it raised AssertionError: never so"),
        (["report", f"{HERE}:of_no_number", "--fmt", "int4"], "the loss of its batch is nan"),
        (
            ["expected-loss", f"{HERE}:of_unknown_labels", "--fmt", "int4"],
            "fails on its batch with IndexError: Target 9",
        ),
        (["quickstart", "--plot", "curves.weird"], "let its name end in one of .png, .svg"),
        (["quickstart", "--report", "/tmp"], "/tmp is a folder; name a file"),
        (["reproduce", "basin", "--to", __file__], "is a file; name a folder"),
        (["kernels", "--evidence", "found.json"], "add --tune"),
        (["reproduce", "landscap"], "landscap"),
    ],
)
def test_user_errors_are_one_line_before_any_training(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    *_, last = result.output.strip().splitlines()
    assert last.startswith("Error: ")
    assert message in last
    assert "Traceback" not in result.output


def test_report_prints_json_of_finite_numbers_and_of_models_at_rest():
    def strictly(source):
        result = run("report", f"{HERE}:{source}", "--fmt", "int4", "--json")
        return json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["parameters"]

    assert strictly("with_a_zero_weight")[0]["sqnr"] is None and strictly("classifier")[0]["sqnr"] > 0
    assert [row["format"] for row in strictly("frozen")][:2] == ["int4", None]


@pytest.mark.parametrize(
    "command", [["report"], ["expected-loss"], ["bench", "--inner", "aot_eager"], ["export", "OUT"]], ids=" ".join
)
def test_a_batch_that_does_not_fit_is_told_of_the_user_s_own_model(command, tmp_path):
    rest = [str(tmp_path / "out") if argument == "OUT" else argument for argument in command[1:]]
    result = run(command[0], f"{HERE}:of_another_width", *rest, "--fmt", "int4")
    assert result.exit_code == 2  # of a sentence; torch 2.14 logs a traceback of its own before it
    said = " ".join(result.output.replace("│", " ").split())
    assert "its model, as it is, fails on its batch with RuntimeError" in said and "8x31" in said


def test_a_failure_of_ours_keeps_its_traceback(monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("ours")

    monkeypatch.setattr("lotion_fx.commands.reported", fails)
    result = run("report", f"{HERE}:classifier", "--fmt", "int4")
    assert isinstance(result.exception, RuntimeError) and str(result.exception) == "ours"


def test_missing_extra_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "lotion_fx.examples.quickstart", raising=False)
    with pytest.raises(SystemExit, match=r"typer is not installed; try: pip install 'lotion_fx\[examples\]'"):
        cli.main()


def test_what_lacks_a_library_says_so_and_the_others_go_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("lotion_fx.examples.")]:
        monkeypatch.delitem(sys.modules, name)  # whatever other tests of this process imported
    assert "Not here: matplotlib is not installed" in run("--help").output
    result = run("reproduce", "landscape", "--fmt", "fp4")
    assert result.exit_code == 1 and "Traceback" not in result.output
    monkeypatch.setattr(doctor, "examine", lambda: doctor.Examination(()))
    assert run("doctor").exit_code == 0


def test_entry_points():
    (command,) = entry_points(group="console_scripts", name="lotion-fx")
    assert command.load() is cli.main
    (backend,) = entry_points(group="torch_dynamo_backends", name="lotion_fx")
    assert callable(backend.load())


@pytest.mark.parametrize("sees", [True, False])
def test_a_wait_without_parts_has_a_line_where_somebody_sees_it(monkeypatch, capsys, sees):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: sees)
    with progress.with_a_line("compiling"):
        assert capsys.readouterr().err == ("compiling ..." if sees else "")
    left = capsys.readouterr().err
    assert left == ("\r" + " " * len("compiling ...") + "\r" if sees else "")
