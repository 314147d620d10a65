"""The example for several GPUs runs on two CPU ranks, shrunk, and a run taken up again ends as the whole one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lotion_fx.examples import fsdp2_lm

ROOT = Path(__file__).parents[2]


def run(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["examples/fsdp2_lm.py", "--tiny", "--steps", "4", "--every", "2", "--inner", "aot_eager", "--recompute"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    found = subprocess.run(
        [*command, "--folder", folder], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@pytest.mark.slow
def test_it_trains_and_resumes(tmp_path):
    whole = run(tmp_path)
    assert [int(step) for step in re.findall(r"step (\d+):", whole)] == [0, 1, 2, 3]
    (tmp_path / "latest").write_text("step-2")
    resumed = run(tmp_path)
    assert [int(step) for step in re.findall(r"step (\d+):", resumed)] == [2, 3]
    assert re.findall(r"held out.*", whole) == re.findall(r"held out.*", resumed) != []


@pytest.mark.parametrize(("size", "count"), [("150M", 113.6e6), ("300M", 269.0e6)])
def test_the_sizes_are_what_is_said(size, count):
    with torch.device("meta"):
        model = fsdp2_lm.LM(fsdp2_lm.SIZES[size], recompute=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(count, rel=0.005)
