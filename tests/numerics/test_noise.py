"""Noise laws against exact enumeration of their levels, central differences and the symbolic expressions."""

from __future__ import annotations

import itertools
import subprocess
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import mpmath
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import lotion_fx
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import codebook, resolve
from lotion_fx.numerics.noise import (
    RANDOMIZED,
    SMOOTHSTEP,
    D,
    NoiseLaw,
    gaussian,
    noises,
    register_noise,
    resolve_noise,
)
from lotion_fx.numerics.printer import TorchPrinter, gap, hi, lo, reach, source, third, torch_function, z
from lotion_fx.state import registry, smoothings_of
from lotion_fx.update import term_of
from lotion_fx.variants import Backend
from tests.models import MLP

HALF = sympy.Rational(1, 2)
HUMP = sympy.Piecewise((D**2 * (1 - 2 * D) ** 2, D < HALF), ((1 - D) ** 2 * (2 * D - 1) ** 2, True))
WIDE = NoiseLaw("wide", (2 * D**2 * (3 - 2 * D) + D) / 3 - HUMP, 2 * HUMP)  # with a third level
CLIPPED = NoiseLaw("clipped", sympy.Min(1, sympy.Max(0, 2 * D - HALF)))
BENT = NoiseLaw("bent", (sympy.tanh(6 * D - 3) / sympy.tanh(3) + (2 * D - 1) * sympy.Abs(2 * D - 1)) / 4 + HALF)
ROOTS = NoiseLaw(
    "roots",
    (D * sympy.sqrt(D) + sympy.log(1 + D) / sympy.log(2) + 1 - sympy.cos(sympy.pi * D / 2)) / 4
    + (1 - 1 / sympy.sqrt(1 + D)) / (1 - 1 / sympy.sqrt(2)) / 4,
)
SHIPPED = [resolve_noise(name) for name in ("randomized", "smoothstep", "gaussian", "gaussian/0.5")]
LAWS = [*SHIPPED, WIDE, CLIPPED, BENT, ROOTS]
FORMATS = [resolve("int4"), resolve("fp4"), resolve("nf4"), codebook((-1.5, -0.25, 0.0, 0.1, 0.75), name="lopsided")]
laws = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)


# --- the reference: the law's levels and probabilities, one number at a time, in mpmath ------------------------------


@cache
def probabilities(law: NoiseLaw) -> list[Callable[[mpmath.mpf], mpmath.mpf]]:
    return [sympy.lambdify(D, part, "mpmath") for part in (law.up, law.beyond or sympy.Integer(0))]


def points(value: float, levels: tuple[float, ...], law: NoiseLaw) -> list[tuple[float, mpmath.mpf]]:
    """The levels that ``value``, in grid units, may be rounded to, each with its probability."""
    value = min(max(value, levels[0]), levels[-1])
    i, j = bisect_right(levels, value) - 1, bisect_left(levels, value)
    if i == j:
        return [(levels[i], mpmath.mpf(1))]
    at = (mpmath.mpf(value) - levels[i]) / (mpmath.mpf(levels[j]) - levels[i])
    up, beyond = (function(at) for function in probabilities(law))
    outer = levels[max(i - 1, 0)] if at < 0.5 else levels[min(j + 1, len(levels) - 1)]
    return [(levels[i], 1 - up - beyond), (levels[j], up), (outer, beyond)]


def moments(value: float, levels: tuple[float, ...], law: NoiseLaw) -> tuple[mpmath.mpf, mpmath.mpf]:
    chances = points(value, levels, law)
    mean = sum(p * q for q, p in chances)
    return mean, sum(p * (q - mean) ** 2 for q, p in chances)


