"""Formats against ml_dtypes, exact rational arithmetic and plain searches through the levels."""

import math
import pickle
from fractions import Fraction
from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest
import torch

from lotion_fx.numerics.formats import Format, codebook, formats, register_format, resolve
from lotion_fx.numerics.grids import Codebook, Integer, Minifloat
from lotion_fx.numerics.rounding import rtn
from lotion_fx.numerics.scales import Float32Scale, PowerOfTwo, PowerOfTwoScale, TwoLevelScale

MINIFLOATS = {
    "mxfp4": ml_dtypes.float4_e2m1fn,
    "mxfp6_e2m3": ml_dtypes.float6_e2m3fn,
    "mxfp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp8": ml_dtypes.float8_e4m3fn,
    "mxfp8_e5m2": ml_dtypes.float8_e5m2,
}
minifloats = pytest.mark.parametrize("name", MINIFLOATS)
LOPSIDED = Codebook((-1.5, -0.25, 0.0, 0.1, 0.75))
GRIDS = {name: resolve(name).grid for name in formats()} | {"lopsided": LOPSIDED, "int100": Integer(100)}
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


def all_codes(dtype: type) -> np.ndarray:
    return np.arange(2 ** ml_dtypes.finfo(dtype).bits, dtype=np.uint8)


def probes(levels: tuple[float, ...]) -> np.ndarray:
    """float32 points inside the grid where a rounding can go wrong: every bfloat16, every level and midpoint and the
    floats on both sides of each, and random bit patterns."""
    lev = np.array(levels, np.float32)
    mid = ((lev[1:].astype(np.float64) + lev[:-1]) / 2).astype(np.float32)
    edges = np.concatenate([lev, mid])
    edges = np.concatenate([edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(-np.inf))])
    every_bfloat16 = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    random_bits = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    uniform = np.random.default_rng(1).uniform(lev[0], lev[-1], 20000).astype(np.float32)
    z = np.concatenate([edges, every_bfloat16, random_bits, uniform])
    return z[(z >= lev[0]) & (z <= lev[-1])]  # also drops NaN


# --- elements ---------------------------------------------------------------------------------------------------


@minifloats
def test_every_code_decodes_as_in_ml_dtypes(name):
    codes = all_codes(MINIFLOATS[name])
    want = codes.view(MINIFLOATS[name]).astype(np.float32)
    got = resolve(name).grid.decode(torch.from_numpy(codes)).numpy()
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[finite].view(np.int32), want[finite].view(np.int32))  # signed zeros too
    assert np.isnan(got[~finite]).all()


@minifloats
def test_encode_inverts_decode(name):
    codes = all_codes(MINIFLOATS[name])
    value = codes.view(MINIFLOATS[name]).astype(np.float32)
    want = np.where(value == 0, 0, codes)[np.isfinite(value)]  # both zeros have the code of +0
    got = resolve(name).grid.encode(torch.from_numpy(value[np.isfinite(value)]))
    assert got.dtype == torch.uint8
    np.testing.assert_array_equal(got.numpy(), want)


@minifloats
def test_levels_are_the_finite_values(name):
    value = all_codes(MINIFLOATS[name]).view(MINIFLOATS[name]).astype(np.float64)
    grid = resolve(name).grid
    np.testing.assert_array_equal(grid.levels, np.unique(value[np.isfinite(value)]))
    assert grid.max == float(ml_dtypes.finfo(MINIFLOATS[name]).max)
    assert grid.bits == ml_dtypes.finfo(MINIFLOATS[name]).bits


@minifloats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_and_its_code_are_ml_dtypes(name, dtype):
    grid = resolve(name).grid
    z = probes(grid.levels)
    want = z.astype(MINIFLOATS[name])
    got = grid.nearest(torch.from_numpy(z).to(dtype))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.numpy(), want.astype(np.float32))
    code = want.view(np.uint8)
    code = np.where(want.astype(np.float32) == 0, 0, code)
    np.testing.assert_array_equal(grid.encode(got).numpy(), code)


def test_nearest_e4m3_and_e5m2_are_the_casts_of_torch():
    for name, dtype in (("fp8", torch.float8_e4m3fn), ("mxfp8_e5m2", torch.float8_e5m2)):
        z = torch.from_numpy(probes(resolve(name).grid.levels))
        assert torch.equal(resolve(name).grid.nearest(z), z.to(dtype).float())


