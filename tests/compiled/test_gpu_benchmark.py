"""`benchmarks/gpu.py` without a GPU: its layout, its parts on CPU tensors, and that one failing part loses no other."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lotion_fx.kernels.packed import unpack
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import resolve
from lotion_fx.timing import interleaved

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def benchmark(monkeypatch):
    """A module of the benchmarks' folder, as the command imports it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return lambda name: __import__(name)


def test_every_case_times_what_its_name_says(benchmark) -> None:
    """Rounding gives the reference's bits, packing unpacks to them, and the term changes its gradient."""
    kernels = benchmark("gpu_kernels")
    cases = [*kernels.cases(CPU, {"tiny": (16, 64)}), *kernels.published(CPU, (16, 64))]
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


def test_every_case_on_a_models_shape_has_a_predicted_time(benchmark) -> None:
    """The table of works is asked under the names that it has."""
    from lotion_fx.kernels.audit.works import catalog

    kernels = benchmark("gpu_kernels")
    works = {(work.kernel, work.shape) for work in catalog(90)}
    wanted = [case.work for case in kernels.cases(torch.device("meta"), {"150M": kernels.SHAPES["150M"]})]
    assert len(wanted) == 12 and set(wanted) <= works
    few = {("smooth/rtn", "3072x768 bf16 nvfp4")}
    ((key, us),) = kernels.predicted(few, 90).items()
    assert key in few and 2 < us < 100


def test_a_row_has_both_times(benchmark) -> None:
    kernels = benchmark("gpu_kernels")
    one = kernels.Case("a", "16x64", lambda: None, lambda: time.sleep(0.002), 4096, ("smooth/rtn", "tiny"))
    row = kernels.row(one, CPU, 100.0, {("smooth/rtn", "tiny"): 2.0})
    assert row["of_roofline"] == pytest.approx(4096 / 1e5 / row["measured_us"])
    assert (
        row["inductor_over_kernel"] == pytest.approx(row["inductor_us"] / row["measured_us"])
        and row["inductor_us"] > 2e3
    )
    assert row["measured_over_predicted"] == pytest.approx(row["measured_us"] / 2)


def test_ratios_are_of_the_same_round(benchmark) -> None:
    """Each round is as slow as it likes: the ratio does not see it."""
    slow = iter([1.0, 100.0, 3.0, 7.0] * 2)
    rounds: dict[str, list[float]] = {"plain": [], "ste": []}
    now = [0.0]

    def step(name: str, factor: float):
        def run() -> float:
            if not any(len(times) > len(rounds[name]) for times in rounds.values()):
                now[0] = next(slow)
            rounds[name].append(now[0] * factor)
            return rounds[name][-1]

        return run

    found = interleaved({"plain": step("plain", 1.0), "ste": step("ste", 1.5)}, 4)
    assert found["ste"]["ratio"] == pytest.approx(1.5) and found["plain"]["ratio_high"] == 1.0


def test_the_steps_train_and_a_method_that_fails_loses_no_other(benchmark, monkeypatch) -> None:
    steps = benchmark("gpu_step")
    monkeypatch.setattr(steps, "METHODS", {"plain": None, "broken": {"method": "none"}, "ste": {"method": "ste"}})
    plain, broken, ste = steps.rows(CPU, steps.TINY, inner="aot_eager", rounds=3)
    assert "expected one of" in broken["error"] and "ratio" not in broken
    assert plain["ratio"] == 1.0 and ste["ratio"] > 0 and ste["parameters"] == plain["parameters"]
    model, step = steps.step_of({"curvature": "factored"}, steps.TINY, CPU, "aot_eager")
    before = model.blocks[0].up.weight.detach().clone()
    step()
    assert not torch.equal(model.blocks[0].up.weight, before)
    assert steps.rows(CPU, steps.TINY, until=time.monotonic() - 1)[0]["error"].startswith("left out")


def test_the_model_has_124_million_parameters(benchmark) -> None:
    steps = benchmark("gpu_step")
    with torch.device("meta"):
        model = steps.GPT(steps.Size())
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(124.3e6, rel=0.01)


def test_one_part_that_fails_is_recorded_and_the_others_go_on(benchmark, monkeypatch) -> None:
    gpu = benchmark("gpu")

    def broken(device: str, quick: bool, until: float):
        raise RuntimeError("planted")

    found = gpu.report({"one": broken, "two": lambda device, quick, until: {"rows": [{"a": 1}]}}, "cpu", True)
    assert "planted" in found["one"]["error"] and found["two"]["rows"] == [{"a": 1}]
    assert "planted" in gpu.text({"device": "x", "torch": "1", "triton": "2", "parts": found})
    monkeypatch.setattr(gpu, "SECONDS", -1)
    assert "time was up" in gpu.report({"two": lambda *_: {}}, "cpu", True)["two"]["error"]


def test_the_layout_imports_from_a_bare_checkout(benchmark, tmp_path) -> None:
    tree = benchmark("gpu").lay_out(tmp_path / "tree")
    code = "import lotion_fx, lotion_fx.passes, lotion_fx.kernels as k; print(lotion_fx.__file__, k.__path__[0])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(tree), "PATH": ""}, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(tree / "lotion_fx" / "__init__.py"), str(tree / "lotion_fx" / "kernels")]


@pytest.mark.slow
def test_the_command(tmp_path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--quick"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "gpu.json")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(found["parts"]) == {"step", "kernels", "tests"} and found["device"] == "cpu"
    assert [row["method"] for row in found["parts"]["step"]["rows"]][:2] == ["plain", "plain again"]
    assert len(found["parts"]["kernels"]["rows"]) == 14 and "tests collected" in found["parts"]["tests"]["summary"]
