"""Runs a file of tests with Triton's interpreter, which a process chooses when it imports Triton: in one of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_interpreted(tests: Path, *options: str) -> None:
    """Runs pytest on a file with ``TRITON_INTERPRET=1``.

    Args:
        tests: the file.
        options: more of pytest's arguments.

    Raises:
        AssertionError: with pytest's output, where a test fails or none passes.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *options, str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{tests.name} in Triton's interpreter:\n{output}"
    assert re.search(r"\b[1-9]\d* passed", output), f"{tests.name} ran no test in Triton's interpreter:\n{output}"
