"""A linear layer's weight gradient and its curvature from one read of both operands.

Over positions n, with the output's gradient g [N, O] and the input x [N, I], and up to the factor T,

    gradient    sum_n g_n x_n^T                   [O, I]
    curvature   h = sum_n g_n^2 (x_n^2)^T         [O, I]

A program makes one tile of the gradient and of h in two float32 accumulators; the squares are made in registers of the
tiles that the gradient's product reads. Every value is summed by one program in a fixed order, without atomics: results
are deterministic.

How exact: the gradient is the dtype's own product with a float32 sum. h's squares are rounded to the type of their
product, of bfloat16 to bfloat16 and of float16 to TF32, each by half a unit in the last place of the operands' dtype.
As all summands are positive, h is within one such unit, 2^-7 or 2^-10 of it, whatever the sum; the graph's own form
rounds the sum to bfloat16 as well. Float32 products follow `torch.get_float32_matmul_precision`: IEEE for "highest",
else TF32.

Source: LOTION, Kwun et al. 2025, arXiv 2510.08757, for what h is for; the contraction of squares is this project's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from lotion_fx.kernels.config import Config
from lotion_fx.kernels.device import on_device
from lotion_fx.kernels.operands import precisions, square
from lotion_fx.kernels.tiles import count, load, place, store
from lotion_fx.kernels.tuning import launchable
from lotion_fx.numerics.rounding import compute_dtype


@triton.jit
def _load_g(g, first, k, m, stride, positions, outputs, TRANSPOSE: tl.constexpr):
    """A tile of g: [BK, BM] as it lies in memory where TRANSPOSE, else [BM, BK]."""
    if TRANSPOSE:
        tile = load(g, first, k[:, None], m[None, :], stride, positions, outputs)
    else:
        tile = load(g, first, k[None, :], m[:, None], stride, positions, outputs)
    return tile


@triton.jit
def _left(tile, TRANSPOSE: tl.constexpr):
    """A tile of g as a product's left operand [BM, BK].

    Fifth-generation tensor cores otherwise take squares from tensor memory, which then has no room for large tiles;
    older ones do not copy asynchronously what is transposed.
    """
    if TRANSPOSE:
        tile = tl.trans(tile)
    return tile


@triton.jit
def curvature_kernel(
    g,
    x,
    gradient,
    curvature,
    positions,
    outputs,
    inputs,
    g_stride,
    x_stride,
    PRECISION: tl.constexpr,
    SQUARES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    TRANSPOSE: tl.constexpr,
):
    row, column = place(tl.cdiv(outputs, BM), tl.cdiv(inputs, BN), GROUP)
    m, n, k = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN), tl.arange(0, BK)
    sum_gx, sum_h = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)

    for i in range(tl.cdiv(positions, BK)):
        first = i * BK
        tile_g = _load_g(g, first, k, m, g_stride, positions, outputs, TRANSPOSE)
        tile_x = load(x, first, k[:, None], n[None, :], x_stride, positions, inputs)
        sum_gx = tl.dot(_left(tile_g, TRANSPOSE), tile_x, sum_gx, input_precision=PRECISION)
        square_g = _left(square(tile_g, SQUARES), TRANSPOSE)
        sum_h = tl.dot(square_g, square(tile_x, SQUARES), sum_h, input_precision=SQUARES)

    down, across = tl.arange(0, BM)[:, None], n[None, :]
    store(gradient, row * BM, down, across, outputs, inputs, sum_gx)
    store(curvature, row * BM, down, across, outputs, inputs, sum_h)


def shape_class(outputs: int, inputs: int, dtype: torch.dtype, precision: str) -> str:
    """The row of the tuning table: how products are made, and whether there are few tiles.

    Args:
        precision: the first of `precisions`.
    """
    if dtype == torch.float32:
        return precision
    return "small" if outputs * inputs <= SMALL else "large"


SMALL = 2**22  # weights; below it 128 x 128 tiles would not fill every multiprocessor twice


def launch(
    g: Tensor,
    x: Tensor,
    gradient: Tensor,
    curvature: Tensor,
    *,
    arch: int,
    config: Config | None = None,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> None:
    """Runs the kernel where the tensors are.

    Args:
        g, x: as in `curvature_linear`, the operands' last dimension contiguous.
        gradient, curvature: the outputs, contiguous; overwritten.
        arch: compute capability of the device, 80 for ``sm_80``.
        config: one of `CONFIGS`; by default the tuning table's choice.
        wrap: `torch.library.wrap_triton` inside a `triton_op`.
    """
    (positions, outputs), inputs = g.shape, x.shape[1]
    precision, squares = precisions(g.dtype)
    row = shape_class(outputs, inputs, g.dtype, precision)
    key = ("positions", "outputs", "inputs")
    kernel, tile = launchable(curvature_kernel, "curvature/full", row, arch, CONFIGS[row], config=config, key=key)
    wrap(kernel)[lambda meta: (count(outputs, inputs, meta),)](
        g,
        x,
        gradient,
        curvature,
        positions,
        outputs,
        inputs,
        g.stride(0),
        x.stride(0),
        PRECISION=precision,
        SQUARES=squares,
        **tile,
    )


@triton_op("lotion_fx::curvature_linear", mutates_args=())
def curvature_linear(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of a linear layer's weight and its curvature, without the factor T.

    Args:
        g: gradient of the loss with respect to the output, [N, O]; bfloat16, float16 or float32.
        x: the input, [N, I], of the same dtype.

    Returns:
        The gradient g^T x [O, I] in g's dtype; and h [O, I] in float32.

    Raises:
        ValueError: the shapes or dtypes do not match.
    """
    _check(g, x)
    if g.device.type == "cpu":
        return reference(g, x)
    g, x = (t if t.stride(1) == 1 else t.contiguous() for t in (g, x))
    gradient = g.new_empty(g.shape[1], x.shape[1])
    curvature = torch.empty_like(gradient, dtype=torch.float32)
    with on_device(g.device) as arch:
        launch(g, x, gradient, curvature, arch=arch, wrap=wrap_triton)
    return gradient, curvature


