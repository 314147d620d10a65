"""AdamW and the expected-loss term with Fisher curvature, in one pass over many weights.

Per weight w with gradient g, moments m and v, and per block of it with scale s and absmax elements M:

    h  = of_moment v + of_square g^2                                    curvature times half the strength
    t  = h s v'(z) + [i in M] share sign(w),                            z = w / s, see `rounding.variance_vjp`
    g' = unscale (g + t), t within limit sqrt(h)
    m  = beta1 m + (1 - beta1) g'
    v  = beta2 v + (1 - beta2) g'^2
    w  = keep w - step m / (sqrt(v) + eps)

It reads w, g, m and v and writes w, m and v, as AdamW does without the term; g stays as it is. Blocks are whole, of a
power of two, and consecutive in memory. A two-level format's scale takes the absmax of the whole weight, which must be
known before the pass: that of the updated weight is a by-product, for the pass that follows.

Source: Loshchilov and Hutter 2019, arXiv 1711.05101 (AdamW); LOTION, arXiv 2510.08757 (the term).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lotion_fx.kernels.blocks import at_amax, in_grid_units, third_level
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.device import on_device
from lotion_fx.kernels.device_code import (
    TWO_LEVEL,
    clamp,
    neighbours,
    specialized,
    template,
    tensor_scale,
    variance_slopes,
)
from lotion_fx.kernels.tiles import absmax
from lotion_fx.kernels.tuning import choose
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import resolve
from lotion_fx.numerics.noise import resolve_noise

# Columns of `factors`: what differs from weight to weight.
FACTORS = ("of_moment", "of_square", "unscale", "keep", "step", "eps", "limit")

# A program takes many tiles of one weight, so that the tables are read once for them.
CONFIGS = tuple(
    Config({"TILE": tile, "TILES": tiles}, num_warps=warps)
    for tile, tiles, warps in ((256, 34, 1), (256, 57, 1), (512, 64, 2), (512, 24, 1))
)

_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@template
def term_slope(w, h, inside, ts):
    """``d/dw sum_i h_i sigma_i^2`` of whole blocks, `rounding.variance_vjp`; w and h float32 [blocks, block]."""
    amax = absmax(w)
    z, _, s = in_grid_units(w, amax, ts)
    lo, hi = neighbours(z)
    z = clamp(z)  # as `neighbours` begins, which makes one operation of the two
    by_w, by_s = variance_slopes(z, lo, hi, third_level(z, lo, hi))
    count = tl.sum((tl.abs(w) == amax).to(tl.float32), 1, keep_dims=True)
    return h * by_w * s + at_amax(w, amax, inside, s * tl.sum(h * by_s, 1, keep_dims=True), count, ts)


@template
def within(x, reach):
    """x in [-reach, reach]; what is no number stays none."""
    return tl.maximum(tl.minimum(x, reach, tl.PropagateNan.ALL), -reach, tl.PropagateNan.ALL)


@template
def adamw_smooth_kernel(
    table,  # int64 [n, 6]: addresses of w, g, m and v, elements, first program
    factors,  # float32 [n, 7]: FACTORS
    owner,  # int32 [programs]: the weight of each program
    amax,  # float32 [n]
    amax_after,  # int32 [n]: bits of a float32, 0 before
    beta1,
    rest1,  # 1 - beta1, which float32 could not subtract without loss
    beta2,
    rest2,
    WEIGHT: tl.constexpr,  # dtypes of w and g, and of m and v
    MOMENT: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # of the addresses, in bytes
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,  # of a program, at most: a weight's last has what is left
):
    program = tl.program_id(0)
    n = tl.load(owner + program)
    row, of = table + n * 6, factors + n * 7
    start = (program - tl.load(row + 5)) * (TILE * TILES)
    w_at = tl.multiple_of(tl.load(row).to(tl.pointer_type(WEIGHT)), ALIGNMENT) + start
    g_at = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(WEIGHT)), ALIGNMENT) + start
    m_at = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(MOMENT)), ALIGNMENT) + start
    v_at = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(MOMENT)), ALIGNMENT) + start
    elements = tl.load(row + 4)
    left = tl.minimum(elements - start, TILE * TILES).to(tl.int32)
    left = tl.multiple_of(tl.where(elements > 0, left, 0), BLOCK)  # 0 elements upon an overflow
    of_moment, of_square, unscale = tl.load(of), tl.load(of + 1), tl.load(of + 2)
    keep, step, eps, limit = tl.load(of + 3), tl.load(of + 4), tl.load(of + 5), tl.load(of + 6)
    ts = tensor_scale(tl.load(amax + n)) if TWO_LEVEL else 1.0
    in_tile = tl.arange(0, TILE // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    largest = tl.full((), 0.0, tl.float32)
    for first in range(0, left, TILE):
        i = first + in_tile
        inside = i < left
        w = tl.load(w_at + i, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_at + i, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(m_at + i, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_at + i, mask=inside, other=0.0).to(tl.float32)
        h = of_moment * v + of_square * g * g
        reach = limit * tl.sqrt(tl.abs(h))
        g = unscale * (g + within(term_slope(w, h, inside, ts), reach))
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * g * g
        w = (keep * w - tl.div_rn(step * m, tl.sqrt_rn(v) + eps)).to(WEIGHT)
        tl.store(m_at + i, m.to(MOMENT), mask=inside)
        tl.store(v_at + i, v.to(MOMENT), mask=inside)
        tl.store(w_at + i, w, mask=inside)
        if TWO_LEVEL:
            largest = tl.maximum(largest, tl.max(tl.where(inside, tl.abs(w.to(tl.float32)), 0.0)))
    if TWO_LEVEL:
        tl.atomic_max(amax_after + n, largest.to(tl.int32, bitcast=True), sem="relaxed")


class Step(NamedTuple):
    """A step of n weights, which become ``params``, ``exp_avgs`` and ``exp_avg_sqs`` after it, in place.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: n contiguous tensors each, float32, bfloat16 or float16, of one dtype per
            list, on one device. The last dimension holds whole blocks.
        factors: float32 [n, 7], `FACTORS` of each weight.
        amax: float32 [n], the absmax of each weight, for a two-level format; else empty.
        found_inf: 0-d, not 0 where the gradients overflowed, upon which nothing is written.
        fmt, noise: names of the format and of the noise law.
        beta1, beta2: decay of the moments.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    factors: Tensor
    amax: Tensor
    found_inf: Tensor | None
    fmt: str
    noise: str
    beta1: float
    beta2: float


