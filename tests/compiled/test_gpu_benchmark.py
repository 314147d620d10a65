"""`benchmarks/gpu.py` on the operators' CPU path: what it will time on a GPU runs."""

import runpy
from pathlib import Path

import pytest
import torch

from lotion_fx.kernels.packed import unpack
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import resolve

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "gpu.py"))
CPU = torch.device("cpu")


def test_every_case_times_what_its_name_says() -> None:
    """Rounding gives the reference's bits, packing unpacks to them, and the term changes its gradient."""
    cases = [*BENCHMARK["cases"](CPU, {"tiny": (16, 64)}), *BENCHMARK["published"](CPU, (16, 64))]
    assert len(cases) == 14
    for case in cases:
        first, *rest = case.kernel.args
        before = first.clone()
        found = case.kernel()
        if "term" in case.name:
            assert not torch.equal(first, before)
        elif "pack" in case.name:
            assert torch.equal(unpack(found, rest[0], 64).to(first.dtype), rounding.rtn(first, resolve(rest[0])))
        elif "rr" not in case.name:
            assert torch.equal(found[0], rounding.rtn(first, resolve(rest[0])))


@pytest.mark.slow
def test_a_row_has_both_times() -> None:
    case = next(iter(BENCHMARK["cases"](CPU, {"tiny": (16, 64)})))
    name, shape, ours, roofline, theirs, ratio = BENCHMARK["row"](case, CPU, 100.0)
    assert (name, shape) == ("smooth/rtn nvfp4", "16x64")
    assert roofline == pytest.approx(16 * 64 * 4 / 1e5 / ours) and ratio == pytest.approx(theirs / ours)
