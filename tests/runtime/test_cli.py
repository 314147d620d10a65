"""The `lotion-fx` command: help, and user errors without a traceback."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import pytest
from typer.testing import CliRunner

from lotion_fx import cli


def run(*arguments: str):
    return CliRunner().invoke(cli.build(), arguments)


def test_help_lists_the_subcommands():
    result = run("--help")
    assert result.exit_code == 0
    assert "quickstart" in result.output


def test_quickstart_help_lists_its_options():
    output = run("quickstart", "--help").output
    for option in ("--fmt", "--seeds", "--steps", "--methods", "--quick", "--json", "--plot"):
        assert option in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fmt", "nvpf4"], "nvpf4"),
        (["--methods", "ptq,sgd"], "unknown method 'sgd'"),
        (["--seeds", "0"], "--seeds"),
        (["--json", "/no/such/folder/rows.json"], "there is no folder /no/such/folder"),
        (["--plot", "/no/such/folder/curves.png"], "there is no folder /no/such/folder"),
    ],
)
def test_user_errors_are_one_line_before_any_training(arguments, message):
    result = run("quickstart", *arguments)
    assert result.exit_code == 2
    *_, last = result.output.strip().splitlines()
    assert last.startswith("Error: ")
    assert message in last
    assert "Traceback" not in result.output


def test_missing_extra_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "lotion_fx.examples.quickstart", raising=False)
    with pytest.raises(SystemExit, match=r"typer is not installed; try: pip install 'lotion_fx\[examples\]'"):
        cli.main()


def test_entry_points():
    (command,) = entry_points(group="console_scripts", name="lotion-fx")
    assert command.load() is cli.main
    (backend,) = entry_points(group="torch_dynamo_backends", name="lotion_fx")
    assert callable(backend.load())