def _check(g: Tensor, x: Tensor) -> None:
    """Raises what `curvature_linear` says."""
    if g.dim() != 2 or x.dim() != 2 or g.shape[0] != x.shape[0] or g.dtype != x.dtype:
        raise ValueError(
            f"g is {g.dtype} {tuple(g.shape)} and x {x.dtype} {tuple(x.shape)}: expected [N, O] and [N, I] of one "
            "dtype; flatten leading dimensions into N"
        )


def reference(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """`curvature_linear` in ATen, squares in float32 (float64 for float64 operands)."""
    gradient = g.t() @ x
    g, x = (t.to(compute_dtype(t)).square() for t in (g, x))
    return gradient, g.t() @ x


def _configs(*rows: tuple[int, int, int, int, int, int]) -> tuple[Config, ...]:
    """Candidates: rows, columns and positions of a tile, whether it is transposed, warps, stages."""
    names = ("BM", "BN", "BK", "TRANSPOSE")
    return tuple(
        Config({**dict(zip(names, sizes, strict=True)), "GROUP": 8}, warps, stages) for *sizes, warps, stages in rows
    )


_LARGE = _configs(
    (64, 128, 32, 0, 4, 4),
    (128, 64, 64, 0, 4, 4),
    (128, 128, 64, 0, 8, 4),
    (128, 128, 32, 0, 8, 3),
    (256, 128, 32, 1, 8, 3),
)
CONFIGS = {
    "large": _LARGE,
    "small": _configs((64, 128, 32, 0, 4, 4), (64, 64, 64, 0, 4, 4), (64, 128, 64, 0, 4, 3)),
    "tf32": _configs((64, 64, 32, 0, 4, 3), (128, 64, 32, 0, 8, 3)),
    "ieee": _configs((64, 64, 16, 0, 4, 3), (64, 64, 16, 0, 8, 3), (64, 128, 16, 0, 8, 3)),
}
