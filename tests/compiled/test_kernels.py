"""Every test of a kernel, on CPU tensors in Triton's interpreter: the checks that ``pytest -m gpu`` runs on a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.harness.interpreted import ROOT, Outcome, run_interpreted
from tests.kernels import conftest

KERNEL_TESTS = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
WITH_SLOW_ONES = [file for file in KERNEL_TESTS if "pytest.mark.slow" in file.read_text()]


def each(files: list[Path]) -> pytest.MarkDecorator:
    marked = [pytest.param(file, marks=pytest.mark.interpreted(file), id=file.stem) for file in files]
    return pytest.mark.parametrize("file", marked)


@each(KERNEL_TESTS)
def test_kernel(file: Path, interpreted: Outcome) -> None:
    interpreted.check()


@pytest.mark.slow
@each(WITH_SLOW_ONES)
def test_kernel_in_full(file: Path, interpreted: Outcome) -> None:
    interpreted.check()


BODIES = {
    "empty": "",
    "skipped": "import pytest\n@pytest.mark.skip\ndef test_nothing(): ...\n",
    "failed": "def test_it(): assert False, 'as planted'\n",
    "broken": "import no_such_module\n",
    "good": "def test_it(): ...\n",
}


def test_a_file_that_fails_or_runs_nothing_is_told_from_a_good_one(tmp_path: Path) -> None:
    files = {name: tmp_path / f"test_{name}.py" for name in BODIES}
    for name, file in files.items():
        file.write_text(BODIES[name])
    found = run_interpreted(files.values(), f"--rootdir={tmp_path}", "--continue-on-collection-errors")
    expected = {"empty": "no test ran", "skipped": "no test ran", "failed": "as planted", "broken": "no_such_module"}
    for name, message in expected.items():
        with pytest.raises(AssertionError, match=message):
            found[files[name]].check()
    found[files["good"]].check()


@pytest.mark.parametrize("there_is_one", [False, True])
def test_elsewhere_a_kernels_tests_are_a_gpus_and_skip_without_one(there_is_one: bool, monkeypatch) -> None:
    monkeypatch.setattr(conftest, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_one)
    marks: dict[str, list[pytest.MarkDecorator]] = {"kernels": [], "compiled": []}
    items = [
        SimpleNamespace(path=ROOT / "tests" / folder / "test_it.py", add_marker=of.append)
        for folder, of in marks.items()
    ]
    conftest.pytest_collection_modifyitems(items)
    assert marks["compiled"] == []
    assert [mark.name for mark in marks["kernels"]] == ["gpu"] + ["skip"] * (not there_is_one)
    assert there_is_one or "no CUDA device" in marks["kernels"][1].kwargs["reason"]
