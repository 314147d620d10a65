"""``y = x W^T + b`` with weight and activations of 4 bits: NVFP4 and MXFP4, on Blackwell's block-scaled tensor cores.

    x[m, k] ~ r[m] s_x[m, k // B] q_x[m, k],        W[n, k] = t s_w[n, k // B] q_w[n, k]
    y[m, n] = r[m] t sum_k (s_x q_x) (s_w q_w)

`quantize_rows` rounds each row of ``x`` to nearest as a tensor of its own (``r`` is its scale in NVFP4, else 1), so
that a token's result does not depend on the others in its batch. `scaled_product` multiplies: by ``tcgen05.mma`` on
sm_100 and sm_103, by the block-scaled ``mma.sync`` on sm_120, and elsewhere, on Hopper and before, by decoding both
operands to bfloat16, where ``s q`` is exact, as it is in the block-scaled instructions: the same sum up to its order.

Triton takes block scales of type uint8 as E8M0 in blocks of 32, whatever the block. So only the two pairings that the
hardware has are accepted, E4M3 with 16 and E8M0 with 32, and the kernel gives scales their type itself.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from lotion_fx.kernels import packed_linear
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.device import on_device, target_of
from lotion_fx.kernels.device_code import TWO_LEVEL, block_scale, encode_scale, specialized, template
from lotion_fx.kernels.division import inverse, quotient
from lotion_fx.kernels.e2m1 import nearest_pair
from lotion_fx.kernels.packed import Packed, check, product, step_of, unpack
from lotion_fx.kernels.targets import TARGETS, Target
from lotion_fx.kernels.tiles import absmax, count
from lotion_fx.kernels.tuning import launchable
from lotion_fx.numerics.formats import Format, resolve
from lotion_fx.numerics.rounding import to_blocks

__all__ = ["quantize_rows", "scaled_linear", "scaled_product"]


def supported(fmt: Format) -> Format:
    """The format, if block-scaled instructions have it.

    Raises:
        NotImplementedError: it is not E2M1 with E4M3 scales of 16 or E8M0 scales of 32 weights.
    """

    def pairing(fmt: Format) -> tuple[Any, ...]:
        return fmt.grid, fmt.block, getattr(fmt.law, "type", None)

    if pairing(fmt) not in map(pairing, map(resolve, ("nvfp4", "mxfp4"))):
        raise NotImplementedError(
            f"fmt={fmt.name!r}: expected E2M1 levels with E4M3 scales in blocks of 16 (nvfp4) or with E8M0 scales in "
            "blocks of 32 (mxfp4), the tensor cores' pairings; keep the activations in 16 bits, with packed_linear"
        )
    return fmt


# ---------------------------------------------------------------------------------------------------------- activations


@template
def quantize_rows_kernel(
    x,
    row_scales,
    codes,
    scales,
    K,
    width,
    blocks,
    BLOCK: tl.constexpr,
    E2M1_CVT: tl.constexpr,
    SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * SIZE
    k, byte, block = first + tl.arange(0, SIZE), first // 2 + tl.arange(0, SIZE // 2), tl.arange(0, SIZE // BLOCK)
    block += first // BLOCK
    w = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    w = tl.reshape(w, (SIZE // BLOCK, BLOCK))
    ts = tl.load(row_scales + row)
    s = block_scale(absmax(w), ts)
    tl.store(scales + row * blocks + block[:, None], encode_scale(s), mask=(block < blocks)[:, None])
    s = s * ts if TWO_LEVEL else s
    one_over_p, m, r, t = inverse(s)
    even, odd = tl.split(tl.reshape(quotient(w, one_over_p, m, r, t), (SIZE // 2, 2)))
    tl.store(codes + row * width + byte, nearest_pair(even, odd, E2M1_CVT), mask=byte < width)


def row_scales(x: Tensor, fmt: Format) -> Tensor:
    """Each row's tensor scale, float32 [M]; 1 where the format has none."""
    if not fmt.law.two_level:
        return x.new_ones(x.shape[0], dtype=torch.float32)
    scale = fmt.law.tensor_scale(x.abs().amax(-1).float(), fmt.grid)
    assert scale is not None
    return scale


def _encoded_rows(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor, Tensor]:
    """The reference, by the methods of the format."""
    of_rows = row_scales(x, fmt)
    blocks, ts = to_blocks(x.float(), fmt), of_rows[:, None, None]
    s = fmt.law.block_scale(blocks.abs().amax(-1, keepdim=True), fmt.grid, ts)
    codes = fmt.grid.encode(fmt.grid.nearest(blocks / (s * ts))).flatten(1)[:, : x.shape[1] + x.shape[1] % 2]
    return codes[:, ::2] | codes[:, 1::2] << 4, getattr(fmt.law, "type").encode(s.squeeze(-1)), of_rows  # noqa: B009


