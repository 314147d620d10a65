"""Scale laws against ml_dtypes and exact rational arithmetic."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from lotion_fx.deploy.weights import QuantizedWeight
from lotion_fx.kernels.pack import pack
from lotion_fx.kernels.packed import unpack
from lotion_fx.numerics.formats import formats, resolve
from lotion_fx.numerics.grids import Minifloat
from lotion_fx.numerics.rounding import rtn
from lotion_fx.numerics.scales import HalfScale, PowerOfTwo, PowerOfTwoScale
from tests.numerics.reference import rounded_up


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


@pytest.mark.parametrize("name", HalfScale.names)
def test_16_bit_scales_are_the_next_number_up_of_ml_dtypes(name):
    fmt = resolve(f"int4/{name}")
    type, least = (ml_dtypes.bfloat16, 2.0**-119) if name == "bf16" else (np.float16, 2.0**-24)
    bits = np.arange(1, 2**15, 5).astype(np.uint16).view(type).astype(np.float32)  # every scale, and a little past it
    bits = bits[np.isfinite(bits) & (bits <= 4e37)]
    amax = 7 * np.concatenate([bits, np.nextafter(bits, np.float32(0)), np.nextafter(bits, np.float32(np.inf)), [0.0]])
    amax = amax.astype(np.float32)
    want = [rounded_up(max(float(x), least), type) for x in amax / np.float32(7)]
    got = fmt.law.block_scale(torch.from_numpy(amax), fmt.grid)
    np.testing.assert_array_equal(got.numpy(), want)
    assert torch.equal(got.to(fmt.law.stored).float(), got)
    past = fmt.law.block_scale(torch.tensor([65504.0 * 8, torch.inf, torch.nan]), fmt.grid)
    assert past[0] == (65504 if name == "fp16" else rounded_up(65504 * 8 / 7, type)) and past[1:].isnan().all()


def test_a_power_of_two_tensor_scale_is_the_next_one_up_and_no_block_scale_passes_448():
    fmt = resolve("nvfp4/pow2")
    exact = 2688 * 2.0 ** np.array([-130.0, -117, -116, -20, 0, 3, 100])
    amax = np.concatenate([exact, exact * (1 + 2.0**-23), exact * (1 - 2.0**-24), [0.0]]).astype(np.float32)
    for x in amax:
        ts = fmt.law.tensor_scale(torch.tensor(x), fmt.grid).item()
        want = next(2.0**e for e in range(-117, 128) if 2.0**e * 2688 >= x)
        assert ts == want and float(x) / 6 / ts <= 448
    assert fmt.law.tensor_scale(torch.tensor([torch.inf, torch.nan]), fmt.grid).isnan().all()


@pytest.mark.parametrize("kind", ["wide", "tiny", "large", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_of_a_power_of_two_tensor_scale_is_bf16_and_any_arithmetic_gives_it(dtype, kind):
    fmt = resolve("nvfp4/pow2")
    g = torch.Generator().manual_seed(0)
    w = torch.randn(500, 210, generator=g) * torch.exp(2 * torch.randn(500, 1, generator=g))
    size = {"wide": 0.02, "tiny": 2.0**-110, "large": 500.0, "zero": 0.0}[kind]
    w = (w * size).clamp(-6e4, 6e4).to(dtype)
    w[:, :5] = torch.tensor([0.0, -0.0, 2.0**-149, 1.0, -1.0]) * (kind != "tiny")
    w[7] = 0
    packed = pack(w, fmt)
    ours = unpack(packed, fmt, 210)
    assert torch.equal(rtn(w.float(), fmt), ours) and torch.equal(ours.bfloat16().float(), ours)
    levels = fmt.grid.decode(torch.stack([packed.codes & 15, packed.codes >> 4], -1).flatten(-2))
    block = fmt.law.type.decode(packed.scales).repeat_interleave(16, -1)[:, :210]
    ts, inverse = packed.tensor_scale, 1 / packed.tensor_scale
    assert torch.equal(levels * (block / inverse.bfloat16().float()), ours)
    assert torch.equal(levels * (block * ts.bfloat16().float()), ours)
    assert torch.equal((levels * block) * ts, ours) and torch.equal(levels * (block * (1 / inverse)), ours)


@pytest.mark.parametrize("name", ["int4/bf16", "int4/fp16", "int8/fp16", "int4/tensor/bf16", "int8/1/fp16", "nf4/bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_16_bit_scales_store_gives_the_rounded_weight(name, dtype):
    g = torch.Generator().manual_seed(1)
    w = torch.randn(500, 210, generator=g) * torch.exp(4 * torch.randn(500, 1, generator=g))
    w[1], w[2], w[3, ::2] = 0, -0.0, 2.0**-140
    w[4] = ((w[4] * 4).round() / 8).clamp(-7, 7)
    w[5] *= 1e6 if dtype != torch.float16 else 1.0  # past the largest float16 scale
    w = w.clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else w.to(dtype)
    fmt = resolve(name)
    held = QuantizedWeight.of(w, fmt, -1)
    assert held.scales.dtype == fmt.law.stored and held.scales.isfinite().all() and (held.scales > 0).all()
    assert torch.equal(held.dequantize(), rtn(w, fmt)) and held.dequantize().isfinite().all()
