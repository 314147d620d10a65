"""Rounding against a reference that walks through the blocks one by one, and enumeration."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lotion_fx.numerics.formats import resolve
from lotion_fx.numerics.rounding import (
    from_blocks,
    rr,
    rtn,
    rtn_vjp,
    scale,
    scale_parts,
    to_blocks,
    variance,
    variance_vjp,
)
from lotion_fx.numerics.scales import HalfScale, PowerOfTwoScale
from tests.numerics.reference import (
    EVERY,
    FUNCTIONS,
    UNBIASED,
    block_indices,
    draw,
    every,
    reference,
    saturating,
    shapes,
    unbiased,
)


@every
@shapes
def test_rtn_scale_and_variance_are_the_reference(fmt, shape, axis):
    w = draw(shape)
    s, lo, hi, near = reference(w, fmt, axis)
    assert torch.equal(rtn(w, fmt, axis), s * near)
    got_s = from_blocks(scale(w, fmt, axis).expand_as(to_blocks(w, fmt, axis)), fmt, axis, w.shape)
    assert torch.equal(got_s, s)
    inside = (w >= s * fmt.grid.levels[0]) & (w <= s * fmt.grid.levels[-1])
    want = torch.where(inside, (w - s * lo) * (s * hi - w), 0.0).clamp(min=0)
    torch.testing.assert_close(variance(w, fmt, axis), want, rtol=1e-9, atol=1e-14 * float(w.abs().max()) ** 2)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_computes_in_float32(fmt, dtype):
    w = draw((5, 37), dtype=dtype)
    s, _, _, near = reference(w.double(), fmt, -1)
    got = rtn(w, fmt)
    assert got.dtype == dtype and variance(w, fmt).dtype == scale(w, fmt).dtype == torch.float32
    # One rounding of s, one of the product and one to dtype; the levels are the same but for ties moved by s.
    same = torch.isclose(got.double(), s * near, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert same.float().mean() > 0.98
    assert torch.equal(got, rtn(w.float(), fmt).to(dtype))


@every
@shapes
def test_blocks_there_and_back(fmt, shape, axis):
    w = draw(shape)
    blocks = to_blocks(w, fmt, axis)
    assert torch.equal(from_blocks(blocks, fmt, axis, w.shape), w)
    count = sum(1 for _ in block_indices(shape, fmt, axis))
    assert blocks.numel() // blocks.shape[-1] == count
    amax = torch.stack([w[index].abs().amax() for index in block_indices(shape, fmt, axis)])
    assert torch.equal(blocks.abs().amax(-1).flatten().sort().values, amax.sort().values)


def test_whole_blocks_are_a_view_and_results_keep_the_layout():
    w = draw((6, 64, 5))
    for axis, fmt in ((1, "int4"), (1, "int8"), (0, "int4/3"), (-1, "int4/5"), (1, "int4/tensor")):
        assert to_blocks(w, resolve(fmt), axis).data_ptr() == w.data_ptr()
        for function in FUNCTIONS.values():
            assert function(w, resolve(fmt), axis).stride() == w.stride()
    for axis in (0, 1, 2):  # short last blocks
        assert rtn(w, resolve("int4/7"), axis).is_contiguous()


@pytest.mark.parametrize("name", ["nvfp4", "int4/5", "int4/channel", "int4/tensor"])
@pytest.mark.parametrize("layout", ["plain", "channels last", "permuted", "other length-one strides"])
def test_results_have_the_weight_s_own_strides_and_its_values(name, layout):
    fmt, shape = resolve(name), (6, 32, 1, 1)
    w = draw(shape)
    if layout == "channels last":
        w = w.to(memory_format=torch.channels_last)
    elif layout == "permuted":
        w = draw((32, 6, 1, 3)).transpose(0, 1)
    elif layout == "other length-one strides":
        w = w.as_strided(shape, (32, 1, 32, 1))
    for which, function in FUNCTIONS.items():
        for axis in (1, 0):
            x = function(w, fmt, axis)
            assert x.stride() == w.stride() == torch.empty_like(w).stride(), which
            if which in ("rtn", "variance"):  # the others sum in the order of memory, or draw in it
                assert torch.equal(x, function(w.contiguous(), fmt, axis)), which


def test_a_compiled_graph_sees_the_same_strides():
    """The fake tensors that a graph is made with choose strides of length one by another rule."""

    def product(w, x):
        w = rtn(w, resolve("nvfp4"), 1)
        return torch.conv1d(x, w).view(2, 2, 16, 12)

    w, x = torch.randn(32, 32, 1), torch.randn(2, 32, 12)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(product, backend="aot_eager")(w, x), product(w, x))


def test_scale_parts_multiply_to_the_scale():
    w = draw((5, 37), dtype=torch.float32)
    block, tensor = scale_parts(w, resolve("nvfp4"))
    assert torch.equal(block * tensor, scale(w, resolve("nvfp4")))
    assert torch.equal(block.to(torch.float8_e4m3fn).float(), block)
    block, tensor = scale_parts(w, resolve("mxfp4"))
    assert tensor is None and torch.equal(block.log2(), block.log2().round())


@pytest.mark.parametrize("name", ["nvfp4", "int4/tensor"])
def test_shards_with_the_whole_amax_are_the_whole(name):
    fmt, w = resolve(name), draw((6, 64))
    amax = w.abs().amax()
    whole = rtn(w, fmt), variance(w, fmt), rr(w, fmt, uniform=torch.full_like(w, 0.3))
    for rows in (slice(0, 2), slice(2, 6), slice(0, 0)):
        shard = w[rows]
        parts = (
            rtn(shard, fmt, amax_tensor=amax),
            variance(shard, fmt, amax_tensor=amax),
            rr(shard, fmt, uniform=torch.full_like(shard, 0.3), amax_tensor=amax),
        )
        for part, full in zip(parts, whole, strict=True):
            assert torch.equal(part, full[rows])
        assert variance_vjp(shard, shard, fmt, amax_tensor=amax).shape == shard.shape
    assert not torch.equal(rtn(w[:2], fmt), whole[0][:2])  # the argument matters


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_tensor_and_zero_block(fmt, dtype):
    for w in (torch.zeros(3, 40, dtype=dtype), -torch.zeros(3, 40, dtype=dtype), draw((3, 40), dtype=dtype)):
        one = torch.ones(w.shape)
        zero = w == 0
        outs = rtn(w, fmt), rr(w, fmt, uniform=torch.zeros(w.shape)), variance(w, fmt)
        for out in outs:
            assert (out[zero] == 0).all() and out.isfinite().all()
        assert not torch.signbit(rtn(w, fmt)[zero]).any()
        for scale_grad in (False, True):
            # A zero is a minimum of its own variance: nothing may push it away.
            grad = variance_vjp(w, one, fmt, scale_grad=scale_grad)
            assert (grad[zero] == 0).all() and grad.isfinite().all()
            assert rtn_vjp(w, one, fmt, scale_grad=scale_grad).isfinite().all()


@every
def test_tiny_weights_have_finite_results_and_a_held_scale(fmt):
    w = torch.tensor([[2.0**-149, -(2.0**-140), 2.0**-130, 0.0]])
    assert (scale(w, fmt) >= 2.0**-126).all()
    assert (rtn(w, fmt) - w).abs().max() <= 2.0**-126
    grad = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert torch.equal(rtn_vjp(w, grad, fmt), grad)
    assert torch.equal(variance_vjp(w, grad, fmt), variance_vjp(w, grad, fmt, scale_grad=False))


@saturating
def test_saturated_weights_take_the_last_level_and_have_no_variance(fmt):
    w = draw((16, 96))
    s = reference(w, fmt, -1)[0]
    top, bottom = w > s * fmt.grid.levels[-1], w < s * fmt.grid.levels[0]
    assert (top | bottom).sum() > 3
    for q in (rtn(w, fmt), rr(w, fmt), rr(w, fmt, uniform=torch.zeros_like(w))):
        assert torch.equal(q[top], (s * fmt.grid.levels[-1])[top])
        assert torch.equal(q[bottom], (s * fmt.grid.levels[0])[bottom])
    assert (variance(w, fmt)[top | bottom] == 0).all()
    assert (variance_vjp(w, torch.ones_like(w), fmt, scale_grad=False)[top | bottom] == 0).all()


@unbiased
def test_nothing_saturates(fmt):
    w = draw((16, 96))
    s = reference(w, fmt, -1)[0]
    assert (w.abs() <= s * fmt.grid.max * (1 + 1e-15)).all()


def test_ties_take_the_even_code():
    w = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 7.0])
    assert rtn(w, resolve("int4")).tolist() == [0, 2, 2, 0, -2, 7]
    w = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 6.0])
    assert rtn(w, resolve("fp4")).tolist() == [0, 1, 1, 2, 2, 4, 4, -4, 6]


def test_float32_codes_come_from_a_true_division():
    """Weights beside ties, where ``w * (1 / s)`` gives other codes."""
    amax = np.random.default_rng(0).uniform(1, 2, (2000, 1)).astype(np.float32)
    s = amax / np.float32(7)
    w = np.concatenate([amax, s * (np.arange(-7, 7, dtype=np.float32) + np.float32(0.5))], 1)
    want = s * np.rint(w / s).clip(-7, 7)
    assert (want != s * np.rint(w * (1 / s)).clip(-7, 7)).any()
    np.testing.assert_array_equal(rtn(torch.from_numpy(w), resolve("int4")).numpy(), want)


def test_a_block_of_one_is_itself():
    w = draw((5, 7))
    torch.testing.assert_close(rtn(w, resolve("int4/1")), w, rtol=1e-15, atol=0)
    assert (variance(w, resolve("int4/1")) <= (1e-15 * w) ** 2 * 100 + 1e-30 * w * w).all()


@unbiased
def test_all_roundings_average_to_w_and_spread_as_the_variance(fmt):
    n = 8
    w, h = draw((n,), seed=3), torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    s, lo, hi, _ = reference(w, fmt, 0)
    p = torch.where(hi > lo, (w / s - lo) / (hi - lo), 0.0).clamp(0, 1)
    mean, spread, total = torch.zeros_like(w), 0.0, 0.0
    for bits in itertools.product((False, True), repeat=n):
        up = torch.tensor(bits)
        q = rr(w, fmt, 0, uniform=torch.where(up, p * 0.999, p + (1 - p) * 0.001))
        assert torch.equal(q, s * torch.where(up & (p > 0), hi, lo))  # the threshold is p, the outcomes lo and hi
        chance = torch.where(up, p, 1 - p).prod()
        mean, spread, total = mean + chance * q, spread + chance * (h * (q - w) ** 2).sum(), total + chance
    torch.testing.assert_close(total, torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(mean, w, rtol=1e-12, atol=1e-14 * float(w.abs().max()))
    torch.testing.assert_close((h * variance(w, fmt, 0)).sum(), spread, rtol=1e-9, atol=1e-12)


@every
def test_samples_are_reproducible_and_unbiased(fmt):
    w = draw((3, 40), dtype=torch.float32)
    again = [rr(w, fmt, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*again)
    g = torch.Generator().manual_seed(8)
    samples = torch.stack([rr(w, fmt, generator=g) for _ in range(600)]).double()
    sigma = variance(w, fmt).double().sqrt()
    s = scale(w.double(), fmt).expand_as(to_blocks(w, fmt))
    z = from_blocks(to_blocks(w.double(), fmt) / s, fmt, -1, w.shape)
    inside = (z <= fmt.grid.levels[-1]) & (z >= fmt.grid.levels[0])
    error = (samples.mean(0) - w)[inside].abs()
    assert (error <= 5 * sigma[inside] / 600**0.5 + 1e-5 * w.abs().max()).all()
    # The sample variance of a two-point law with a rare outcome is noisy: compare the sum.
    torch.testing.assert_close(samples.var(0).sum(), (sigma**2).sum(), rtol=0.1, atol=1e-4)


def test_the_chance_of_rounding_up_is_exact():
    w = torch.tensor([0.25, 0.5, 0.875, 1.0, -0.25, 7.0]).expand(8, 6)
    up = rr(w, resolve("int4"), uniform=(torch.arange(8) / 8)[:, None].expand(8, 6)) > w.floor()
    assert up.sum(0).tolist() == [2, 4, 7, 0, 6, 0]


def test_randomness_is_independent_between_weights():
    w = torch.full((1, 4096), 0.5)
    w[0, 0] = 7.0
    up = (rr(w, resolve("int4/tensor"), generator=torch.Generator().manual_seed(0))[0, 1:] > 0.5).float()
    assert abs(up.mean() - 0.5) < 0.04
    assert abs(torch.corrcoef(torch.stack([up[:-1], up[1:]]))[0, 1]) < 0.08


# Variances of smaller weights are no normal float32 numbers: an ulp of w / s, 5e-7, times s^2, and s is w / 7.
weights = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=40),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-12 else x),
).map(torch.from_numpy)
any_format = st.sampled_from(EVERY)
relaxed = settings(max_examples=40, deadline=None, derandomize=True)


@relaxed
@given(weights, any_format, st.integers(0, 2))
def test_rounding_properties(w, fmt, axis):
    axis %= w.dim()
    s = from_blocks(scale(w, fmt, axis).expand_as(to_blocks(w, fmt, axis)), fmt, axis, w.shape)
    q, up, down = (rtn(w, fmt, axis), rr(w, fmt, axis, uniform=torch.zeros_like(w)),
                   rr(w, fmt, axis, uniform=torch.ones_like(w)))  # fmt: skip
    clamped = torch.minimum(torch.maximum(w, s * fmt.grid.levels[0]), s * fmt.grid.levels[-1])
    slack = 1e-6 * s * fmt.grid.max
    assert (down <= clamped + slack).all() and (clamped <= up + slack).all()
    assert ((q == up) | (q == down)).all()
    assert ((q - clamped).abs() <= (up - down) / 2 + slack).all()
    v = variance(w, fmt, axis)
    assert (v >= 0).all() and (v <= ((up - down) / 2 + slack) ** 2 * (1 + 1e-5)).all()


@relaxed
@given(weights, st.sampled_from([f for f in EVERY if f.law != HalfScale("fp16")]))  # subnormal below 2^-14
def test_doubling_the_weight_doubles_everything(w, fmt):
    assert torch.equal(rtn(2 * w, fmt), 2 * rtn(w, fmt))
    assert torch.equal(variance(2 * w, fmt), 4 * variance(w, fmt))
    assert torch.equal(variance_vjp(2 * w, w, fmt), 2 * variance_vjp(w, w, fmt))


@relaxed
@given(weights, st.sampled_from([f for f in EVERY if {-level for level in f.grid.levels} == set(f.grid.levels)]))
def test_negating_the_weight_negates_everything(w, fmt):
    assert torch.equal(rtn(-w, fmt), -rtn(w, fmt))
    assert torch.equal(variance(-w, fmt), variance(w, fmt))
    assert torch.equal(variance_vjp(-w, w.abs(), fmt), -variance_vjp(w, w.abs(), fmt))


@relaxed
@given(weights, st.sampled_from([f for f in EVERY if isinstance(f.law, PowerOfTwoScale)]))
def test_rounding_twice_is_rounding_once_with_power_of_two_scales(w, fmt):
    q = rtn(w, fmt)
    assert torch.equal(rtn(q, fmt), q)
    assert (variance(q, fmt) == 0).all()


@relaxed
@given(weights, st.sampled_from([f for f in UNBIASED if not isinstance(f.law, PowerOfTwoScale)]))
def test_rounding_twice_is_rounding_once_up_to_the_scale_with_float32_scales(w, fmt):
    """Not bit for bit: the block's largest weight comes back as ``q_max s`` rounded, and so may the scale."""
    q = rtn(w, fmt)
    torch.testing.assert_close(rtn(q, fmt), q, rtol=3e-7, atol=0)
    # Off a level by a few rounding errors, times the gap between levels, which is no larger than the level.
    assert (variance(q, fmt) <= 1e-6 * q.square()).all()


@pytest.mark.parametrize("fmt", [f for f in EVERY if f.block != 1], ids=lambda f: f.name)
def test_variance_is_exactly_zero_at_every_level(fmt):
    levels = torch.tensor(fmt.grid.levels)
    if fmt.block not in ("tensor", "channel"):
        # Every level beside the largest magnitude, which makes the scale 1 (and NVFP4's tensor scale 1/448).
        levels = torch.stack([levels, torch.full_like(levels, max(fmt.grid.levels, key=abs))], 1)
    assert torch.equal(rtn(levels, fmt), levels) and (variance(levels, fmt) == 0).all()
    assert (variance_vjp(levels, torch.ones_like(levels), fmt) == 0).all()
    between = levels.clone()
    between.view(len(fmt.grid.levels), -1)[fmt.grid.levels.index(0) + 1, 0] *= 0.99
    assert (variance(between, fmt) > 0).sum() == 1
