"""A linear layer's mean and variance under random rounding of its weight, from one read of what it is made of.

    y = x W^T + bias                                          [N, O]
    v = x^2 S^T                                               [N, O]        S = sigma^2(W) [O, I]
    v = (x^2 + u) S^T + u (W^2)^T                             for a random input of mean x and variance u

A program makes one tile of y and of v in two float32 accumulators, squares in registers of the tiles that y's product
reads. S is made in registers too, from W's own tile and the largest magnitude of its blocks (`variance_linear`), or is
read (`variance_linear_given`). Making it takes some forty instructions a weight in each row of tiles; that is hidden
behind the reads where there are few positions, and is the larger part of the work where there are thousands. So beyond
`FEW` positions `variance_linear` makes S once and reads it.

How exact: y as the dtype's own product with a float32 sum. v's operands are float32 values rounded to the type of their
product (`kernels.operands`), each within half a unit in the last place of x's dtype; as no summand is negative, v is
within one such unit (2^-7 for bfloat16), and the rounding of the output. S in registers is `lotion_fx.rounding`'s, from
the same printed formulas.

Source: LOTION, Kwun et al. 2025, arXiv 2510.08757, section 3, for the variance; `passes.moment_affine` for its rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from lotion_fx.kernels.blocks import in_grid_units, third_level
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.device import on_device
from lotion_fx.kernels.device_code import (
    TWO_LEVEL,
    clamp,
    neighbours,
    specialized,
    template,
    tensor_scale,
    variance,
)
from lotion_fx.kernels.operands import operand, precisions, square
from lotion_fx.kernels.tiles import absmax, count, load, place, store
from lotion_fx.kernels.tuning import launchable
from lotion_fx.kernels.view import amaxes
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import Format, resolve
from lotion_fx.numerics.noise import RANDOMIZED, NoiseLaw, resolve_noise


@template
def variance_of(w, amax, amax_tensor):
    """``sigma^2`` of weights whose blocks have the absmax ``amax``, which broadcasts; two levels need the tensor's."""
    z, _, s = in_grid_units(w, amax, tensor_scale(amax_tensor) if TWO_LEVEL else amax)
    z = clamp(z)
    lo, hi = neighbours(z)
    return variance(z, lo, hi, third_level(z, lo, hi))[0] * s * s


@triton.jit
def _begin(positions, outputs, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """This program's tile: its row and column among all, offsets in it and along the contraction, both sums at zero."""
    row, column = place(tl.cdiv(positions, BM), tl.cdiv(outputs, BN), GROUP)
    m, n, k = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :], tl.arange(0, BK)
    return row, column, m, n, k, tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)


@triton.jit
def _load_input(x, u, row, m, first, k, x_stride, u_stride, positions, inputs, RANDOM: tl.constexpr):
    """Tiles [BM, BK] of the input's mean and variance; where it is not RANDOM the latter is not read."""
    tile_x = load(x, row, m, first + k[None, :], x_stride, positions, inputs)
    tile_u = tile_x
    if RANDOM:
        tile_u = load(u, row, m, first + k[None, :], u_stride, positions, inputs)
    return tile_x, tile_u


@triton.jit
def _add(tile_x, tile_w, s, tile_u, sum_y, sum_v, RANDOM: tl.constexpr, PRECISION: tl.constexpr, SQUARES: tl.constexpr):
    """The sums with a step of the contraction added: x and u [BM, BK], w and S [BK, BN]; u only where RANDOM."""
    sum_y = tl.dot(tile_x, tile_w, sum_y, input_precision=PRECISION)
    if RANDOM:
        mean, u = tile_x.to(tl.float32), tile_u.to(tl.float32)
        sum_v = tl.dot(operand(mean * mean + u, tile_x.dtype, SQUARES), s, sum_v, input_precision=SQUARES)
        sum_v = tl.dot(operand(u, tile_x.dtype, SQUARES), square(tile_w, SQUARES), sum_v, input_precision=SQUARES)
    else:
        sum_v = tl.dot(square(tile_x, SQUARES), s, sum_v, input_precision=SQUARES)
    return sum_y, sum_v


