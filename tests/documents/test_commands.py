"""Every command in the README and the docs is one: its file is there, and its own parser takes its options.

Nothing is run: a script ends where its arguments are parsed.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import sys

import pytest
import typer

from lotion_fx import cli
from tests.documents.markdown import PAGES, ROOT, commands
from tests.test_release import PYPROJECT

OF_THE_SHELL = {".", "cd", "ln", "mkdir", "mypy", "ruff"}  # others' programs, with nothing of ours to be wrong about
CI_TAKES = {"oldest", "newest", "slow"}
PYTEST_OPTIONS = {"-m": 1, "-k": 1, "-s": 0, "-n": 1, "--pdb": 0, "--durations": 1}  # of documents, with their values


class Parsed(Exception):
    """The arguments were taken, and a program would begin."""


@pytest.fixture
def parsing(monkeypatch):
    """argparse and typer go as far as the arguments, and no farther."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    def invoke(self, ctx):
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(typer.core.TyperCommand, "invoke", invoke)
    return monkeypatch


def check_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / words[0]
    assert script.is_file(), f"there is no {words[0]}"
    if not re.search(r"parse_args|start\(main\)", script.read_text()):
        assert not words[1:], f"{words[0]} takes no arguments"
        return
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend(script.parent)
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


def check_ours(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Parsed):
        cli.build()(words)


def check_pip(words: list[str]) -> None:
    if words[:2] != ["install", "-e"]:
        assert words[0] == "install"
        return
    (extras,) = re.fullmatch(r"\.\[([\w,]+)\]", words[2]).groups()
    assert set(extras.split(",")) <= PYPROJECT["project"]["optional-dependencies"].keys()


def check_pytest(words: list[str]) -> None:
    rest = iter(words)
    for word in rest:
        if word.startswith("-"):
            assert word in PYTEST_OPTIONS, f"{word}: not among the options that are known here"
            for _ in range(PYTEST_OPTIONS[word]):
                next(rest)
        else:
            assert re.fullmatch(r"<\w+>", word) or (ROOT / word).exists(), f"there is no {word}"


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises `AssertionError`, or the error of the command's own parser, for a command that would not begin."""
    program, *rest = words
    if program in ("python", "python3"):
        if rest[0] == "-m":
            assert importlib.util.find_spec(rest[1]), f"there is no module {rest[1]}"
        elif placeholder := re.search(r"<\w+>", rest[0]):
            assert any(ROOT.glob(rest[0].replace(placeholder[0], "*"))), f"no file is named like {rest[0]}"
        else:
            check_script(rest, monkeypatch)
    elif program == "lotion-fx":
        check_ours([re.sub(r"<\w+>", "smooth/", word) for word in rest], monkeypatch)
    elif program == "pip":
        check_pip(rest)
    elif program == "pytest":
        check_pytest(rest)
    elif program == ".ci/run":
        assert set(rest) <= CI_TAKES
    else:
        assert program in OF_THE_SHELL, f"{program}: no command that is known here"


COMMANDS = sorted({tuple(words) for page in PAGES for words in commands(page.read_text())})


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_would_begin(words: tuple[str, ...], parsing, capsys) -> None:
    check(list(words), parsing)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("python benchmarks/no_such.py", "there is no benchmarks/no_such.py"),
        ("python benchmarks/step.py --round 3 --no-such", "2"),
        ("python benchmarks/scales.py --fmt int4", "takes no arguments"),
        ("python examples/landscape.py --fmt int44", "2"),
        ("python -m tests.no_such", "there is no module"),
        ("lotion-fx kernels --arch sm_79", "2"),
        ("lotion-fx no-such", "2"),
        ("pip install -e .[no_such]", "no_such"),
        ("pytest tests/no_such", "there is no tests/no_such"),
        ("pytest --no-such", "not among the options"),
        ("python examples/<no>_such.py", "no file is named"),
        (".ci/run newest fast", "fast"),
        ("make", "no command that is known here"),
    ],
)
def test_a_wrong_command_is_seen(command: str, told: str, parsing, capsys) -> None:
    with pytest.raises((AssertionError, SystemExit), match=told):
        check(command.split(), parsing)


def test_commands_are_found_in_blocks_and_in_the_text() -> None:
    text = """```bash
pip install -e ".[test]" && pytest   # both
(cd build && lotion-fx \\
    export a b)
```
    python benchmarks/step.py   # a note

It is made by `OMP_NUM_THREADS=1 python
benchmarks/decode.py --rounds 2`, `python` and `step.py`.
"""
    assert [" ".join(words) for words in commands(text)] == [
        "pip install -e .[test]",
        "pytest",
        "cd build",
        "lotion-fx export a b",
        "python benchmarks/step.py",
        "python benchmarks/decode.py --rounds 2",
    ]
