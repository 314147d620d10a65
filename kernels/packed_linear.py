"""``y = x W^T + b`` on a packed weight, decoded inside of the product: W4A16 and W8A16, on every architecture.

With ``q`` the levels that the codes stand for, ``s`` the scales of blocks of ``B`` along ``k`` and ``t`` the tensor's:

    y[m, n] = t sum_k x[m, k] (q[n, k] s[n, k // B])        where the weight takes the scale ("weight")
    y[m, n] = sum_b s[n, b] sum_{k in b} x[m, k] q[n, k]    where a block's partial sum does ("block")
    y[m, n] = s[n] sum_k x[m, k] q[n, k]                    where the sum does: one scale a channel or a tensor ("sum")

What the tensor cores multiply, ``q s`` or ``q``, is exact in ``x``'s dtype in all three, so that nothing is rounded but
the float32 sum and the result. That decides between them: an E2M1 level times an E4M3 scale has 6 significant bits and
fits bfloat16 and float16, an E8M0 scale fits bfloat16's exponent but not float16's, a float32 scale fits neither. (A
dequantized bfloat16 weight, which other kernels multiply, is a rounding away from the trained one.)

Bits are decoded by integer shifts: Ampere has no type for them. Patterns that no format encodes, E4M3's NaN for one,
are not looked for. The codes' layout is that of `lotion_fx.kernels.pack`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from lotion_fx.kernels.config import Config
from lotion_fx.kernels.device import on_device, target_of
from lotion_fx.kernels.packed import FEW, Packed, check, product, step_of, unpack
from lotion_fx.kernels.targets import TARGETS
from lotion_fx.kernels.tiles import count
from lotion_fx.kernels.tuning import launchable
from lotion_fx.numerics.formats import Format, resolve
from lotion_fx.numerics.grids import Integer, Minifloat
from lotion_fx.numerics.scales import PowerOfTwo

__all__ = ["launch", "packed_linear"]


# ------------------------------------------------------------------------------------------------------------- decoding


@triton.jit
def fields(word, T: tl.constexpr, LANES: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr):
    """The bits of ``T``s made from codes, in a uint32 that holds one code in its low bits, or two in its halves'.

    A small float's sign and magnitude move to where ``T`` has them. The value, subnormals included, is then a power of
    two too small (the biases differ), which the caller makes good. An integer (``MANTISSA`` -1) is written into the
    mantissa of a ``2^m``.

    Args:
        LANES: 1, or 0x00010001 for two codes.
    """
    M: tl.constexpr = T.fp_mantissa_width
    if MANTISSA < 0:
        CODE: tl.constexpr = LANES * (2**BITS - 1)
        POWER: tl.constexpr = LANES * ((T.exponent_bias + M) << M)
        return (word & CODE) | POWER
    else:
        SIGN: tl.constexpr = LANES << (T.primitive_bitwidth - 1)
        MAGNITUDE: tl.constexpr = LANES * (2 ** (BITS - 1) - 1) << (M - MANTISSA)
        return ((word << (T.primitive_bitwidth - BITS)) & SIGN) | ((word << (M - MANTISSA)) & MAGNITUDE)


@triton.jit
def as_float(bits, T: tl.constexpr):
    """The ``T``s whose bits lie in the low bits of integers."""
    return bits.to(tl.uint16 if T.primitive_bitwidth == 16 else tl.uint32).to(T, bitcast=True)


@triton.jit
def levels(byte, T: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, BK: tl.constexpr):
    """The levels [rows, BK] that bytes of one or two codes hold; minifloats a power of two too small (see `fields`)."""
    # Integers of more bits than T's mantissa has go through float32.
    V: tl.constexpr = tl.float32 if MANTISSA < 0 and T.fp_mantissa_width < BITS else T
    if BITS <= 4 and V.primitive_bitwidth == 16:
        # Both codes of a byte at once, the low one in the low half of a register: half of the work.
        bits = fields(byte.to(tl.uint32) * 0x1001, V, 0x00010001, BITS, MANTISSA)
        value = tl.reshape(tl.join(as_float(bits, V), as_float(bits >> 16, V)), (byte.shape[0], BK))
    else:
        code = tl.reshape(tl.join(byte & 15, byte >> 4), (byte.shape[0], BK)) if BITS <= 4 else byte
        value = as_float(fields(code.to(tl.uint32), V, 1, BITS, MANTISSA), V)
    if MANTISSA < 0:
        SHIFT: tl.constexpr = 2.0**V.fp_mantissa_width + 2.0 ** (BITS - 1)
        value = (value - SHIFT).to(T)
    return value


@triton.jit
def decoded_scale(stored, T: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr):
    """A stored block scale as a ``T``: float32 (``BITS`` 32), E8M0 (``MANTISSA`` -1) or a small float."""
    if BITS == 32:
        return stored
    elif MANTISSA < 0:
        # Where T has an exponent of 8 bits. Code 0, 2^-127, is a subnormal there.
        code = stored.to(tl.uint32)
        return as_float(tl.where(code == 0, 1 << (T.fp_mantissa_width - 1), code << T.fp_mantissa_width), T)
    else:
        BIAS: tl.constexpr = 2 ** (BITS - MANTISSA - 2) - 1
        return as_float(fields(stored.to(tl.uint32), T, 1, BITS, MANTISSA), T) * 2.0 ** (T.exponent_bias - BIAS)


@triton.jit
def scaled_levels(
    byte, stored, T: tl.constexpr, LEVEL_BITS: tl.constexpr, LEVEL_MANTISSA: tl.constexpr, LEVEL_EXPONENT: tl.constexpr,
    SCALE_BITS: tl.constexpr, SCALE_MANTISSA: tl.constexpr, SCALE_EXPONENT: tl.constexpr, BLOCK: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Levels times their blocks' scales [BN, BK], from codes and from stored scales [BN, BK/BLOCK]."""
    level = levels(byte, T, LEVEL_BITS, LEVEL_MANTISSA, BK)
    if LEVEL_EXPONENT:
        level *= 2.0**LEVEL_EXPONENT
    scale = decoded_scale(stored, T, SCALE_BITS, SCALE_MANTISSA)
    if SCALE_EXPONENT:
        scale *= 2.0**SCALE_EXPONENT
    blocks = tl.reshape(level, (level.shape[0], BK // BLOCK, BLOCK))
    return tl.reshape(blocks * scale[:, :, None], (level.shape[0], BK))


# --------------------------------------------------------------------------------------------------------------- kernel

CHUNK = tl.constexpr(1024)  # what a split sum is split into; a multiple of any tile and block


# `chunks`: of K that one program adds up.
@triton.jit
def packed_linear_kernel(
    x, codes, scales, tensor_scale, row_scales, bias, y,
    M, N, K, code_width, scale_width, chunks,
    LEVEL_BITS: tl.constexpr, LEVEL_MANTISSA: tl.constexpr, LEVEL_EXPONENT: tl.constexpr,
    SCALE_BITS: tl.constexpr, SCALE_MANTISSA: tl.constexpr, SCALE_EXPONENT: tl.constexpr,
    SUM_EXPONENT: tl.constexpr, BLOCK: tl.constexpr, PLACE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = x.dtype.element_ty
    PER_BYTE: tl.constexpr = 2 if LEVEL_BITS <= 4 else 1
    # Consecutive programs take a square of tiles, whose operands stay in the second-level cache.
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    pm, pn = tl.swizzle2d(tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n, tiles_m, tiles_n, 8)
    m, n = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    in_m, in_n = m < M, n < N
    x_rows = x + m.to(tl.int64)[:, None] * K
    code_rows = codes + n.to(tl.int64)[:, None] * code_width
    scale_rows = scales + n.to(tl.int64) * scale_width
    total = tl.zeros((BM, BN), tl.float32)
    # A multiple of CHUNK, as the compiler can see: else it would load a block's scale at a time.
    first = tl.program_id(1) * chunks * CHUNK
    for start in range(first, tl.minimum(first + chunks * CHUNK, K), BK):
        k = start + tl.arange(0, BK)
        # Bounded by the row's width rather than by K: a multiple of 16 stays one, which makes the loads wide. What is
        # decoded past K is finite and meets a zero.
        byte = start // PER_BYTE + tl.arange(0, BK // PER_BYTE)
        activation = tl.load(x_rows + k[None], mask=in_m[:, None] & (k < K)[None], other=0.0)
        code = tl.load(code_rows + byte[None], mask=in_n[:, None] & (byte < code_width)[None], other=0)
        if PLACE == "weight":
            b = start // BLOCK + tl.arange(0, BK // BLOCK)
            stored = tl.load(scale_rows[:, None] + b[None], mask=in_n[:, None] & (b < scale_width)[None], other=0)
            weight = scaled_levels(
                code, stored, T, LEVEL_BITS, LEVEL_MANTISSA, LEVEL_EXPONENT, SCALE_BITS, SCALE_MANTISSA, SCALE_EXPONENT,
                BLOCK, BK)  # fmt: skip
        else:
            weight = levels(code, T, LEVEL_BITS, LEVEL_MANTISSA, BK)
            if LEVEL_EXPONENT:
                weight *= 2.0**LEVEL_EXPONENT
        if PLACE == "block":
            stored = tl.load(scale_rows + start // BLOCK, mask=in_n, other=0)
            scale = decoded_scale(stored, tl.float32, SCALE_BITS, SCALE_MANTISSA)
            total += tl.dot(activation, tl.trans(weight), input_precision="ieee") * scale[None]
        else:
            total = tl.dot(activation, tl.trans(weight), total, input_precision="ieee")
    if PLACE == "sum":
        stored = tl.load(scale_rows, mask=in_n, other=0)
        total *= decoded_scale(stored, tl.float32, SCALE_BITS, SCALE_MANTISSA)[None]
    if SUM_EXPONENT:
        total *= 2.0**SUM_EXPONENT
    if tensor_scale is not None:
        total *= tl.load(tensor_scale)
    if row_scales is not None:
        total *= tl.load(row_scales + m, mask=in_m, other=0.0)[:, None]
    if bias is not None:
        total += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None]
    row = tl.program_id(1) * M + m.to(tl.int64)
    tl.store(y + row[:, None] * N + n[None], total.to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None])


# --------------------------------------------------------------------------------------------------- a format's numbers


def place(fmt: Format, dtype: torch.dtype) -> str:
    """What a block's scale multiplies: the "weight", the "block"'s partial sum or the "sum" (see the module)."""
    stored = getattr(fmt.law, "type", None)
    if not isinstance(fmt.block, int):
        return "sum"
    if fmt.block > _LONGEST:
        return "block"
    if isinstance(stored, PowerOfTwo):
        return "weight" if dtype != torch.float16 else "block"
    if isinstance(stored, Minifloat) and isinstance(fmt.grid, Minifloat) and _products_fit(fmt.grid, stored, dtype):
        return "weight"
    return "block"


_LONGEST = 128  # of the blocks that a tile holds whole


def _products_fit(level: Minifloat, scale: Minifloat, dtype: torch.dtype) -> bool:
    """Whether a dtype holds the product of any level and scale, taken down by what `_exponents` leaves to the sum."""
    limits, down = torch.finfo(dtype), 2.0 ** -_exponents(level, scale, dtype)[2]
    return (
        2.0 ** -(level.mantissa_bits + scale.mantissa_bits + 1) >= limits.eps
        and level.max * scale.max * down <= limits.max
        and level.smallest * scale.smallest * down >= limits.smallest_normal * limits.eps
    )


def _exponents(level: Minifloat, scale: Minifloat | None, dtype: torch.dtype) -> tuple[int, int, int]:
    """How the power of two that decoded levels lack is shared out: to the level, to the block's scale, to the sum.

    A scale in the dtype takes what it can hold, which spares a product a weight; the sum takes the rest.
    """
    limits = torch.finfo(dtype)
    lacking = 1 - round(math.log2(limits.smallest_normal)) - level.bias
    if scale is None:
        return lacking, 0, 0
    held = min(lacking, math.floor(math.log2(limits.max / scale.max)))
    return 0, held, lacking - held


def constants(fmt: Format, dtype: torch.dtype) -> dict[str, Any]:
    """The kernel's ``tl.constexpr`` arguments that a format and the activations' dtype decide.

    Raises:
        NotImplementedError: the levels are a codebook, or blocks are not a power of two of 16 or more weights.
    """
    grid, stored, where = fmt.grid, getattr(fmt.law, "type", None), place(fmt, dtype)
    block = fmt.block if isinstance(fmt.block, int) else 0
    if block & (block - 1) or 0 < block < 16:
        raise NotImplementedError(
            f"fmt={fmt.name!r}: expected blocks of 16, 32, 64, ... weights, got {block}; dequantize"
        )
    scale = stored if isinstance(stored, Minifloat) else None
    if isinstance(grid, Minifloat):
        mantissa = grid.mantissa_bits
        exponents = _exponents(grid, scale if where == "weight" else None, dtype)
    elif isinstance(grid, Integer):
        mantissa, exponents = -1, (0, 0, 0)
    else:
        raise NotImplementedError(f"fmt={fmt.name!r}: expected integer or minifloat levels, got {grid!r}; dequantize")
    return {
        "LEVEL_BITS": grid.bits,
        "LEVEL_MANTISSA": mantissa,
        "LEVEL_EXPONENT": exponents[0],
        "SCALE_BITS": 32 if stored is None else fmt.law.bits,
        "SCALE_MANTISSA": scale.mantissa_bits if scale else -1,
        "SCALE_EXPONENT": exponents[1],
        "SUM_EXPONENT": exponents[2],
        "BLOCK": block,
        "PLACE": where,
    }


# ------------------------------------------------------------------------------------------------------------ launching

_DECODE = (Config({"BM": 16, "BN": 32, "BK": 128}, 2, 4), Config({"BM": 16, "BN": 64, "BK": 128}, 4, 4))
_PREFILL = (Config({"BM": 64, "BN": 128, "BK": 64}, 4, 3), Config({"BM": 64, "BN": 128, "BK": 128}, 4, 2))
# Where products read their operands from shared memory and not from registers, a tile can be larger before it spills.
_PREFILL_FROM_SHARED = (
    _PREFILL[0],
    Config({"BM": 128, "BN": 128, "BK": 128}, 8, 2),
    Config({"BM": 128, "BN": 256, "BK": 64}, 8, 3),
)
FROM_SHARED = (90, 100, 103)


def candidates(where: Mapping[str, Any], rows: int, arch: int) -> tuple[Config, ...]:
    """The tiles to choose among for so many rows of ``x``; none of them spills.

    Args:
        where: the `constants` of the format.
    """
    block, blockwise = where["BLOCK"], where["PLACE"] == "block"
    prefill: tuple[Config, ...] = _PREFILL[:1] if where["LEVEL_BITS"] > 4 else _PREFILL
    if arch in FROM_SHARED and not blockwise:
        prefill = _PREFILL_FROM_SHARED
    listed = _DECODE if rows <= FEW else prefill

    def fitted(depth: int) -> int:
        # A block holds whole tiles, or a tile whole blocks.
        return min(depth, block) if blockwise else max(depth, block)

    return tuple(replace(c, constants={**c.constants, "BK": fitted(c.constants["BK"])}) for c in listed)


def classified(where: Mapping[str, Any], rows: int) -> tuple[str, str]:
    """The names of the kernel and of the shape's class in the tuning table."""
    block = where["BLOCK"] if where["PLACE"] == "block" else ""
    return f"packed_linear/{where['PLACE']}{block}x{where['LEVEL_BITS']}", step_of(rows)


def launch(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    fmt: Format,
    *,
    row_scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> Tensor:
    """Runs the kernel where the tensors are: `packed_linear` for ``x`` [M, K].

    Args:
        row_scales: float32 [M], what each row of the result is multiplied by before the bias.
        dtype: of the result; ``x``'s if None.
        config: the tile; the tuning table's choice if None.
    """
    (rows, features), outputs = x.shape, codes.shape[0]
    dtype, chunks = dtype or x.dtype, chunks_of(rows, outputs, features)
    parts = triton.cdiv(features, chunks * CHUNK.value)
    y = x.new_empty((parts, rows, outputs), dtype=dtype if parts == 1 else torch.float32)
    if y.numel() == 0:
        return y.new_empty((rows, outputs), dtype=dtype)
    where = constants(fmt, x.dtype)
    arch = target_of(x.device).arch if x.is_cuda else min(TARGETS)
    names, tried = classified(where, rows), candidates(where, rows, arch)
    kernel, chosen = launchable(packed_linear_kernel, *names, arch, tried, config=config, key=("M", "N", "K"))
    wrap_triton(kernel)[lambda meta: (count(rows, outputs, meta), parts)](
        x.contiguous(),
        codes,
        scales,
        tensor_scale,
        row_scales,
        bias if parts == 1 else None,
        y,
        rows,
        outputs,
        features,
        codes.shape[1],
        0 if fmt.block == "tensor" else scales.shape[1],
        chunks,
        **where,
        **chosen,
    )
    if parts == 1:
        return y.view(rows, outputs)
    total = y.sum(0)
    return (total if bias is None else total + bias).to(dtype)


def chunks_of(rows: int, outputs: int, features: int) -> int:
    """How many chunks of K one program adds up: all, but for a few rows and so few outputs that devices would idle.

    Then K is split until there are 512 programs, or a chunk for each; their sums are added after the kernel.
    """
    chunks = triton.cdiv(features, CHUNK.value)
    split = min(512 // triton.cdiv(outputs, 32), chunks) if rows <= FEW else 1
    return triton.cdiv(chunks, max(split, 1))


@triton_op("lotion_fx::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor, codes: Tensor, scales: Tensor, tensor_scale: Tensor | None, bias: Tensor | None, fmt: str
) -> Tensor:
    """``y = x W^T + b`` for a packed ``W`` [N, K].

    Args:
        x: activations [..., K]; bfloat16, float16 or float32.
        codes: uint8 [N, ceil(K/2)] for formats of up to 4 bits, the low nibble being the even element, else [N, K].
        scales: of blocks, [N, blocks], or of the tensor, [1]: uint8 bits of E4M3 or E8M0, or float32.
        tensor_scale: float32, one element: of two-level formats, else None.
        bias: [N] or None.
        fmt: the format's name.

    Returns:
        [..., N] in ``x``'s dtype.

    Raises:
        ValueError: a shape or a dtype is not the format's.
        NotImplementedError: on a device, the levels are a codebook or the blocks no power of two of 16 or more.
    """
    format = resolve(fmt)
    check(x.shape[-1], codes, scales, tensor_scale, bias, format)
    if x.device.type == "cpu":
        return product(x, unpack(Packed(codes, scales, tensor_scale), format, x.shape[-1]), bias)
    with on_device(x.device):
        y = launch(x.reshape(-1, x.shape[-1]), codes, scales, tensor_scale, bias, format)
    return y.reshape(*x.shape[:-1], codes.shape[0])
