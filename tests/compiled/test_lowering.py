"""The cost model of `passes.lower` against what Inductor emits for the same work, and the kernel's machine code."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lotion_fx.compiling import inductor_options
from lotion_fx.kernels import tuning
from lotion_fx.kernels.audit import aot, weight_works
from lotion_fx.kernels.audit.models import SMALL
from lotion_fx.kernels.emit.emitted import Emitted, compile_for, compile_kernels
from lotion_fx.kernels.view import View
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import resolve
from lotion_fx.passes.lower.lower import inductor_cost, kernel_cost
from tests.harness.versions import needs_emission

SHAPE = (4096, 4096)
ELEMENTS = SHAPE[0] * SHAPE[1]


def emitted(function: Callable[..., object], arch: int, *dtypes: torch.dtype) -> Emitted:
    with FakeTensorMode():
        weights = [torch.empty(SHAPE, dtype=dtype) for dtype in dtypes]
        gm = make_fx(function)(*weights)
        return compile_for(arch, gm, weights, inductor_options(None, {}))[1][0]


def term(fmt: str, axis: int) -> Callable[[Tensor, Tensor, Tensor], None]:
    def add(grad: Tensor, w: Tensor, h: Tensor) -> None:
        grad.add_(rounding.variance_vjp(w, h, resolve(fmt), axis))

    return add


@needs_emission
@pytest.mark.parametrize(
    ("fmt", "axis"),
    [
        ("int4", -1),
        pytest.param("int4", 0, marks=pytest.mark.slow),
        pytest.param("nvfp4", -1, marks=pytest.mark.slow),
        pytest.param("int8", -1, marks=pytest.mark.slow),
    ],
)
def test_bytes_that_inductor_moves(fmt: str, axis: int) -> None:
    """By its own counter, to a hundredth; the kernel's are its counted traffic."""
    found = emitted(lambda w: rounding.rtn(w, resolve(fmt), axis), 100, torch.bfloat16)
    weight = torch.empty(SHAPE, dtype=torch.bfloat16, device="meta")
    expected = inductor_cost("rtn", weight, resolve(fmt), axis).bytes
    assert found.bytes / ELEMENTS == pytest.approx(expected, rel=0.01)
    view = View.of(SHAPE, resolve(fmt), axis)
    own = weight_works.smooth_traffic(view, resolve(fmt), "rtn", "bf16")
    absmax_pass = 2 * ELEMENTS if resolve(fmt).law.two_level or not view.whole else 0
    assert (own + absmax_pass) / ELEMENTS == pytest.approx(
        kernel_cost("rtn", weight, resolve(fmt), axis).bytes, rel=0.01
    )


@needs_emission
@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
def test_bytes_of_the_term(fmt: str) -> None:
    """The table counts a factored curvature, which costs nothing; here it is dense, 4 bytes of both sides."""
    found = emitted(term(fmt, -1), 100, torch.float32, torch.float32, torch.float32)
    expected = inductor_cost("term", torch.empty(SHAPE, device="meta"), resolve(fmt), -1).bytes + 4
    assert found.bytes / ELEMENTS == pytest.approx(expected, rel=0.03)


def per_element(once: int, loop: int, iterations: int, warps: int, elements: int) -> float:
    return (once + loop * iterations) * warps * 32 / elements


@needs_emission
@pytest.mark.parametrize("result", ["rtn", pytest.param("term", marks=pytest.mark.slow)])
def test_instructions(result: str) -> None:
    """Of one thread for each element, static counts, int4 on sm_100: what the table says, to a quarter of it."""
    dtype = {"rtn": "bf16", "term": "fp32"}[result]
    work = weight_works.smooth(100, SMALL.up, -1, "int4", result, dtype)
    config = tuning.choose(work.kernel, work.shape_class, 100, work.configs)
    seen, tiles = aot.audit(work, config, 100), config.constants["TILES"]
    ours = per_element(
        sum(seen.once.values()), sum(seen.loop.values()), tiles, config.num_warps, tiles * config.constants["SIZE"]
    )
    weight = torch.empty(SHAPE, dtype=getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[dtype]), device="meta")
    assert ours == pytest.approx(kernel_cost(result, weight, resolve("int4"), -1).instructions, rel=0.25)
    types = [torch.bfloat16] if result == "rtn" else [torch.float32] * 3
    function = term("int4", -1) if result == "term" else lambda w: rounding.rtn(w, resolve("int4"))
    found = emitted(function, 100, *types)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernels = compile_kernels(found.source, 100)
    counts = []
    for _, config, kernel in kernels:
        evidence = aot._evidence(kernel, 100)
        if not isinstance(evidence, str) and not evidence.spills:
            counts.append(per_element(evidence.sass, 0, 0, config.num_warps, config.constants["XBLOCK"] * 32))
    assert min(counts) == pytest.approx(inductor_cost(result, weight, resolve("int4"), -1).instructions, rel=0.25)


@needs_emission
def test_a_lowered_node_is_inlined_for_the_device() -> None:
    """The kernel stands in the emitted module, beside its absmax, with E2M1 conversions on Blackwell."""

    def rounded(w: Tensor) -> Tensor:
        return torch.ops.lotion_fx.smooth(w, "nvfp4", -1, "randomized", True, False, False)[0]

    source = emitted(rounded, 100, torch.bfloat16).source
    (kernel,) = [kernel for name, _, kernel in compile_kernels(source, 100) if name.startswith("smooth_kernel")]
    evidence = aot._evidence(kernel, 100)
    assert not isinstance(evidence, str) and not evidence.lost(("F2FP.SATFINITE.E2M1",))
