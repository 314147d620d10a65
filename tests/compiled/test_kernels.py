"""Every test of a kernel, on CPU tensors in Triton's interpreter: the checks that ``pytest -m gpu`` runs on a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.harness.interpreted import ROOT, Outcome, run_interpreted

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where these tests run")
def test_gpu_tests_skip_with_a_reason() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-rs"]
    done = subprocess.run([*command, "tests/kernels/test_division.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no CUDA device" in done.stdout