@triton_op("lotion_fx::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    """Each row rounded to nearest, as a tensor of its own.

    Args:
        x: [M, K]; bfloat16, float16 or float32.
        fmt: the name of a format that is `supported`.

    Returns:
        Codes, uint8 [M, ceil(K/2)], the low nibble being the even element; block scales' bits, uint8 [M, blocks]; the
        rows' scales, float32 [M], 1 in formats of one level.
    """
    format = supported(resolve(fmt))
    if x.device.type == "cpu":
        return _encoded_rows(x, format)
    with on_device(x.device):
        return launch_rows(x, format)


def launch_rows(
    x: Tensor, fmt: Format, *, e2m1_cvt: bool | None = None, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the kernel where ``x`` is.

    Args:
        e2m1_cvt: whether to use the hardware's conversion to E2M1; by default if it is there.
        config: the tile; the tuning table's choice if None.
    """
    (rows, features), target = x.shape, _target(x)
    converts = target.supports("e2m1") if e2m1_cvt is None else e2m1_cvt
    codes = x.new_empty((rows, -(-features // 2)), dtype=torch.uint8)
    scales = x.new_empty((rows, -(-features // int(fmt.block))), dtype=torch.uint8)
    of_rows = row_scales(x, fmt)
    if x.numel():
        names, kernel = ("scaled_linear/rows", fmt.name), specialized(quantize_rows_kernel, fmt)
        kernel, chosen = launchable(kernel, *names, target.arch, ROW_CONFIGS, config=config, key=("K",))
        wrap_triton(kernel)[lambda meta: (rows, triton.cdiv(features, meta["SIZE"]))](
            x.contiguous(),
            of_rows,
            codes,
            scales,
            features,
            codes.shape[1],
            scales.shape[1],
            BLOCK=fmt.block,
            E2M1_CVT=converts,
            **chosen,
        )
    return codes, scales, of_rows


def _target(x: Tensor) -> Target:
    """The target of a tensor's device; in the interpreter, on a CPU, the oldest."""
    return target_of(x.device) if x.is_cuda else TARGETS[min(TARGETS)]


# -------------------------------------------------------------------------------------------------------------- product


@triton.jit
def operand(codes, scales, rows, exists, start, width, blocks, BLOCK: tl.constexpr, BK: tl.constexpr):
    """A tile's codes [rows, BK/2] and stored scales [rows, BK/BLOCK], 0 where there is none."""
    byte, block = start // 2 + tl.arange(0, BK // 2), start // BLOCK + tl.arange(0, BK // BLOCK)
    exists, rows = exists[:, None], rows.to(tl.int64)[:, None]
    code = tl.load(codes + rows * width + byte[None], mask=exists & (byte < width)[None], other=0)
    return code, tl.load(scales + rows * blocks + block[None], mask=exists & (block < blocks)[None], other=0)


@triton.jit
def scaled_product_kernel(
    x_codes,
    x_scales,
    row_scales,
    codes,
    scales,
    tensor_scale,
    bias,
    y,
    M,
    N,
    width,
    blocks,
    BLOCK: tl.constexpr,
    E4M3: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    pm, pn = tl.swizzle2d(tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n, tiles_m, tiles_n, 8)
    m, n = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    in_m, in_n = m < M, n < N
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, width * 2, BK):
        left, left_scale = operand(x_codes, x_scales, m, in_m, start, width, blocks, BLOCK, BK)
        right, right_scale = operand(codes, scales, n, in_n, start, width, blocks, BLOCK, BK)
        if E4M3:  # as uint8 they would be taken for E8M0, in blocks of 32
            left_scale = left_scale.to(tl.float8e4nv, bitcast=True)
            right_scale = right_scale.to(tl.float8e4nv, bitcast=True)
        total = tl.dot_scaled(left, left_scale, "e2m1", tl.trans(right), right_scale, "e2m1", total)
    total *= tl.load(row_scales + m, mask=in_m, other=0.0)[:, None]
    if tensor_scale is not None:
        total *= tl.load(tensor_scale)
    if bias is not None:
        total += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None]
    inside = in_m[:, None] & in_n[None]
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None], total.to(y.dtype.element_ty), mask=inside)


def block_scaled(target: Target) -> bool:
    """Whether an architecture has block-scaled matrix products."""
    return target.supports("tcgen05") or target.supports("omma")


# The first of each is launched where the tuning table has none.
ROW_CONFIGS = (Config({"SIZE": 1024}, 4, 1), Config({"SIZE": 2048}, 4, 1))
# ``tcgen05.mma`` takes tiles of 128 rows; smaller ones, and Triton decodes them.
_TCGEN05 = (
    Config({"BM": 128, "BN": 128, "BK": 256}, 4, 3),
    Config({"BM": 128, "BN": 64, "BK": 256}, 4, 3),
    Config({"BM": 128, "BN": 256, "BK": 128}, 8, 3),
)
_OMMA = (
    Config({"BM": 64, "BN": 64, "BK": 128}, 4, 3),
    Config({"BM": 64, "BN": 64, "BK": 256}, 4, 2),
    Config({"BM": 64, "BN": 128, "BK": 128}, 4, 3),
)


def candidates(target: Target) -> tuple[Config, ...]:
    """The tiles to choose among on an architecture with block-scaled products; none of them spills."""
    return _TCGEN05 if target.supports("tcgen05") else _OMMA


def classified(fmt: Format, rows: int) -> tuple[str, str]:
    """The names of the kernel and of the shape's class in the tuning table."""
    return f"scaled_linear/product_{fmt.block}", step_of(rows)


@triton_op("lotion_fx::scaled_product", mutates_args=())
def scaled_product(
    x_codes: Tensor,
    x_scales: Tensor,
    row_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    fmt: str,
    dtype: torch.dtype,
) -> Tensor:
    """``y = x W^T + b`` of activations and a weight in one format.

    Args:
        x_codes, x_scales, row_scales: what `quantize_rows` returns for ``x`` [M, K].
        codes: uint8 [N, ceil(K/2)], the low nibble being the even element.
        scales: uint8 [N, blocks], bits of E4M3 or E8M0.
        tensor_scale: float32, one element, for two-level formats, else None.
        bias: [N] or None.
        fmt: the name of a format that is `supported`.
        dtype: of the result.

    Returns:
        [M, N].

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    format = supported(resolve(fmt))
    features = 2 * x_codes.shape[1]
    check(features, codes, scales, tensor_scale, bias, format)
    if x_codes.device.type == "cpu":
        left = unpack(Packed(x_codes, x_scales, row_scales[:, None]), format, features)
        return product(left, unpack(Packed(codes, scales, tensor_scale), format, features), bias).to(dtype)
    packed = codes, scales, tensor_scale, bias, format
    with on_device(x_codes.device):
        if block_scaled(target_of(x_codes.device)):
            return launch_product(x_codes, x_scales, row_scales, *packed, dtype)
        x = decoded_rows(x_codes, x_scales, format)
        return packed_linear.launch(x, *packed, row_scales=row_scales, dtype=dtype)


def decoded_rows(codes: Tensor, scales: Tensor, fmt: Format) -> Tensor:
    """Levels times block scales, without the rows' scales: bfloat16, exactly."""
    return unpack(Packed(codes, scales, None), fmt, 2 * codes.shape[1]).bfloat16()


def launch_product(
    x_codes: Tensor,
    x_scales: Tensor,
    row_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    fmt: Format,
    dtype: torch.dtype,
    *,
    config: Config | None = None,
) -> Tensor:
    """Runs the block-scaled kernel where the tensors are: `scaled_product`.

    Args:
        config: the tile; the tuning table's choice if None.
    """
    fmt = supported(fmt)
    (rows, width), outputs = x_codes.shape, codes.shape[0]
    target = target_of(x_codes.device) if x_codes.is_cuda else TARGETS[120]
    y = x_codes.new_empty((rows, outputs), dtype=dtype)
    if y.numel():
        names, key = classified(fmt, rows), ("M", "N", "width")
        kernel, chosen = launchable(
            scaled_product_kernel, *names, target.arch, candidates(target), config=config, key=key
        )
        wrap_triton(kernel)[lambda meta: (count(rows, outputs, meta),)](
            x_codes,
            x_scales,
            row_scales,
            codes,
            scales,
            tensor_scale,
            bias,
            y,
            rows,
            outputs,
            width,
            x_scales.shape[1],
            BLOCK=fmt.block,
            E4M3=fmt.law.two_level,
            **chosen,
        )
    return y


def scaled_linear(
    x: Tensor, codes: Tensor, scales: Tensor, tensor_scale: Tensor | None, bias: Tensor | None, fmt: str
) -> Tensor:
    """``y = x W^T + b`` with ``x`` rounded to the weight's format; arguments and result as for `packed_linear`."""
    rows = quantize_rows(x.reshape(-1, x.shape[-1]), fmt)
    y = scaled_product(*rows, codes, scales, tensor_scale, bias, fmt, x.dtype)
    return y.reshape(*x.shape[:-1], codes.shape[0])
