"""`benchmarks/gpu.py` on the operators' CPU path: what it will time on a GPU runs."""

import runpy
from pathlib import Path

import pytest
import torch

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "gpu.py"))
CPU = torch.device("cpu")


def test_every_case_runs_and_both_sides_agree() -> None:
    cases = [*BENCHMARK["cases"](CPU, {"tiny": (16, 64)}), *BENCHMARK["published"](CPU, (16, 64))]
    assert len(cases) == 14
    for case in cases:
        found = case.kernel()
        assert found is None or len(found) > 0  # the term works in place


@pytest.mark.slow
def test_a_row_has_both_times() -> None:
    case = next(iter(BENCHMARK["cases"](CPU, {"tiny": (16, 64)})))
    name, shape, ours, roofline, theirs, ratio = BENCHMARK["row"](case, CPU, 100.0)
    assert (name, shape) == ("smooth/rtn nvfp4", "16x64")
    assert roofline == pytest.approx(16 * 64 * 4 / 1e5 / ours) and ratio == pytest.approx(theirs / ours)
