"""Runs files of tests with Triton's interpreter, which a process chooses when it imports Triton: one for all files."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]


@dataclass
class Outcome:
    """What became of one file.

    Args:
        passed: how many tests passed.
        failures: the text of each test that did not, skipped ones aside.
        output: of the whole process.
    """

    passed: int
    failures: list[str]
    output: str

    def check(self) -> None:
        """Raises `AssertionError`, with what is known of it, where a test failed or none passed."""
        assert not self.failures, "in Triton's interpreter:\n" + "\n".join(self.failures)
        assert self.passed, f"no test ran in Triton's interpreter:\n{self.output}"


def run_interpreted(files: Iterable[Path], *options: str) -> Mapping[Path, Outcome]:
    """Runs pytest on files with ``TRITON_INTERPRET=1``, in one process for all, as Triton takes seconds to import.

    Args:
        files: of tests.
        options: more of pytest's arguments.
    """
    files = list(files)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--tb=short"]
        command += [f"--junitxml={report}", "-o", "junit_family=xunit1"]  # the family that names files
        command += [*options, *map(str, files)]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    outcomes = {file: Outcome(0, [], done.stdout + done.stderr) for file in files}
    known = {file.name: outcome for file, outcome in outcomes.items()}
    for case in cases:
        # What fails while it is collected has a name of its own, and no file.
        name = Path(case.get("file") or f"{case.get('name', '').rsplit('.', 1)[-1]}.py").name
        faults = [f"{name}::{case.get('name')}\n{fault.text}" for fault in (*case.iter("failure"), *case.iter("error"))]
        known[name].failures += faults
        known[name].passed += not faults and case.find("skipped") is None
    return outcomes