@torch.library.custom_op("lotion_fx::adamw_smooth", mutates_args=("params", "exp_avgs", "exp_avg_sqs"))
def adamw_smooth(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    factors: Tensor,
    amax: Tensor,
    found_inf: Tensor | None,
    fmt: str,
    noise: str,
    beta1: float,
    beta2: float,
) -> Tensor:
    """Steps n weights by AdamW on their loss plus the expected-loss term.

    No `triton_op`: its pointer tables hold addresses, which a trace does not have.

    Args:
        params, grads, exp_avgs, exp_avg_sqs, factors, amax, found_inf, fmt, noise, beta1, beta2: see `Step`.

    Returns:
        The absmax of each updated weight, float32 [n]; empty unless the format is two-level.
    """
    step = Step(params, grads, exp_avgs, exp_avg_sqs, factors, amax, found_inf, fmt, noise, beta1, beta2)
    if params[0].device.type == "cpu":
        return reference(step)
    with on_device(params[0].device) as arch:
        return launch(step, choose("adamw_smooth", "", arch, CONFIGS))


def reference(step: Step) -> Tensor:
    """`adamw_smooth` weight by weight in ATen."""
    if step.found_inf is not None and step.found_inf:
        return step.amax.clone()
    law, form, beta1, beta2 = resolve_noise(step.noise), resolve(step.fmt), step.beta1, step.beta2
    for i, (w, grad, m, v) in enumerate(zip(*step[:4], strict=True)):
        dtype = rounding.compute_dtype(w)
        of_moment, of_square, unscale, keep, size, eps, limit = step.factors[i].to(dtype)
        before, g, first, second = (t.to(dtype) for t in (w, grad, m, v))
        h = of_moment * second + of_square * g.square()
        largest = step.amax[i] if form.law.two_level else None
        reach = limit * h.abs().sqrt()
        slope = rounding.variance_vjp(before, h, form, law=law, amax_tensor=largest)
        g = unscale * (g + torch.maximum(torch.minimum(slope, reach), -reach))
        first = beta1 * first + (1 - beta1) * g
        second = beta2 * second + (1 - beta2) * g.square()
        m.copy_(first)
        v.copy_(second)
        w.copy_(keep * before - size * first / (second.sqrt() + eps))
    return torch.stack([w.abs().amax().float() for w in step.params]) if form.law.two_level else step.amax.clone()


def launch(step: Step, config: Config = CONFIGS[0]) -> Tensor:
    """`adamw_smooth` by the kernel, in one launch on whatever device the tensors are."""
    device, form, amax, found_inf = step.params[0].device, resolve(step.fmt), step.amax, step.found_inf
    programs = tuple(programs_of(p.numel(), config) for p in step.params)
    first = accumulate(programs, initial=0)
    columns = ([t.data_ptr() for t in tensors] for tensors in step[:4])
    rows = list(zip(*columns, (p.numel() for p in step.params), first, strict=False))
    table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
    if found_inf is not None:
        table[:, 4] *= found_inf.to(table.device) == 0  # no elements, so nothing is written
    after = torch.zeros(amax.shape, dtype=torch.int32, device=device)
    specialized(adamw_smooth_kernel, form, resolve_noise(step.noise))[(sum(programs),)](
        table,
        step.factors,
        _owners(programs, device),
        amax,
        after,
        step.beta1,
        1 - step.beta1,
        step.beta2,
        1 - step.beta2,
        WEIGHT=_TRITON[step.params[0].dtype],
        MOMENT=_TRITON[step.exp_avgs[0].dtype],
        ALIGNMENT=math.gcd(16, *(address for row in rows for address in row[:4])),
        BLOCK=form.block,
        **config.options,
    )
    largest = after.view(torch.float32)
    return largest if found_inf is None else torch.where(found_inf.to(amax.device) == 0, largest, amax)


def programs_of(elements: int, config: Config) -> int:
    """How many programs a weight of so many elements takes."""
    return triton.cdiv(elements, config.constants["TILE"] * config.constants["TILES"])


@lru_cache(maxsize=8)
def _owners(programs: tuple[int, ...], device: torch.device) -> Tensor:
    """The weight of each program: the same from step to step."""
    owner = torch.arange(len(programs), dtype=torch.int32)
    return owner.repeat_interleave(torch.tensor(programs)).to(device)
