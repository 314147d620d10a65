"""Grids against ml_dtypes, plain searches through the levels, and the quantiles of QLoRA."""

from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest
import torch

from lotion_fx.numerics.formats import formats, resolve
from lotion_fx.numerics.grids import Codebook, Integer

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
