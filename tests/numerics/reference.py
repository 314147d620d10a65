"""Rounding that walks through the blocks one by one, without padding or views, on every format and a few shapes."""

import itertools
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from lotion_fx.numerics.formats import Format, codebook, formats, resolve
from lotion_fx.numerics.grids import Codebook
from lotion_fx.numerics.rounding import (
    rr,
    rtn,
    rtn_vjp,
    variance,
    variance_vjp,
)
from lotion_fx.numerics.scales import HalfScale, PowerOfTwoScale, TwoLevelScale

LOPSIDED = codebook((-1.5, -0.25, 0.0, 0.1, 0.75), block=6, name="lopsided")
OPTIONS = ("int4/tensor", "fp4/channel", "int3/5", "int4/1", "mxfp4/floor", "mxfp4/even", "mxfp8_e4m3/floor")
OPTIONS += ("nvfp4/pow2", "int4/bf16", "int4/fp16", "int3/5/bf16", "int8/fp16", "int4/tensor/bf16", "nf4/fp16")
# Aliases name the same format, hence the dict; other tests may have registered theirs.
EVERY = [*dict.fromkeys(resolve(n) for n in (*formats(), *OPTIONS) if not n.startswith("test_")), LOPSIDED]
# Nothing passes the last level, so randomized rounding has mean w everywhere. (A lopsided codebook clips one side.)
# (float16 scales end at 65504, further than any weight drawn here.)
PAST = ("nvfp4", "nvfp4/pow2", "mxfp4/floor", "mxfp4/even", "mxfp8_e4m3/floor", "lopsided")
SATURATING = [f for f in EVERY if f.name in PAST]
UNBIASED = [f for f in EVERY if f not in SATURATING]
SHAPES = [((7,), 0), ((1, 1), -1), ((5, 37), -1), ((37, 5), 0), ((3, 33, 4), 1), ((4, 64), 1)]
every = pytest.mark.parametrize("fmt", EVERY, ids=lambda f: f.name)
unbiased = pytest.mark.parametrize("fmt", UNBIASED, ids=lambda f: f.name)
saturating = pytest.mark.parametrize("fmt", SATURATING, ids=lambda f: f.name)
shapes = pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)


