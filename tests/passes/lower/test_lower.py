"""Lowering: which nodes of a graph become kernels, and that the model computes what it computed.

No device is needed: the kernels' operators have a CPU path, and which architecture a graph is for is a number.
"""

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import lotion_fx
from lotion_fx import alike, update
from lotion_fx.kernels.device_code import device_function
from lotion_fx.numerics.formats import resolve
from lotion_fx.passes.lower import lower
from lotion_fx.passes.lower.lower import inductor_cost, kernel_cost, prefers_kernel
from lotion_fx.passes.pipeline import ForwardState, JointState, Pass, watched
from tests.models import MLP


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """CPU graphs are lowered as if for sm_100; how many nodes each took."""
    taken: list[int] = []
    monkeypatch.setattr(lower, "arch_of", lambda device: 100)
    monkeypatch.setattr(update, "_specs", {})
    monkeypatch.setattr(alike, "_compiled", {})
    torch._dynamo.reset()  # or the code that was compiled without is found again
    with counted("lower", taken):
        yield taken


@contextlib.contextmanager
def counted(name: str, counts: list[int]) -> Iterator[None]:
    """Inside, how often a pass fired on each graph is added to the counts."""

    def watcher(each: Pass, before: str, state: ForwardState | JointState) -> None:
        if each.name == name and name in state.fired:
            counts.append(state.fired[name])

    with watched(watcher):
        yield


def trained(method: str, fmt: str, **settings: object) -> tuple[list[torch.Tensor], nn.Module]:
    torch.manual_seed(3)
    model = MLP()
    lotion_fx.transform(model, fmt, method=method, inner="aot_eager", calibrate=False, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(16, next(model.parameters()).shape[1])
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()], model


# Only a term asks for curvature: the methods without one are the same model under each.
TRAININGS = [
    *itertools.product(["lotion"], ["nvfp4", "int4"], ["factored", "full", "fisher"]),
    *itertools.product(["ste", "ste_scale"], ["nvfp4", "int4"], ["factored"]),
]


@pytest.mark.parametrize(("method", "fmt", "curvature"), TRAININGS)
def test_training_is_the_same(method: str, fmt: str, curvature: str, request: pytest.FixtureRequest) -> None:
    plain, _ = trained(method, fmt, curvature=curvature)
    taken = request.getfixturevalue("pretend")
    lowered, model = trained(method, fmt, curvature=curvature)
    for a, b in zip(plain, lowered, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    weights = [p for p in model.parameters() if p.dim() == 2]
    if method != "lotion":  # float32 int4 moves no byte less by the kernel
        assert taken[0] == (len(weights) if fmt == "nvfp4" else 0)
    else:
        assert sum(taken) == 0  # at the weights themselves there is nothing to round
        # What is bounded, as a term made of Adam's second moment always is, goes by Inductor's own kernel.
        assert any(spec.kernel for group in alike._compiled for spec in group[1]) == (curvature != "fisher")


def test_random_rounding_takes_the_kernel(pretend: list[int]) -> None:
    _, model = trained("rr", "nvfp4")
    assert pretend[0] == sum(p.dim() == 2 for p in model.parameters())


def test_evaluation_is_what_is_deployed(pretend: list[int]) -> None:
    """Bit for bit, and rounded before any graph: once, not in every forward."""
    _, model = trained("lotion", "nvfp4")
    model.eval()
    x = torch.randn(4, next(model.parameters()).shape[1])
    with torch.no_grad():
        found = model(x)
        assert sum(pretend) == 0
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(lotion_fx.rounding.rtn(p, resolve("nvfp4")))
        with lotion_fx.full_precision(model):
            assert torch.equal(found, model(x))


def test_a_cpu_graph_is_left_alone() -> None:
    assert lower.arch_of(torch.device("cpu")) is None


def test_a_scale_for_the_tensor_or_blocks_apart_need_the_kernel_everywhere() -> None:
    w = torch.empty(4096, 4096, dtype=torch.bfloat16)
    for arch in (80, 86, 89, 90, 100, 103, 120):
        for fmt, axis in (("nvfp4", -1), ("nvfp4", 0), ("int4", 0)):
            assert prefers_kernel("rtn", w, resolve(fmt), axis, arch), (arch, fmt, axis)
        assert not prefers_kernel("rtn", w.double(), resolve("nvfp4"), -1, arch)
        assert not prefers_kernel("rtn", w.t(), resolve("nvfp4"), -1, arch)


def test_costs_are_per_element() -> None:
    """A bfloat16 weight: Inductor's own counter says 4.00 for int4, 7.25 for nvfp4 and 6.25 for int4 along axis 0."""
    w = torch.empty(4096, 4096, dtype=torch.bfloat16)
    assert inductor_cost("rtn", w, resolve("int4"), -1).bytes == 4
    assert inductor_cost("rtn", w, resolve("nvfp4"), -1).bytes == 7.25
    assert inductor_cost("rtn", w, resolve("int4"), 0).bytes == 6.25
    assert kernel_cost("rtn", w, resolve("nvfp4"), 0).bytes == 6
    assert kernel_cost("term", w.float(), resolve("int4"), -1).bytes == 12


def test_products_are_fused_where_that_is_faster() -> None:
    """Ampere's desktop cards and few features: the squares cost more than the library's lead; not on Blackwell."""
    assert lower.prefers_fused_products(8192, 4096, 4096, torch.bfloat16, 86)
    assert not lower.prefers_fused_products(8192, 4096, 4096, torch.bfloat16, 80)
    assert lower.prefers_fused_products(4096, 768, 768, torch.bfloat16, 80)
    assert not any(lower.prefers_fused_products(4096, n, n, torch.bfloat16, 100) for n in (1024, 4096))
    assert not lower.prefers_fused_products(8192, 4096, 4096, torch.float32, 86)


def test_only_wanted_products_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the joint graph of a transformed model, and with the same result."""
    found: list[int] = []
    for wanted in (False, True):
        torch._dynamo.reset()
        monkeypatch.setattr(lower, "prefers_fused_products", lambda *args, wanted=wanted: wanted)
        monkeypatch.setattr(lower, "arch_of", lambda device: 86)
        with counted("lower products", found):
            _trained_by_pass("full")
    assert found[0] == 0 and found[1] == 2


def _trained_by_pass(curvature: str) -> None:
    """`aot_eager` runs the same pass on the joint graph by its partition function."""
    torch.manual_seed(3)
    model = MLP()
    lotion_fx.transform(model, "int4", curvature=curvature, inner="aot_eager", calibrate=False)
    model(torch.randn(16, next(model.parameters()).shape[1])).square().mean().backward()


def test_a_kernel_may_be_made_in_the_middle_of_a_trace() -> None:
    """Its device functions are traced from the formats, which must not end up in the graph under way."""
    fmt = resolve("int4/48")

    def traced(w: torch.Tensor) -> torch.Tensor:
        device_function("nearest", fmt)
        return w + 1

    graph = make_fx(traced, tracing_mode="fake")(torch.ones(4)).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_function", "output"]


@pytest.mark.slow
def test_a_name_that_means_another_format_is_compiled_anew(tmp_path: Path) -> None:
    """Two processes share a compile cache and a format's name; each gets its own format's term."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    script = [sys.executable, str(Path(__file__).parent / "cached_term.py")]
    errors = [
        float(subprocess.run([*script, first], env=environment, capture_output=True, text=True, check=True).stdout)
        for first in ("-1.0", "-0.7")
    ]
    assert max(errors) < 1e-6