def unit(values: list[float], fmt: lotion_fx.Format, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A block whose scale is 1: the numbers with q_max in front."""
    q_max = max(fmt.grid.levels, key=abs)
    return torch.tensor([q_max, *values], dtype=dtype)


def one_block(fmt: lotion_fx.Format) -> lotion_fx.Format:
    return lotion_fx.Format("one", fmt.grid, "channel")


def spread(fmt: lotion_fx.Format, count: int = 60, seed: int = 0) -> list[float]:
    """Numbers over the grid, off its levels and off the middles between them."""
    g = torch.Generator().manual_seed(seed)
    levels = torch.tensor(fmt.grid.levels, dtype=torch.float64)
    position = 0.02 + 0.96 * torch.rand(count, generator=g, dtype=torch.float64)
    position += 0.01 * ((position - 0.5).abs() < 0.005)
    at = torch.randint(len(levels) - 1, (count,), generator=g)
    return (levels[at] + position * (levels[at + 1] - levels[at])).tolist()


# --- moments --------------------------------------------------------------------------------------------------------


@laws
@formats
def test_mean_and_variance_are_those_of_the_levels(law, fmt):
    fmt, levels = one_block(fmt), fmt.grid.levels
    w = unit([*spread(fmt), *levels], fmt)
    m, v = rounding.mean(w, fmt, law=law), rounding.variance(w, fmt, law=law)
    expected = [moments(x, levels, law) for x in w.tolist()]
    torch.testing.assert_close(m, torch.tensor([float(a) for a, _ in expected], dtype=torch.float64))
    torch.testing.assert_close(v, torch.tensor([float(b) for _, b in expected], dtype=torch.float64))
    assert torch.equal(m[-len(levels) :], torch.tensor(levels, dtype=torch.float64))
    assert (v[-len(levels) :] == 0).all()


@laws
@formats
@pytest.mark.parametrize("scale_grad", [False, True])
def test_gradients_are_central_differences(law, fmt, scale_grad):
    """Of the exact sums: of s m(w/s) by each weight with the scale held, and with the scale following the absmax."""
    fmt, step = one_block(fmt), mpmath.mpf(10) ** -12
    g = torch.Generator().manual_seed(1)
    w = unit(spread(fmt, 12), fmt) * 0.3
    given = torch.randn(len(w), generator=g, dtype=torch.float64)
    q_max = mpmath.mpf(max(map(abs, fmt.grid.levels)))

    def total(which: int, by: int, step: mpmath.mpf) -> mpmath.mpf:
        """sum_i given_i M_i (which = 0) or V_i with one weight moved."""
        values = [mpmath.mpf(x) for x in w.tolist()]
        before = max(map(abs, values)) / q_max
        values[by] += step
        s = max(map(abs, values)) / q_max if scale_grad else before
        at = [(x / s) for x in values]
        return sum(mpmath.mpf(c) * s ** (which + 1) * moments(x, fmt.grid.levels, law)[which]
                   for c, x in zip(given.tolist(), at, strict=True))  # fmt: skip

    with mpmath.workdps(40):
        for which, function in enumerate((rounding.mean_vjp, rounding.variance_vjp)):
            found = function(w, given, fmt, law=law, scale_grad=scale_grad)
            # The absmax stands at a level, where only with its scale it has a derivative.
            for by in range(0 if scale_grad else 1, len(w)):
                slope = (total(which, by, step) - total(which, by, -step)) / (2 * step)
                assert float(found[by]) == pytest.approx(float(slope), rel=1e-7, abs=1e-9), (function.__name__, by)


def test_randomized_rounding_has_the_closed_forms():
    expected = {
        "draw": (z - lo, 0),
        "mean": (z,),
        "mean_slopes": (1, 0),
        "variance": ((z - lo) * (hi - z),),
        "variance_slopes": (lo + hi - 2 * z, z * (lo + hi) - 2 * lo * hi),
    }
    assert RANDOMIZED.expressions == expected
    assert [law.name for law in LAWS if law.unbiased] == ["randomized"]


@formats
def test_randomized_rounding_draws_as_ever(fmt):
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    u = torch.rand(w.shape, generator=torch.Generator().manual_seed(1))
    s = rounding.scale(w, fmt)
    x = rounding.to_blocks(w, fmt) / s
    low, high = fmt.grid.neighbours(x)
    q = torch.where(rounding.to_blocks(u, fmt) * (high - low) < x - low, high, low) * s
    assert torch.equal(rounding.rr(w, fmt, uniform=u), rounding.from_blocks(q, fmt, -1, w.shape))


@laws
@formats
def test_outcomes_are_the_law_s_levels(law, fmt):
    fmt, levels = one_block(fmt), fmt.grid.levels
    w = unit([*spread(fmt, 20), *levels], fmt)
    values, odds = rounding.outcomes(w, fmt, law=law)
    torch.testing.assert_close(odds.sum(0), torch.ones_like(w))
    for i, value in enumerate(w.tolist()):
        expected = points(value, levels, law)
        for level in {*levels, *values[:, i].tolist()}:
            p = sum(float(p) for q, p in expected if q == level)
            assert odds[values[:, i] == level, i].sum().item() == pytest.approx(p, abs=1e-12)
    assert (odds[0, -len(levels) :] == 1).all()


@pytest.mark.parametrize("law", [RANDOMIZED, SMOOTHSTEP, gaussian(), WIDE], ids=lambda law: law.name)
@formats
def test_samples_have_the_law_s_frequencies(law, fmt):
    fmt, levels, n = one_block(fmt), fmt.grid.levels, 4001
    u = torch.arange(n, dtype=torch.float64) / n
    for value in spread(fmt, 8, seed=3):
        w = unit([value] * n, fmt)
        q = rounding.rr(w, fmt, law=law, uniform=torch.cat([u[:1], u]))[1:]
        for level in levels:
            p = sum(float(p) for q, p in points(value, levels, law) if q == level)
            assert ((q == level).double().mean().item()) == pytest.approx(p, abs=2 / n)


@laws
def test_a_weight_past_the_grid_has_the_last_level_and_no_slope(law):
    fmt = resolve("mxfp4/floor")  # 7.5 has scale 1, past q_max = 6
    w = torch.tensor([7.5, 1.2, 6.5, -3.1] + [0.0] * 28, dtype=torch.float64)
    assert torch.equal(rounding.mean(w, fmt, law=law)[[0, 2]], torch.tensor([6.0, 6.0], dtype=torch.float64))
    assert torch.equal(rounding.rr(w, fmt, law=law)[[0, 2]], torch.tensor([6.0, 6.0], dtype=torch.float64))
    ones = torch.ones_like(w)
    assert rounding.mean_vjp(w, ones, fmt, law=law, scale_grad=False)[[0, 2]].tolist() == [0, 0]
    # A saturated weight follows the scale: d(6 s)/d(absmax) = 6 / q_max.
    alone = torch.zeros_like(w)
    alone[2] = 1
    assert rounding.mean_vjp(w, alone, fmt, law=law)[0].item() == pytest.approx(1)


# --- printing -------------------------------------------------------------------------------------------------------


def random_points(n: int = 10_000, seed: int = 0) -> list[torch.Tensor]:
    """z, lo, hi and the third level, float32, on uneven grids and at a few levels."""
    g = torch.Generator().manual_seed(seed)
    low = torch.randint(-12, 12, (n,), generator=g) / 4
    high = low + torch.randint(1, 9, (n,), generator=g) / 8
    at = low + (high - low) * torch.rand(n, generator=g)
    outer = torch.randint(0, 5, (n,), generator=g) / 4
    outer = torch.where(at - low < high - at, low - outer, high + outer)
    at[::50] = low[::50] = high[::50]
    return [at, low, high, outer]


def symbolic(law: NoiseLaw, name: str, given: list[torch.Tensor]) -> torch.Tensor:
    """The expressions by SymPy's own printing to NumPy, at the float32 points in float64; [outputs, n]."""
    at, low, high, outer = (x.double() for x in given)
    distance = high - low
    safe = torch.where(distance == 0, 1.0, distance)
    position, far = (at - low) / safe, torch.where(distance == 0, 0.0, outer - low) / safe
    function = sympy.lambdify((z, lo, hi, third, gap, D, reach), law.expressions[name], ["scipy", "numpy"])
    values = function(*(x.numpy() for x in (at, low, high, outer, distance, position, far)))
    return torch.stack([torch.as_tensor(value, dtype=torch.float64).expand_as(at) for value in values])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().amax(1, keepdim=True).clamp(min=1)
    assert torch.allclose(found.double() / scale, expected / scale, rtol=1e-6, atol=1e-6)


@laws
def test_printed_pytorch_agrees_with_the_expression(law):
    given = random_points()
    for name in law.expressions:
        for dtype, compare in ((torch.float32, close), (torch.float64, torch.testing.assert_close)):
            outputs = law.torch[name](*(x.to(dtype) for x in given))
            found = torch.stack([torch.as_tensor(out, dtype=dtype).expand(10_000) for out in outputs])
            compare(found, symbolic(law, name, given))


def test_printed_triton_agrees_with_the_expression(tmp_path):
    pytest.importorskip("triton")
    given = random_points(seed=1)
    parts = [(law.name, str(law.up), str(law.beyond) if law.beyond is not None else None) for law in LAWS]
    torch.save((parts, given), tmp_path / "inputs.pt")
    worker = [sys.executable, "-m", "tests.numerics.noise_worker", tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
    subprocess.run(worker, check=True, cwd=Path(__file__).parents[2])
    found = torch.load(tmp_path / "outputs.pt")
    assert len(found) == 5 * len(LAWS)
    for law, name in itertools.product(LAWS, RANDOMIZED.expressions):
        close(found[law.name, name], symbolic(law, name, given))


def test_printed_powers():
    exponents = [sympy.Rational(e) for e in ("-1", "-2", "-1/2", "1/2", "3/2", "-1/3", "5", "17", "-20")]
    at = torch.linspace(0, 1, 11, dtype=torch.float64)
    found = torch_function("powers", [(1 + D) ** e for e in exponents])(at, 0 * at, 0 * at + 1, 0 * at)
    for exponent, value in zip(exponents, found, strict=True):
        torch.testing.assert_close(value, (1 + at) ** float(exponent))


def test_printed_source_takes_common_subexpressions_once():
    text = source("mean_slopes", gaussian().expressions["mean_slopes"], TorchPrinter())
    assert text.count("torch.exp") == 1
    assert "torch.sqrt" not in text  # constants are worked out beforehand


def test_the_core_package_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import lotion_fx.noise, lotion_fx.rounding"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- properties: one weight, one function ---------------------------------------------------------------------------

law_of = st.sampled_from(LAWS)
format_of = st.sampled_from([one_block(fmt) for fmt in FORMATS])
loss_of = st.tuples(*[st.floats(-3, 3)] * 3).map(lambda c: lambda q: c[0] * q**2 + torch.sin(3 * q + c[1]) + c[2] * q)
place = st.floats(0, 1)
relaxed = settings(max_examples=60, deadline=None, derandomize=True)


def smoothed(loss, value: float, fmt: lotion_fx.Format, law: NoiseLaw) -> float:
    """E L(q) for one weight of a block of scale 1."""
    values, odds = rounding.outcomes(unit([value], fmt), fmt, law=law)
    return float((odds * loss(values))[:, 1].sum())


def within(fmt: lotion_fx.Format, share: float) -> float:
    first, last = fmt.grid.levels[0], fmt.grid.levels[-1]
    return min(max(first + share * (last - first), first), last)


@relaxed
@given(law_of, format_of, loss_of, place)
def test_smoothed_is_at_least_the_least_quantized_and_equal_at_levels(law, fmt, loss, share):
    levels = torch.tensor(fmt.grid.levels, dtype=torch.float64)
    assert smoothed(loss, within(fmt, share), fmt, law) >= float(loss(levels).min()) - 1e-9
    for level in levels:
        assert smoothed(loss, float(level), fmt, law) == float(loss(level))


@relaxed
@given(law_of, format_of, loss_of, st.sampled_from([1e-6, -1e-6]))
def test_smoothed_is_continuous_at_levels_and_halfway(law, fmt, loss, step):
    levels = fmt.grid.levels
    for at in (*levels[1:-1], *((a + b) / 2 for a, b in itertools.pairwise(levels))):
        jump = smoothed(loss, at + step, fmt, law) - smoothed(loss, at, fmt, law)
        assert abs(jump) < 1e-3 * (1 + max(abs(float(loss(torch.tensor(float(q))))) for q in levels))


@relaxed
@given(format_of, loss_of, place)
def test_the_slope_is_the_secant_s(fmt, loss, share):
    """Under randomized rounding: with the scale held, d/dw E L = (L(hi) - L(lo)) / (hi - lo)."""
    value = within(fmt, share)
    low, high = fmt.grid.neighbours(torch.tensor(value, dtype=torch.float64))
    if high - low == 0:
        return
    step = min(1e-3, float(high) - value, value - float(low))
    if step < 1e-6:
        return
    slope = (smoothed(loss, value + step, fmt, RANDOMIZED) - smoothed(loss, value - step, fmt, RANDOMIZED)) / (2 * step)
    assert slope == pytest.approx(float((loss(high) - loss(low)) / (high - low)), rel=1e-5, abs=1e-6)


@relaxed
@given(law_of, st.sampled_from(FORMATS), st.integers(0, 2**31))
def test_doubling_the_weight_doubles_the_noise(law, fmt, seed):
    g = torch.Generator().manual_seed(seed)
    w, given_, u = (torch.randn(5, 40, generator=g), torch.randn(5, 40, generator=g), torch.rand(5, 40, generator=g))
    assert torch.equal(rounding.rr(2 * w, fmt, law=law, uniform=u), 2 * rounding.rr(w, fmt, law=law, uniform=u))
    assert torch.equal(rounding.mean(2 * w, fmt, law=law), 2 * rounding.mean(w, fmt, law=law))
    assert torch.equal(rounding.mean_vjp(2 * w, given_, fmt, law=law), rounding.mean_vjp(w, given_, fmt, law=law))
    assert torch.equal(rounding.variance(2 * w, fmt, law=law), 4 * rounding.variance(w, fmt, law=law))
    twice = 2 * rounding.variance_vjp(w, given_, fmt, law=law)
    assert torch.equal(rounding.variance_vjp(2 * w, given_, fmt, law=law), twice)


def test_smoothstep_is_c1_at_levels_and_randomized_rounding_is_not():
    loss = torch.square
    fmt, step = one_block(resolve("int4")), 1e-5
    for law, kink in ((SMOOTHSTEP, 0.0), (RANDOMIZED, 2.0)):
        left = (smoothed(loss, 2.0, fmt, law) - smoothed(loss, 2.0 - step, fmt, law)) / step
        right = (smoothed(loss, 2.0 + step, fmt, law) - smoothed(loss, 2.0, fmt, law)) / step
        assert right - left == pytest.approx(kink, abs=1e-3)


# --- names and refusals ---------------------------------------------------------------------------------------------


def test_names():
    assert {"randomized", "smoothstep", "gaussian"} <= set(noises())
    assert resolve_noise("gaussian/0.2") == resolve_noise("gaussian") == gaussian(0.2)
    assert resolve_noise(gaussian(0.5)) == resolve_noise("gaussian/0.5")
    law = register_noise("test_square", D**2)
    assert register_noise("test_square", D**2) is law is resolve_noise("test_square")
    assert resolve_noise(NoiseLaw("test_given", D**3)) == resolve_noise("test_given")
    assert NoiseLaw("float", 0.1 * D + 0.9 * D**2) == NoiseLaw("float", D / 10 + 9 * D**2 / 10)
    with pytest.raises(ValueError, match="another noise was registered"):
        register_noise("test_square", D**3)
    with pytest.raises(ValueError, match="built-in"):
        register_noise("smoothstep", D)
    with pytest.raises(ValueError, match="without '/' and spaces"):
        register_noise("a/b", D)
    with pytest.raises(ValueError, match="did you mean smoothstep"):
        resolve_noise("smothstep")
    with pytest.raises(ValueError, match="noise='gaussian/x': expected a deviation"):
        resolve_noise("gaussian/x")
    with pytest.raises(ValueError, match="tau=0.0: expected a finite number"):
        gaussian(0.0)
    with pytest.raises(TypeError, match="noise=3: expected"):
        resolve_noise(3)


@pytest.mark.parametrize(
    ("up", "beyond", "reason"),
    [
        (D / 2, None, "is 0.5 at D=1, expected 1; a weight at a level must stay there"),
        ((1 + D) / 2, None, "is 0.5 at D=0, expected 0"),
        (D + 4 * D * (1 - D), None, r"is 1.56\d* at D=0.62\d*, expected a probability"),
        (D - 4 * D * (1 - D), None, r"is -0.56\d* at D=0.37\d*, expected a probability"),
        (D * sympy.Symbol("D"), None, "free symbols D; expected lotion_fx.noise.D only"),
        (D ** sympy.Symbol("k"), None, "free symbols k"),
        (sympy.sin(D) / D * D / sympy.sin(1), None, None),
        (2 * sympy.asin(D) / sympy.pi, None, "asin cannot be printed to torch; expected powers and Abs, Heaviside"),
        (D + D * (D - 1) / (2 * D - 1), None, "is not finite, or not real, at D=0.5"),
        (D + sympy.sqrt(D - HALF) * D * (1 - D), None, "is not finite, or not real, at D=0"),
        (D + sympy.I * D * (1 - D), None, "printed|finite"),
        (sympy.sqrt(D), None, "its slope is not finite at D=0"),
        (1 / D, None, "is undefined at D=0, expected 0"),
        (D**2 * (3 - 2 * D), D * (1 - D), "is 0.25 at D=1/2, expected 0; its level changes sides there"),
        (D, 20 * HUMP, "up [+] beyond=.*expected a probability"),
        (D, -HUMP, "beyond=.*is -0.015625 at D=0.25, expected a probability"),
    ],
)
def test_unsuitable_laws_are_refused_with_the_reason(up, beyond, reason):
    if reason is None:
        NoiseLaw("fine", up, beyond)
        return
    with pytest.raises(ValueError, match=reason):
        NoiseLaw("refused", up, beyond)


def test_a_law_is_an_expression():
    with pytest.raises(TypeError, match="up='D/'"):
        NoiseLaw("text", "D/")


# --- compilers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [SMOOTHSTEP, gaussian(), WIDE], ids=lambda law: law.name)
def test_compiled_is_eager(law):
    torch._dynamo.reset()
    w = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    for function in (rounding.mean, rounding.variance):
        compiled = torch.compile(lambda x, f=function: f(x, resolve("nf4"), law=law), backend="eager", fullgraph=True)
        assert torch.equal(compiled(w), function(w, resolve("nf4"), law=law))


@laws
@formats
def test_traced_on_fakes_is_eager(law, fmt):
    w = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    for function in (rounding.mean, rounding.variance, lambda x, *a, **k: rounding.mean_vjp(x, x, *a, **k)):
        traced = make_fx(partial(function, fmt=fmt, law=law), tracing_mode="fake")(w)
        assert torch.equal(traced(w), function(w, fmt=fmt, law=law))


# --- training -------------------------------------------------------------------------------------------------------


def objective_gradient(weight: torch.Tensor, loss, h: torch.Tensor, fmt: lotion_fx.Format, law: NoiseLaw):
    """d/dw [L(mean) + 1/2 sum h sigma^2] by autograd in float64 through the symbolic law; two-level laws."""
    w = weight.detach().double().requires_grad_()
    s = w.abs().amax(-1, keepdim=True) / fmt.grid.max
    x = w / s
    low, high = (level.detach() for level in fmt.grid.neighbours(x.detach()))
    position = (x - low) / torch.where(high == low, 1.0, high - low)
    p = position**2 * (3 - 2 * position) if law is SMOOTHSTEP else None
    assert p is not None
    mean = s * (low + (high - low) * p)
    sigma2 = s**2 * (high - low) ** 2 * p * (1 - p)
    return torch.autograd.grad(loss(mean) + 0.5 * (h * sigma2).sum(), w)[0]


def test_a_step_trains_the_objective_around_the_mean():
    torch.manual_seed(0)
    model, fmt = nn.Sequential(nn.Linear(12, 5, bias=False)).double(), resolve("int4/channel")
    x, y = torch.randn(20, 12, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    weight = model[0].weight
    lotion_fx.transform(model, "int4/channel", noise="smoothstep", curvature="full", inner="aot_eager")
    loss = (model(x) - y).square().sum() / 20
    loss.backward()
    mean = rounding.mean(weight.detach(), fmt, law=SMOOTHSTEP)
    error = x @ mean.T - y
    assert loss.item() == pytest.approx((error.square().sum() / 20).item())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = weight.detach().clone()
    optimizer.step()
    g = 2 * error / 20
    h = 20 * g.square().T @ x.square()  # T = 20 rows
    expected = objective_gradient(before, lambda m: (x @ m.T - y).square().sum() / 20, h, fmt, SMOOTHSTEP)
    assert (before - weight.detach() - expected).norm() < 1e-5 * expected.norm()
    assert smoothings_of(model)[0].noise is SMOOTHSTEP
    term, after = lotion_fx.penalty(model), weight.detach()
    expected = 0.5 * (h * rounding.variance(after, fmt, law=SMOOTHSTEP)).sum()
    torch.testing.assert_close(term.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(term_of(registry[weight]), expected, rtol=1e-5, atol=0)
    (slope,) = torch.autograd.grad(term, weight)
    torch.testing.assert_close(slope, 0.5 * rounding.variance_vjp(after, h, fmt, law=SMOOTHSTEP), rtol=1e-4, atol=1e-9)


def test_a_registered_noise_is_in_the_key_of_compile_caches():
    def key():
        return Backend()._inductor_options()["unsafe_marked_cacheable_functions"]

    before = key()
    register_noise("test_key", D**2)
    assert key() != before


def test_an_unbiased_noise_adds_no_node():
    for noise, mode in (("randomized", "latent"), ("gaussian", "mean")):
        model = lotion_fx.transform(MLP(), "int4", noise=noise, inner="eager")
        assert [smoothing.tally.forward_mode for smoothing in smoothings_of(model)] == [mode]


def never() -> NoiseLaw:
    """A law that rounds down up to D = 0.9."""
    return register_noise("test_never", sympy.Piecewise((0, D < 0.9), (10 * D - 9, True)))


def rounds_down(rounded: torch.Tensor, weight: torch.Tensor, fmt: lotion_fx.Format) -> bool:
    scale = rounding.scale(weight, fmt)[..., 0]
    x, low = weight / scale, (weight / scale).remainder(1) < 0.89
    return torch.allclose((rounded / scale)[low], x.floor()[low], atol=1e-4, rtol=0)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_randomized_and_rr_sample_from_the_law(inner):
    model, fmt = nn.Sequential(nn.Linear(64, 64, bias=False)), resolve("int4/channel")
    lotion_fx.transform(model, "int4/channel", method="rr", noise=never(), inner=inner)
    weight = model[0].weight.detach()
    assert rounds_down(model(torch.eye(64)).T.detach(), weight, fmt)
    with lotion_fx.randomized(model), torch.no_grad():
        assert rounds_down(model(torch.eye(64)).T, weight, fmt)


def test_eval_is_at_the_nearest_whatever_the_noise():
    model = lotion_fx.transform(nn.Sequential(nn.Linear(32, 8, bias=False)), "int4", noise="smoothstep", inner="eager")
    weight = model[0].weight.detach()
    torch.testing.assert_close(model.eval()(torch.eye(32)).T, rounding.rtn(weight, resolve("int4")))


def test_the_state_of_another_noise_is_refused():
    make = lambda noise: lotion_fx.transform(MLP(), "int4", noise=noise, inner="eager")  # noqa: E731
    state = lotion_fx.state_dict(make("smoothstep"))
    lotion_fx.load_state_dict(make("smoothstep"), state)
    with pytest.raises(ValueError, match=r"noise=\['smoothstep'\], this model has \['randomized'\]"):
        lotion_fx.load_state_dict(make("randomized"), state)


def test_unknown_noise_is_refused_before_anything_changes():
    model = MLP()
    with pytest.raises(ValueError, match="noise='gausian': unknown noise; did you mean gaussian"):
        lotion_fx.transform(model, noise="gausian")
    lotion_fx.transform(model, noise="gaussian", inner="eager")


def test_torch_compile_s_backend_takes_a_noise():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(32, 8, bias=False))
    options = {"fmt": "int4", "noise": "smoothstep", "inner": "aot_eager"}
    out = torch.compile(model, backend="lotion_fx", options=options)(torch.eye(32))
    mean = rounding.mean(model[0].weight.detach(), resolve("int4"), law=SMOOTHSTEP)
    torch.testing.assert_close(out.detach().T, mean)


class Recurrent(nn.Module):
    """Dynamo skips its recurrent part."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.RNN(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def test_a_weight_outside_of_every_graph_cannot_run_at_the_mean():
    model = lotion_fx.transform(Recurrent(), "int4", noise="smoothstep", inner="eager")
    with pytest.raises(ValueError, match="noise='smoothstep' needs a rounded training forward.*noise='randomized'"):
        model(torch.randn(3, 2, 8))


def test_a_weight_outside_of_every_graph_is_sampled_from_the_law():
    model = lotion_fx.transform(Recurrent(), "int4/channel", noise=never(), inner="eager")
    weight, seen = model.rnn.weight_ih_l0.detach().clone(), []
    model.rnn.register_forward_pre_hook(lambda module, _: seen.append(module.weight_ih_l0.detach().clone()))
    with lotion_fx.randomized(model), torch.no_grad():
        model(torch.randn(3, 2, 8))
    assert not torch.equal(seen[0], weight) and rounds_down(seen[0], weight, resolve("int4/channel"))