# --- every grid -------------------------------------------------------------------------------------------------


@grids
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbours_are_found_by_search(grid, dtype):
    z = probes(grid.levels).astype(np.float64)
    lev = np.array(grid.levels)
    lo, hi = grid.neighbours(torch.from_numpy(z).to(dtype))
    np.testing.assert_array_equal(lo.numpy(), lev[np.searchsorted(lev, z, side="right") - 1])
    np.testing.assert_array_equal(hi.numpy(), lev[np.searchsorted(lev, z, side="left")])


@grids
def test_past_the_grid_everything_is_the_last_level(grid):
    last = torch.tensor([grid.levels[-1], grid.levels[0]])
    for beyond in (last * (1 + 2**-23), last * 1.01, last * 1e6, last * torch.inf):
        lo, hi = grid.neighbours(beyond)
        for got in (lo, hi, grid.nearest(beyond), grid.clamp(beyond)):
            assert torch.equal(got, last), beyond


@grids
def test_nearest_is_the_closest_level_and_ties_take_the_even_code(grid):
    lev = np.array(grid.levels)
    code = grid.encode(torch.tensor(lev, dtype=torch.float32)).numpy()
    z = probes(grid.levels).astype(np.float64)
    below = np.clip(np.searchsorted(lev, z, side="right") - 1, 0, len(lev) - 2)
    # Exact in float64, except for the sum of neighbours far apart in magnitude, which no grid here has.
    mid = (lev[below] + lev[below + 1]) / 2
    if isinstance(grid, Codebook):
        mid = mid.astype(np.float32).astype(np.float64)  # a codebook's boundary is by definition a float32
    up = (z > mid) | ((z == mid) & (code[below + 1] % 2 == 0))
    got = grid.nearest(torch.from_numpy(z).float()).numpy()
    np.testing.assert_array_equal(got, np.where(up, lev[below + 1], lev[below]).astype(np.float32))


@grids
def test_codes_round_trip_and_minus_zero_is_zero(grid):
    levels = torch.tensor(grid.levels)
    codes = grid.encode(levels)
    assert codes.dtype == torch.uint8 and codes.unique().numel() == len(grid.levels)
    assert int(codes.max()) < 2**grid.bits
    assert torch.equal(grid.decode(codes), levels)
    assert torch.equal(grid.encode(torch.tensor([-0.0])), grid.encode(torch.tensor([0.0])))
    for z in (-0.0, -1e-30):
        assert not torch.signbit(grid.nearest(torch.tensor([z]))).any()


def test_integer_codes_are_offset_binary():
    assert Integer(7).encode(torch.tensor([-7.0, 0.0, 7.0])).tolist() == [1, 8, 15]
    assert Integer(127).encode(torch.tensor([-127.0, 0.0, 127.0])).tolist() == [1, 128, 255]
    assert Integer(1).bits == 2 and Integer(127).bits == 8


def test_nf4_is_the_normal_quantiles_of_qlora():
    offset = 0.9677083  # 1 - (1/30 + 1/32) / 2, as rounded in the reference implementation

    def side(count: int) -> list[float]:
        return [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, count)[:-1]]

    levels = np.sort([*side(9), 0.0, *(-x for x in side(8))])
    np.testing.assert_allclose(resolve("nf4").grid.levels, levels / levels.max(), atol=5e-7)


# --- scale laws -------------------------------------------------------------------------------------------------


def test_every_e8m0_code_decodes_as_in_ml_dtypes():
    codes = all_codes(ml_dtypes.float8_e8m0fnu)
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


# --- names ------------------------------------------------------------------------------------------------------

TABLE = {
    "int2": (3, 32, 2 + 1), "int3": (7, 32, 3 + 1), "int4": (15, 32, 4 + 1), "int5": (31, 32, 5 + 1),
    "int6": (63, 32, 6 + 1), "int7": (127, 32, 7 + 1), "int8": (255, "channel", 8), "fp4": (15, 32, 4 + 1),
    "fp8": (253, "channel", 8), "nf4": (16, 32, 4 + 1), "nvfp4": (15, 16, 4.5), "mxfp4": (15, 32, 4.25),
    "mxfp6": (63, 32, 6.25), "mxfp6_e2m3": (63, 32, 6.25), "mxfp6_e3m2": (63, 32, 6.25), "mxfp8": (253, 32, 8.25),
    "mxfp8_e4m3": (253, 32, 8.25), "mxfp8_e5m2": (247, 32, 8.25),
}  # fmt: skip