@template
def variance_linear_kernel(
    x, u, w, bias, amax, y, v,
    positions, outputs, inputs, x_stride, u_stride, w_stride,
    BLOCK: tl.constexpr, AMAX: tl.constexpr, RANDOM: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    SQUARES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column, m, n, k, sum_y, sum_v = _begin(positions, outputs, BM, BN, BK, GROUP)
    SIZE: tl.constexpr = BK if BLOCK == 0 else BLOCK
    given = 0.0
    if AMAX == "tensor":
        given = tl.load(amax)
    elif AMAX == "channel":
        given = tl.load(amax + column * BN + n, mask=column * BN + n < outputs, other=0.0)[None, :, :]
    for first in range(0, inputs, BK):
        tile_x, tile_u = _load_input(x, u, row * BM, m, first, k, x_stride, u_stride, positions, inputs, RANDOM)
        tile_w = load(w, column * BN, n, first + k[:, None], w_stride, outputs, inputs)
        blocks = tl.reshape(tile_w.to(tl.float32), (BK // SIZE, SIZE, BN))
        # The reduction also keeps this arithmetic in a layout in which each weight is held by one thread.
        largest = absmax(blocks)
        if BLOCK == 0:
            largest = tl.maximum(largest, given)
        s = operand(tl.reshape(variance_of(blocks, largest, given), (BK, BN)), tile_x.dtype, SQUARES)
        tile_w = tile_w.to(tile_x.dtype)
        sum_y, sum_v = _add(tile_x, tile_w, s, tile_u, sum_y, sum_v, RANDOM, PRECISION, SQUARES)
    _finish(sum_y, sum_v, bias, y, v, row * BM, column * BN, m, n, positions, outputs, BIAS)


@triton.jit
def variance_given_kernel(
    x, u, w, bias, variances, y, v,
    positions, outputs, inputs, x_stride, u_stride, w_stride, s_stride,
    RANDOM: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, SQUARES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column, m, n, k, sum_y, sum_v = _begin(positions, outputs, BM, BN, BK, GROUP)
    for first in range(0, inputs, BK):
        tile_x, tile_u = _load_input(x, u, row * BM, m, first, k, x_stride, u_stride, positions, inputs, RANDOM)
        tile_w = load(w, column * BN, n, first + k[:, None], w_stride, outputs, inputs).to(tile_x.dtype)
        s = load(variances, column * BN, n, first + k[:, None], s_stride, outputs, inputs)
        s = operand(s.to(tl.float32), tile_x.dtype, SQUARES)
        sum_y, sum_v = _add(tile_x, tile_w, s, tile_u, sum_y, sum_v, RANDOM, PRECISION, SQUARES)
    _finish(sum_y, sum_v, bias, y, v, row * BM, column * BN, m, n, positions, outputs, BIAS)


@triton.jit
def _finish(sum_y, sum_v, bias, y, v, row, column, m, n, positions, outputs, BIAS: tl.constexpr):
    """Adds the bias, and writes a tile of both outputs."""
    if BIAS:
        sum_y += tl.load(bias + column + n, mask=column + n < outputs, other=0.0).to(tl.float32)
    store(y, row, m, column + n, positions, outputs, sum_y)
    store(v, row, m, column + n, positions, outputs, sum_v)


def in_registers(fmt: Format, positions: int, dtype: torch.dtype) -> bool:
    """Whether `variance_linear` makes variances in registers, as it does on tensor cores for few positions.

    A tile must hold whole blocks, or their absmax be known beforehand, as a channel's and a tensor's is.
    """
    whole_blocks = not isinstance(fmt.block, int) or fmt.block in (1, 2, 4, 8, 16, 32)
    return positions <= FEW and dtype != torch.float32 and whole_blocks


def shape_class(positions: int, dtype: torch.dtype, random: bool) -> str:
    """The row of the tuning table: a random input's third product needs registers, and float32's products many."""
    if dtype == torch.float32:
        return "float32"
    return "random" if random else "few" if positions <= FEW else "many"


FEW = 128  # positions: one row of tiles, beyond which making variances once and reading them is predicted to take less


def launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    v: Tensor,
    fmt: Format,
    law: NoiseLaw = RANDOMIZED,
    bias: Tensor | None = None,
    u: Tensor | None = None,
    *,
    amax: Tensor | None = None,
    **how: Any,
) -> None:
    """Runs the kernel that makes variances in registers, where the tensors are.

    Args:
        x, weight, bias, u, amax: as in `variance_linear`, the last dimensions contiguous.
        y, v: the outputs, contiguous; overwritten.
        how: ``arch``, the compute capability, 80 for ``sm_80``; ``config``, one of `CONFIGS`, by default the tuning
            table's choice; ``wrap``, `torch.library.wrap_triton` inside a `triton_op`.
    """
    amax = amaxes(weight, fmt, -1) if amax is None else amax.to(torch.float32)
    kernel, of_weight = specialized(variance_linear_kernel, fmt, law), weight if amax is None else amax
    _run(kernel, "registers", (x, weight, bias, u), of_weight, y, v, (), format_constants(fmt), **how)


def launch_given(
    x: Tensor,
    weight: Tensor,
    variances: Tensor,
    y: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    u: Tensor | None = None,
    **how: Any,
) -> None:
    """Runs the kernel that reads the weight's variances [O, I], the last dimension contiguous; the rest as `launch`."""
    _run(variance_given_kernel, "given", (x, weight, bias, u), variances, y, v, (variances.stride(0),), {}, **how)


def format_constants(fmt: Format) -> dict[str, Any]:
    """What decides where a kernel's absmaxes come from: the block, 0 for a longer one, and what is given of others."""
    if isinstance(fmt.block, int):
        return {"BLOCK": fmt.block, "AMAX": "tensor" if fmt.law.two_level else "none"}
    return {"BLOCK": 0, "AMAX": fmt.block}


def _run(
    kernel: Any,
    which: str,
    layer: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    of_weight: Tensor,
    y: Tensor,
    v: Tensor,
    strides: tuple[int, ...],
    constants: dict[str, Any],
    *,
    arch: int,
    config: Config | None = None,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> None:
    """Launches one of the two kernels; ``of_weight`` and ``strides`` are what it alone takes."""
    x, weight, bias, u = layer
    (positions, inputs), outputs = x.shape, len(weight)
    precision, squares = precisions(x.dtype)
    row, key = shape_class(positions, x.dtype, u is not None), ("positions", "outputs", "inputs")
    choices = f"variance_linear/{which}", row, arch, CONFIGS[which][row]
    kernel, tile = launchable(kernel, *choices, config=config, key=key)
    # An argument that is not read is given a tensor that is there.
    wrap(kernel)[lambda meta: (count(positions, outputs, meta),)](
        x,
        x if u is None else u,
        weight,
        weight if bias is None else bias,
        of_weight,
        y,
        v,
        positions,
        outputs,
        inputs,
        x.stride(0),
        (x if u is None else u).stride(0),
        weight.stride(0),
        *strides,
        **constants,
        RANDOM=u is not None,
        BIAS=bias is not None,
        PRECISION=precision,
        SQUARES=squares,
        **tile,
    )


@triton_op("lotion_fx::variance_linear", mutates_args=())
def variance_linear(
    x: Tensor,
    weight: Tensor,
    fmt: str,
    noise: str = "randomized",
    bias: Tensor | None = None,
    u: Tensor | None = None,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and variance of a linear layer whose weight is randomly rounded, each weight independently.

    Args:
        x: mean of the input, [N, I]; bfloat16, float16 or float32.
        weight: [O, I], in any of these dtypes; rounded to x's for the mean. Blocks run along I.
        fmt, noise: names of the format and of the noise law; the law is taken as unbiased.
        bias: [O], fixed.
        u: variance of the input, [N, I] in x's dtype, independent from input to input and of the weight; None for a
            fixed input.
        amax: what `kernels.view.amaxes` gives, where it is known or the weight is a shard.

    Returns:
        y and v, [N, O] in x's dtype.

    Raises:
        ValueError: the shapes or dtypes do not match, or no format or noise has the name.
    """
    _check(x, weight, None, bias, u)
    form, law = resolve(fmt), resolve_noise(noise)
    if x.device.type == "cpu" or not in_registers(form, len(x), x.dtype):
        amax_tensor = None if form.block == "channel" else amax
        variances = rounding.variance(weight, form, law=law, amax_tensor=amax_tensor)
        if x.dtype == torch.bfloat16:
            variances = variances.to(x.dtype)
        return variance_linear_given(x, weight, variances, bias, u)
    x, weight, u = (_rows(t) for t in (x, weight, u))
    y, v = x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(weight))
    with on_device(x.device) as arch:
        launch(x, weight, y, v, form, law, bias, u, amax=amax, arch=arch, wrap=wrap_triton)
    return y, v


@triton_op("lotion_fx::variance_linear_given", mutates_args=())
def variance_linear_given(
    x: Tensor, weight: Tensor, variances: Tensor, bias: Tensor | None = None, u: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance of a linear layer whose weight is random, its elements independent and of known variances.

    Args:
        x, weight, bias, u: as in `variance_linear`.
        variances: of the weight, [O, I]; bfloat16 or float32.

    Returns:
        y and v, [N, O] in x's dtype.

    Raises:
        ValueError: the shapes or dtypes do not match.
    """
    _check(x, weight, variances, bias, u)
    if x.device.type == "cpu":
        return reference(x, weight, variances, bias, u)
    x, weight, variances, u = (_rows(t) for t in (x, weight, variances, u))
    y, v = x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(weight))
    with on_device(x.device) as arch:
        launch_given(x, weight, variances, y, v, bias, u, arch=arch, wrap=wrap_triton)
    return y, v


def _rows(t: Tensor | None) -> Any:
    """The tensor with its last dimension contiguous, as the kernels read it."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _check(x: Tensor, weight: Tensor, variances: Tensor | None, bias: Tensor | None, u: Tensor | None) -> None:
    """Raises what `variance_linear` says."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}: expected [N, I] and [O, I]; flatten leading "
            "dimensions of x into N"
        )
    if variances is not None and variances.shape != weight.shape:
        raise ValueError(f"variances is {tuple(variances.shape)}: expected the weight's shape, {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)}: expected [O], {tuple(weight.shape[:1])}")
    if u is not None and (u.shape != x.shape or u.dtype != x.dtype):
        raise ValueError(f"u is {u.dtype} {tuple(u.shape)}: expected that of x, {x.dtype} {tuple(x.shape)}")


def reference(
    x: Tensor, weight: Tensor, variances: Tensor, bias: Tensor | None = None, u: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`variance_linear_given` in ATen, squares in float32 (float64 for a float64 x)."""
    weight = weight.to(x.dtype)
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    dtype = rounding.compute_dtype(x)
    second, variances = x.to(dtype).square(), variances.to(dtype)
    if u is None:
        return y, F.linear(second, variances).to(x.dtype)
    u = u.to(dtype)
    return y, (F.linear(second + u, variances) + F.linear(u, weight.to(dtype).square())).to(x.dtype)


def _configs(*rows: tuple[int, int, int, int, int]) -> tuple[Config, ...]:
    """Candidates: positions, outputs and inputs of a tile, warps, stages."""
    return tuple(
        Config({"BM": bm, "BN": bn, "BK": bk, "GROUP": 8}, warps, stages) for bm, bn, bk, warps, stages in rows
    )


CONFIGS = {
    "registers": {
        "few": _configs((128, 64, 32, 8, 3), (64, 64, 32, 4, 3), (64, 32, 64, 4, 4)),
        "many": _configs((256, 64, 32, 8, 3), (128, 128, 32, 8, 3), (128, 64, 32, 8, 3)),
        "random": _configs((64, 64, 32, 4, 3), (128, 64, 32, 8, 3)),
        "float32": _configs((64, 64, 32, 8, 2)),  # spills: `variance_linear` reads variances instead
    },
    "given": {
        "few": _configs((64, 64, 64, 4, 3), (128, 64, 32, 8, 3), (64, 128, 32, 4, 4)),
        "many": _configs((64, 128, 32, 4, 4), (128, 128, 32, 8, 3), (128, 128, 64, 8, 3)),
        "random": _configs((64, 64, 32, 4, 3), (128, 64, 32, 8, 3), (128, 128, 64, 8, 3)),
        "float32": _configs((64, 64, 16, 8, 3), (64, 64, 16, 4, 3)),
    },
}