def draw(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Weights whose blocks differ in size, with zeros and an all-zero block among them."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g, dtype=torch.float64)
    w = w * torch.exp(2 * torch.randn(shape[0], generator=g, dtype=torch.float64)).view(-1, *[1] * (len(shape) - 1))
    w.view(-1)[:: max(w.numel() // 3, 2)] = 0
    if len(shape) > 1 and shape[0] > 1:
        w[0] = 0
    return w.to(dtype)


FUNCTIONS = {
    "rtn": rtn,
    "rr": lambda w, fmt, axis=-1: rr(w, fmt, axis, uniform=w.abs().remainder(1)),
    "variance": variance,
    "variance_vjp": lambda w, fmt, axis=-1: variance_vjp(w, w * w, fmt, axis),
    "rtn_vjp": lambda w, fmt, axis=-1: rtn_vjp(w, w, fmt, axis),
}


def block_indices(shape: tuple[int, ...], fmt: Format, axis: int) -> Iterator[tuple]:
    """Where each block's weights are, as something to index with."""
    if fmt.block == "tensor":
        yield tuple(slice(None) for _ in shape)
        return
    axis %= len(shape)
    length = shape[axis]
    block = length if fmt.block == "channel" else fmt.block
    others = [range(n) if d != axis else range(0, length, block) for d, n in enumerate(shape)]
    for index in itertools.product(*others):
        yield tuple(slice(i, i + block) if d == axis else i for d, i in enumerate(index))


def rounded_up(x: float, type: type) -> float:
    """The smallest number of a 16-bit float type that is not below ``x``, or its largest."""
    nearest = np.float64(x).astype(type)
    up = nearest if float(nearest) >= x else np.nextafter(nearest, type(np.inf))
    return min(float(up), float(ml_dtypes.finfo(type).max))


def reference_scale(amax: Tensor, amax_tensor: Tensor, fmt: Format) -> Tensor:
    """One block's scale, 0-d float64; differentiable by ``amax``, snapping passed straight through."""
    q_max = max(abs(x) for x in fmt.grid.levels)
    if isinstance(fmt.law, TwoLevelScale):
        ts = (amax_tensor.detach() / (q_max * 448)).clamp(min=2.0**-117)
        if fmt.law.tensor == "pow2":
            m, e = np.frexp(ts.item())
            ts = torch.tensor(2.0 ** int(e - (m == 0.5)), dtype=ts.dtype)
        s = (amax / q_max / ts).clamp(min=2.0**-9)
        snapped = float(np.float64(min(s.item(), 448.0)).astype(ml_dtypes.float8_e4m3fn))
        return ts * (s + (snapped - s).detach())
    if isinstance(fmt.law, HalfScale):
        type, smallest = {"bf16": (ml_dtypes.bfloat16, 2.0**-119), "fp16": (np.float16, 2.0**-24)}[fmt.law.name]
        s = (amax / q_max).clamp(min=smallest)
        return s + (rounded_up(s.item(), type) - s).detach()
    if isinstance(fmt.law, PowerOfTwoScale):
        s = (amax / q_max).clamp(min=2.0**-126)
        if fmt.law.rule == "ceil":
            e = next(e for e in range(-126, 129) if q_max * 2.0**e >= amax.item())
        else:
            m, e = np.frexp(max(amax.item(), 2.0**-126))
            if fmt.law.rule == "even":
                e += np.rint(m * 2 ** (fmt.grid.mantissa_bits + 1)) == 2 ** (fmt.grid.mantissa_bits + 1)
            e = max(int(e - np.frexp(q_max)[1]), -126)
        return s + (2.0**e - s).detach()
    return (amax / q_max).clamp(min=2.0**-126)


def reference(w: Tensor, fmt: Format, axis: int) -> tuple[Tensor, ...]:
    """``s, lo, hi, nearest`` of every weight (float64), ``s`` differentiable by ``w``, the levels found by search."""
    levels = np.array(fmt.grid.levels)
    codes = fmt.grid.encode(torch.tensor(levels, dtype=torch.float32)).numpy()
    s = torch.zeros_like(w)
    lo, hi, near = np.zeros(w.shape), np.zeros(w.shape), np.zeros(w.shape)
    for index in block_indices(w.shape, fmt, axis):
        s_block = reference_scale(w[index].abs().amax(), w.abs().amax(), fmt)
        s = s.index_put((torch.zeros(w.shape).bool().index_put_(*_where(w, index)),), s_block)
        z = np.clip((w[index] / s_block).detach().numpy(), levels[0], levels[-1])
        i, j = np.searchsorted(levels, z, side="right") - 1, np.searchsorted(levels, z, side="left")
        lo[index], hi[index] = levels[i], levels[j]
        mid = (levels[i] + levels[j]) / 2
        if isinstance(fmt.grid, Codebook):
            mid = mid.astype(np.float32)
        near[index] = np.where((z > mid) | ((z == mid) & (codes[j] % 2 == 0)), levels[j], levels[i])
    return s, torch.from_numpy(lo), torch.from_numpy(hi), torch.from_numpy(near)


def _where(w: Tensor, index: tuple) -> tuple:
    mask = torch.zeros(w.shape, dtype=torch.bool)
    mask[index] = True
    return (mask,), torch.tensor(True)


def weights_with_ties(shape: tuple[int, ...]) -> Tensor:
    w = draw(shape, seed=11)
    flat = w.view(-1)
    top = flat.abs().argmax()
    flat[(top + 1) % flat.numel()] = -flat[top]  # the absmax twice, once with each sign
    return w
