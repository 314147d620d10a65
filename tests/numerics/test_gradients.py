"""Gradients of rounding by float64 autograd of the reference; the same bits under every compiler."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lotion_fx.numerics.formats import resolve
from lotion_fx.numerics.rounding import (
    rtn,
    rtn_vjp,
    scale,
    variance,
    variance_vjp,
)
from tests.numerics.reference import FUNCTIONS, draw, every, reference, shapes, weights_with_ties


@every
@shapes
@pytest.mark.parametrize("scale_grad", [False, True])
def test_variance_vjp_is_autograd(fmt, shape, axis, scale_grad):
    w = weights_with_ties(shape).requires_grad_()
    h = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    s, lo, hi, _ = reference(w, fmt, axis)
    s = s if scale_grad else s.detach()
    term = torch.where(lo < hi, h * (w - s * lo) * (s * hi - w), 0.0).sum()
    (want,) = torch.autograd.grad(term, w)
    got = variance_vjp(w.detach(), h, fmt, axis, scale_grad=scale_grad)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12 * float(w.detach().abs().max()))


@every
@shapes
@pytest.mark.parametrize("scale_grad", [False, True])
def test_rtn_vjp_is_autograd(fmt, shape, axis, scale_grad):
    w = weights_with_ties(shape).requires_grad_()
    grad = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    s, _, _, near = reference(w, fmt, axis)
    z = (w / s).detach().clamp(fmt.grid.levels[0], fmt.grid.levels[-1])
    s = s if scale_grad else s.detach()
    (want,) = torch.autograd.grad((grad * (s * (near - z) + w)).sum(), w)
    got = rtn_vjp(w.detach(), grad, fmt, axis, scale_grad=scale_grad)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12 * float(w.detach().abs().max()))


@pytest.mark.parametrize("name", ["int4", "nf4", "fp4/tensor"])
def test_variance_vjp_is_the_slope_of_the_variance(name):
    """Where the scale is not snapped the gradient is the true one: central differences away from levels."""
    fmt = resolve(name)
    w = torch.randn(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    h = torch.rand(w.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    got = variance_vjp(w, h, fmt)
    step = 1e-7
    for i in range(w.numel()):
        d = torch.zeros_like(w)
        d.view(-1)[i] = step
        slope = ((h * variance(w + d, fmt)).sum() - (h * variance(w - d, fmt)).sum()) / (2 * step)
        assert abs(slope - got.flatten()[i]) < 1e-5, i


def test_curvature_broadcasts_and_results_have_the_compute_dtype():
    w, fmt = draw((6, 40), dtype=torch.bfloat16), resolve("int4")
    row = torch.rand(1, 40)
    got = variance_vjp(w, row, fmt)
    assert got.dtype == torch.float32 == rtn_vjp(w, w, fmt).dtype
    assert torch.equal(got, variance_vjp(w, row.expand(6, 40).contiguous(), fmt))


@every
def test_traced_graphs_are_plain_and_give_the_same_bits(fmt):
    w, other = draw((5, 37), dtype=torch.float32), draw((5, 37), seed=1, dtype=torch.float32)
    for name, function in FUNCTIONS.items():
        graph = make_fx(partial(function, fmt=fmt), tracing_mode="fake")(w)
        assert torch.equal(graph(other), function(other, fmt)), name
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            assert not isinstance(value, Tensor) or "float8" not in str(value.dtype), node


@pytest.mark.parametrize("name", ["int4", "int4/tensor", "nvfp4", "mxfp4", "nf4"])
def test_dynamo_captures_whole_functions(name):
    fmt, w = resolve(name), draw((5, 37), dtype=torch.float32)
    for function in FUNCTIONS.values():
        torch._dynamo.reset()
        compiled = torch.compile(partial(function, fmt=fmt), backend="eager", fullgraph=True)
        assert torch.equal(compiled(w), function(w, fmt))


@every
def test_fake_tensors_pass_through(fmt):
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16):
            w = torch.empty(5, 37, dtype=dtype)
            for name, function in FUNCTIONS.items():
                out = function(w, fmt)
                assert out.shape == w.shape, name
                assert out.dtype == (dtype if name in ("rtn", "rr") else torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int4", "int3/5", "int8", "nvfp4", "mxfp4", "mxfp6_e3m2", "fp8", "nf4"])
def test_inductor_gives_the_same_bits(name, dtype):
    fmt = resolve(name)
    # Random bit patterns, ties, zeros of both signs, blocks with tiny scales, a short last block.
    w = draw((64, 103), dtype=torch.float32) * torch.logspace(-40, 3, 64)[:, None]
    w[1] = torch.arange(103) / 2 - 25
    w[2, ::2] = -0.0
    w = w.to(dtype)
    torch._dynamo.reset()
    # Something elementwise (and exact) follows: a compiler that fuses it must not lose the short last block.
    got, want = torch.compile(lambda x: -rtn(x, fmt), fullgraph=True)(w), -rtn(w, fmt)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(got.view(bits), want.view(bits))
    assert torch.equal(torch.compile(lambda x: scale(x, fmt), fullgraph=True)(w), scale(w, fmt))
    h = w.float() ** 2
    vjp = torch.compile(lambda x: variance_vjp(x, h, fmt), fullgraph=True)(w)
    torch.testing.assert_close(vjp, variance_vjp(w, h, fmt), rtol=1e-4, atol=1e-5 * float(vjp.abs().max()))
