"""Runs jobs of `distributed_worker` on several ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.runtime import distributed_worker

ROOT = Path(__file__).parents[2]
TIMEOUT = 120


def launched(jobs: Mapping[str, tuple[str, dict[str, Any]]], world: int = 2) -> dict[str, list[dict[str, Any]]]:
    """What each rank found, by job.

    Args:
        jobs: each the name of a function, of `distributed_worker` or ``module.function``, and its options.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(dict(jobs), Path(folder) / "jobs.pt")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-m", distributed_worker.__name__, folder]
        ranks = [
            subprocess.Popen([*command, str(rank), str(world)], cwd=ROOT, env=environment) for rank in range(world)
        ]
        try:
            for rank in ranks:
                rank.wait(timeout=TIMEOUT * (1 + len(jobs) // 10) * world // 2)
        except subprocess.TimeoutExpired:
            pass  # what is missing tells where it hung
        finally:
            for rank in ranks:
                rank.kill()
        found = {}
        for name in jobs:
            files = [Path(folder) / f"{name}.{rank}.pt" for rank in range(world)]
            missing = {"error": f"{name} did not end"}
            found[name] = [torch.load(file) if file.exists() else missing for file in files]
        return found
