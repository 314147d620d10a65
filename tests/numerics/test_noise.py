"""Noise laws against exact enumeration of their levels, central differences and the symbolic expressions."""

from __future__ import annotations

import itertools
from functools import partial

import mpmath
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import lotion_fx
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import resolve
from lotion_fx.numerics.noise import (
    ADAPTIVE,
    RANDOMIZED,
    SMOOTHSTEP,
    D,
    NoiseLaw,
    gaussian,
    noises,
    register_noise,
    resolve_noise,
)
from lotion_fx.numerics.printer import hi, lo, z
from tests.numerics.laws import (
    FORMATS,
    HALF,
    HUMP,
    LAWS,
    WIDE,
    formats,
    laws,
    moments,
    one_block,
    points,
    spread,
    unit,
)


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


@formats
def test_adaptive_is_randomized_rounding_averaged_over_the_place(fmt):
    """In each interval; its slope by the weight is 0, by the scale that of autograd."""
    levels = torch.tensor(fmt.grid.levels, dtype=torch.float64)
    places = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    for low, high in itertools.pairwise(levels.tolist()):
        w = unit([low + (high - low) * p for p in places.tolist()], fmt)
        averaged = rounding.variance(w, one_block(fmt), law=RANDOMIZED)[1:].mean()
        found = rounding.variance(w, one_block(fmt), law=ADAPTIVE)[1:]
        assert torch.allclose(found, averaged.expand_as(found), rtol=1e-6, atol=0)
        assert torch.equal(rounding.mean(w, one_block(fmt), law=ADAPTIVE), w)


def test_the_slope_of_adaptive_is_the_scale_s():
    g = torch.Generator().manual_seed(0)
    w, h = torch.randn(6, 32, generator=g, dtype=torch.float64), torch.rand(6, 32, generator=g, dtype=torch.float64)
    fmt = resolve("int4")
    found = rounding.variance_vjp(w, h, fmt, law=ADAPTIVE)
    largest = w.abs() == w.abs().amax(1, keepdim=True)
    inside = torch.where(largest, 0.0, h)  # the largest weight is a level itself
    s = w.abs().amax(1, keepdim=True) / 7
    expected = torch.where(largest, w.sign() * 2 * s / 6 / 7 * inside.sum(1, keepdim=True), 0.0)
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)
    held = rounding.variance_vjp(w, h, fmt, law=ADAPTIVE, scale_grad=False)
    assert held.eq(0).all() and held.shape == w.shape


@pytest.mark.parametrize("spread", [-1, D, "x"])
def test_a_spread_is_a_number(spread):
    with pytest.raises((ValueError, TypeError), match="spread="):
        NoiseLaw("test_spread", D, spread=spread)
    with pytest.raises(ValueError, match="up=D and no third level"):
        NoiseLaw("test_spread", D**2 * (3 - 2 * D), spread=sympy.Rational(1, 6))


def test_names():
    assert resolve_noise("adaptive") is ADAPTIVE and not ADAPTIVE.rounds and RANDOMIZED.rounds
    with pytest.raises(ValueError, match="a built-in noise has this name"):
        resolve_noise(NoiseLaw("adaptive", D))
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
