"""Every test of a kernel, on CPU tensors in Triton's interpreter: the checks that ``pytest -m gpu`` runs on a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.harness.interpreted import ROOT, run_interpreted

KERNEL_TESTS = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))


@pytest.mark.parametrize("tests", KERNEL_TESTS, ids=lambda path: path.stem)
def test_kernel(tests: Path) -> None:
    run_interpreted(tests)


@pytest.mark.parametrize(
    "body", ["", "import pytest\n@pytest.mark.skip\ndef test_nothing(): ...\n"], ids=["empty", "skipped"]
)
def test_a_file_that_runs_nothing_fails(tmp_path: Path, body: str) -> None:
    (tmp_path / "test_nothing.py").write_text(body)
    with pytest.raises(AssertionError, match="test_nothing.py"):
        run_interpreted(tmp_path / "test_nothing.py", f"--rootdir={tmp_path}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where these tests run")
def test_gpu_tests_skip_with_a_reason() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-rs", "tests/kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no CUDA device" in done.stdout