def test_the_built_in_formats():
    assert set(TABLE) <= set(formats())
    for name, (levels, block, bits) in TABLE.items():
        fmt = resolve(name)
        assert (len(fmt.grid.levels), fmt.block, fmt.bits_per_weight) == (levels, block, bits), name
    assert resolve("fp4").grid.levels[7:] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert resolve("int4").grid.levels == tuple(range(-7, 8))


def test_options_override_the_block_or_the_rule():
    assert resolve("int4/tensor").block == "tensor" and resolve("int4/tensor").name == "int4/tensor"
    assert resolve("fp8/128").block == 128 and resolve("int8/tensor").bits_per_weight == 8
    assert resolve("mxfp4/floor").law == PowerOfTwoScale("floor")
    assert resolve("mxfp4/floor").block == 32
    assert len({resolve("int4"), resolve("int4/32"), resolve("mxfp4"), resolve("mxfp4/ceil")}) == 2
    assert resolve("mxfp8") is resolve("mxfp8_e4m3") and resolve("mxfp6") is resolve("mxfp6_e2m3")
    fmt = resolve("nf4/64")
    assert resolve(fmt) is fmt and pickle.loads(pickle.dumps(fmt)) == fmt


@pytest.mark.parametrize(
    ("fmt", "says"),
    [
        ("nvpf4", "did you mean.*nvfp4"),
        ("INT4", "did you mean.*int4"),
        ("int9", "unknown format"),
        ("zzz", "Known: fp4, fp8"),
        ("nvfp4/32", "blocks of 16"),
        ("nvfp4/floor", "takes no option"),
        ("mxfp4/64", "blocks of 32.*/ceil, /floor, /even"),
        ("mxfp4/tensor", "scale rule"),
        ("int4/", "/128"),
        ("int4/0", "/128"),
        ("int4/-8", "/128"),
        ("int4/²", "/128"),
        ("int4/floor", "/128"),
        ("int4/32/tensor", "/128"),
    ],
)
def test_a_bad_name_says_what_was_expected(fmt, says):
    with pytest.raises(ValueError, match=f"(?s)fmt='{fmt}'.*{says}"):
        resolve(fmt)


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="fmt=4"):
        resolve(4)
    with pytest.raises(TypeError, match="format='int4'"):
        register_format("mine", "int4")


def test_register_format():
    fmt = register_format("test_ternary", codebook((-1, 0, 1), block=8))
    assert resolve("test_ternary") is fmt and fmt.name == "test_ternary" and "test_ternary" in formats()
    assert resolve("test_ternary/tensor").block == "tensor"
    assert register_format("test_ternary", codebook((-1, 0, 1), block=8)) is fmt
    with pytest.raises(ValueError, match="'test_ternary': another format"):
        register_format("test_ternary", codebook((-2, 0, 2)))
    for name in ("int4", "mxfp8", "a/b", "", "a b", None):
        with pytest.raises(ValueError, match="name="):
            register_format(name, fmt)


@pytest.mark.parametrize(
    ("levels", "says"),
    [
        ((0.0,), "2 to 256"),
        (range(257), "2 to 256"),
        ((-1.0, 0.0, float("nan")), "finite"),
        ((0.0, float("inf")), "finite"),
        ((0.0, 1e39), "finite"),
        ((0.0, 1.0, 0.5), "ascending"),
        ((0.0, 1.0, 1.0), "twice"),
        ((0.0, 1.0, 1.0 + 1e-12), "twice"),
        ((-1.0, 1.0), "0 among"),
    ],
)
def test_a_bad_codebook_says_what_was_expected(levels, says):
    with pytest.raises(ValueError, match=says):
        codebook(levels)


def test_a_format_checks_its_parts():
    for block in (0, -1, True, 1.5, "row", None):
        with pytest.raises(ValueError, match="block="):
            Format("x", Integer(7), block)
    with pytest.raises(ValueError, match="qmax=128"):
        Integer(128)
    with pytest.raises(ValueError, match="rule='up'"):
        PowerOfTwoScale("up")
    with pytest.raises(ValueError, match="mantissa"):
        Format("x", Integer(7), 32, PowerOfTwoScale("even"))
    assert Format("x", Integer(7), 32).law == Float32Scale()
    assert isinstance(resolve("nvfp4").law, TwoLevelScale)
