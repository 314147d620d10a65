"""Scale laws against ml_dtypes and exact rational arithmetic."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from lotion_fx.numerics.formats import formats, resolve
from lotion_fx.numerics.grids import Minifloat
from lotion_fx.numerics.rounding import rtn
from lotion_fx.numerics.scales import PowerOfTwo, PowerOfTwoScale


def test_every_e8m0_code_decodes_as_in_ml_dtypes():
    codes = np.arange(2**8, dtype=np.uint8)
    want = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    got = PowerOfTwo().decode(torch.from_numpy(codes))
    np.testing.assert_array_equal(got.numpy().astype(np.float64), want)
    normal = torch.from_numpy(codes[1:255])
    assert torch.equal(PowerOfTwo().encode(got[1:255]), normal)
    assert torch.equal(PowerOfTwo().encode(got[1:255].double()), normal)


def exact_power(rule: str, amax: float, grid: Minifloat) -> Fraction:
    """The scale of an MX block from the rule's own words, in rational arithmetic."""
    amax_, q_max = Fraction(amax), Fraction(grid.max)
    if rule == "ceil":
        e = -200
        while q_max * Fraction(2) ** e < amax_:
            e += 1
    else:
        mantissa, exponent = math.frexp(amax)  # amax = mantissa 2^exponent, mantissa in [1/2, 1)
        if rule == "even":
            unit = 2 ** (grid.mantissa_bits + 1)
            exponent += round(Fraction(mantissa) * unit) == unit  # Python rounds half to even
        e = (exponent - 1) - (math.frexp(grid.max)[1] - 1)
    return Fraction(2) ** max(e, -126)


@pytest.mark.parametrize("rule", ["ceil", "floor", "even"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2"])
def test_power_of_two_scales_follow_the_rule_exactly(name, rule):
    fmt = resolve(f"{name}/{rule}")
    mantissas = np.array(
        [1.0, 1.5, 1.75, 1.875, 1.9375, 1.96875, fmt.grid.max / 2 ** math.floor(math.log2(fmt.grid.max))]
    )
    powers = 2.0 ** np.array([-149, -130, -126, -125, -124, -118, -111, -110, -3, 0, 1, 60, 126])
    amax = (mantissas[:, None] * powers).astype(np.float32).ravel()
    amax = np.concatenate([amax, np.nextafter(amax, np.float32(0)), np.nextafter(amax, np.float32(np.inf))])
    amax = amax[amax > 0]
    want = [float(exact_power(rule, float(x), fmt.grid)) for x in amax]
    for dtype in (torch.float32, torch.float64):
        got = fmt.law.block_scale(torch.from_numpy(amax).to(dtype), fmt.grid)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got.numpy(), want)


def test_ceil_never_saturates_and_floor_and_even_can():
    amax = torch.rand(4096, generator=torch.Generator().manual_seed(0)) + 0.5
    past = {}
    for rule in PowerOfTwoScale.rules:
        fmt = resolve(f"mxfp4/{rule}")
        past[rule] = int((amax / fmt.law.block_scale(amax, fmt.grid) > fmt.grid.max).sum())
    assert past["ceil"] == 0 < past["even"] < past["floor"]


def test_two_level_scale_is_e4m3_of_ml_dtypes_times_float32():
    fmt = resolve("nvfp4")
    amax = np.random.default_rng(0).lognormal(sigma=4, size=5000).astype(np.float32)
    ts = np.float32(amax.max()) / np.float32(6 * 448)
    want = np.clip(amax / np.float32(6) / ts, 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    got_ts = fmt.law.tensor_scale(torch.from_numpy(amax).max(), fmt.grid)
    assert got_ts.numpy() == ts
    got = fmt.law.block_scale(torch.from_numpy(amax), fmt.grid, got_ts).numpy()
    np.testing.assert_array_equal(got, want)
    assert got.max() == 448 and got.min() == 2.0**-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*formats(), "mxfp4/floor", "mxfp4/even"])
def test_no_scale_is_zero_or_subnormal(name, dtype):
    fmt = resolve(name)
    amax = torch.tensor([0.0, 2.0**-149, 2.0**-130, 2.0**-126], dtype=dtype)
    ts = fmt.law.tensor_scale(amax.max(), fmt.grid)
    s = fmt.law.block_scale(amax, fmt.grid, ts) * (1.0 if ts is None else ts)
    assert (s >= 2.0**-126).all() and s[0] == 2.0**-126
    assert (amax / s <= fmt.grid.max).all()


@pytest.mark.parametrize("name", [*formats(), "mxfp4/floor", "mxfp4/even"])
def test_smallest_amax_is_where_the_scale_stops_falling(name):
    fmt = resolve(name)
    ts = fmt.law.tensor_scale(torch.tensor(1.0, dtype=torch.float64), fmt.grid)
    smallest = torch.as_tensor(fmt.law.smallest_amax(fmt.grid, ts), dtype=torch.float64)
    at, below, above = (fmt.law.block_scale(smallest * x, fmt.grid, ts) for x in (1.0, 1e-3, 8.0))
    assert at == below and above == 8 * at


@pytest.mark.parametrize("name", [*formats(), "mxfp4/floor", "mxfp4/even"])
def test_no_scale_hides_what_is_not_finite(name):
    """A weight that is not finite comes out not finite; an E8M0 scale is NaN then, which it stores as 255."""
    fmt = resolve(name)
    for bad in (torch.nan, torch.inf, -torch.inf):
        w = torch.ones(2, 64)
        w[1, 40] = bad
        assert not rtn(w, fmt)[1, 40].isfinite()
    if name.startswith("mx"):
        amax = torch.tensor([torch.nan, torch.inf, 1.0])
        scale = fmt.law.block_scale(amax, fmt.grid)
        assert scale.isnan().tolist() == [True, True, False]
        assert fmt.law.type.encode(scale)[:2].tolist() == [255, 255]
