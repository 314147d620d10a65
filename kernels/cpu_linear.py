"""``y = x W^T + b`` on a weight packed in 4-bit codes, on a CPU: what a step of decoding waits for is memory.

With ``q`` the levels that codes stand for, ``s`` the scales of blocks of ``B`` along ``k``, ``t`` the tensor's:

    w[n, k] = round(q[n, k] (s[n, k // B] t))     to x's dtype: the dequantized weight, bit for bit
    y[m, n] = sum_k x[m, k] w[n, k] + b[n]        in float32, rounded once

A block has at most 16 different weights, so ``w`` is a table of 16 made once a block, out of which codes pick: any
levels of up to 4 bits, any even block. (With AVX-512, where nothing is rounded, `s t` multiplies sums of eight products
``x q`` instead.) AVX-512, AVX2 or neither, as the processor has it (``cpu_linear.cpp``). Of many rows a product is
bound by arithmetic: the weight is dequantized once into a workspace, and torch multiplies.

The codes' layout is that of `lotion_fx.kernels.pack`.
"""

from __future__ import annotations

import ctypes
import math
import struct
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lotion_fx.kernels.cpu_build import library
from lotion_fx.kernels.packed import FEW, Packed, in_pairs, unpack
from lotion_fx.numerics.formats import Format, resolve
from lotion_fx.numerics.grids import SMALLEST_SCALE, Minifloat
from lotion_fx.numerics.scales import PowerOfTwo, TwoLevelScale

_KINDS = {torch.uint8: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # as cpu_linear.cpp numbers them
_BITS = {torch.int32: 4, torch.int16: 2}  # integers that are the bits of floats, and their bytes
_CODES: dict[object, int] = {
    Minifloat(4, 3, 448.0): 4,
    PowerOfTwo(): 5,
}  # scale types with a loop of their own there; others by a table
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALONE = 1 << 15  # weights up to which waking other threads costs more than they save
WIDEST = 2  # the instructions that may be used: 0 scalar, 1 AVX2, 2 AVX-512


class _Weight(ctypes.Structure):
    """`Weight` of cpu_linear.cpp."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("scale_table", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("scale_kind", ctypes.c_int64),
        ("scale_stride", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("rounding", ctypes.c_int64),
        ("tensor_scale", ctypes.c_float),
    ]


@cache
def _functions() -> Any:
    """The library, its functions typed; None where there is none."""
    if (found := library("cpu_linear")) is not None:
        integer, pointer = ctypes.c_int64, ctypes.c_void_p
        weight = ctypes.POINTER(_Weight)
        found.lotion_fx_path.argtypes, found.lotion_fx_path.restype = [integer], ctypes.c_char_p
        found.lotion_fx_linear.restype = found.lotion_fx_values.restype = None
        found.lotion_fx_linear.argtypes = [
            weight, pointer, integer, pointer, integer, pointer, integer, integer,
        ]  # fmt: skip
        found.lotion_fx_values.argtypes = [weight, pointer, integer, integer]
    return found


def instructions(widest: int = WIDEST) -> str:
    """Which path products take here: "avx512", "avx2", "scalar", or "aten" where there is no compiler."""
    found = _functions()
    return "aten" if found is None else found.lotion_fx_path(widest).decode()


class _Numbers(NamedTuple):
    """What C++ is told of a format.

    Args:
        levels: float32 [16].
        table: of the 256 codes of a scale; None where scales are floats.
        fits_bfloat16: whether bfloat16 holds each level times each scale, and times any power of two that a tensor
            scale may be.
    """

    format: Format
    levels: Tensor
    table: Tensor | None
    fits_bfloat16: bool


@lru_cache(maxsize=256)
def _numbers(name: str) -> _Numbers:
    """By name: a format's own hash is made anew in each call, of all of its levels."""
    fmt, levels = resolve(name), torch.zeros(16)
    if fmt.grid.bits > 4:
        return _Numbers(fmt, levels, None, False)
    count = 1 << fmt.grid.bits
    levels[:count] = fmt.grid.decode(torch.arange(count, dtype=torch.uint8))
    type = getattr(fmt.law, "type", None)
    if type is None:
        return _Numbers(fmt, levels, None, False)
    table = type.decode(torch.arange(256).to(torch.uint8)).contiguous()
    products = levels[:, None] * table[table.isfinite()]
    lowest = SMALLEST_SCALE / fmt.law.type.smallest if isinstance(fmt.law, TwoLevelScale) else 1.0
    fits = all(torch.equal(each, each.bfloat16().float()) for each in (products, products * lowest))
    return _Numbers(fmt, levels, table, fits)


def _rounding(numbers: _Numbers, tensor_scale: float, dtype: torch.dtype) -> torch.dtype:
    """The dtype to which products must round a weight: float32, not at all, where it has that value already."""
    exact = dtype == torch.bfloat16 and numbers.fits_bfloat16 and abs(math.frexp(tensor_scale)[0]) == 0.5
    return torch.float32 if exact else dtype


_Part = tuple[int, torch.Size, torch.dtype]  # where a contiguous tensor lies, and as what it is read


@lru_cache(maxsize=4096)
def _prepared(
    codes: _Part,
    scales: _Part,
    tensor_scale: tuple[float, int, torch.dtype] | None,
    fmt: str,
    length: int,
    dtype: torch.dtype,
) -> _Weight:
    """All that C++ is told of a packed weight, once for each.

    Args:
        tensor_scale: its value or, as int32, its bits; its number of elements, its dtype.

    Raises:
        ValueError: as `check`.
    """
    numbers = _numbers(fmt)
    format, (at, shape, _), (scales_at, blocks, held), whole = numbers.format, codes, scales, 1.0
    if held in _BITS and _BITS[held] == format.law.stored.itemsize:
        held = format.law.stored
    if tensor_scale is not None:
        whole, count, kind = tensor_scale
        if kind == torch.int32:
            (whole,) = struct.unpack("f", struct.pack("i", whole))
            kind = torch.float32
        tensor_scale = whole, count, kind
    check(codes[1:], (blocks, held), None if tensor_scale is None else tensor_scale[1:], format, length)
    block = format.block if isinstance(format.block, int) else length + length % 2
    return _Weight(
        at,
        scales_at,
        None if numbers.table is None else numbers.table.data_ptr(),
        numbers.levels.data_ptr(),
        shape.numel() // shape[-1] if shape[-1] else 0,
        length,
        block,
        -(-length // block) if length else 0,
        _KINDS[held] if numbers.table is None else _CODES.get(getattr(format.law, "type", None), 0),
        0 if format.block == "tensor" else blocks[-1],
        _KINDS[dtype],
        _KINDS[_rounding(numbers, whole, dtype)],
        whole,
    )


def _weight(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor | None, fmt: str, length: int, dtype: torch.dtype
) -> _Weight:
    """What C++ is told of a packed weight, whose parts are contiguous."""
    whole = None
    if tensor_scale is not None:
        count = tensor_scale.numel()
        whole = tensor_scale.item() if count == 1 else 0, count, tensor_scale.dtype
    return _prepared(
        (codes.data_ptr(), codes.shape, codes.dtype),
        (scales.data_ptr(), scales.shape, scales.dtype),
        whole,
        fmt,
        length,
        dtype,
    )


def check(
    codes: tuple[torch.Size, torch.dtype],
    scales: tuple[torch.Size, torch.dtype],
    tensor_scale: tuple[int, torch.dtype] | None,
    fmt: Format,
    length: int,
) -> None:
    """Raises `ValueError` where the parts of a packed weight [..., length] have not its format's shapes and dtypes.

    Args:
        codes, scales: shape and dtype of each.
        tensor_scale: its number of elements and its dtype; None if there is none.
    """
    if not in_pairs(fmt) or (isinstance(fmt.block, int) and fmt.block % 2):
        raise ValueError(f"fmt={fmt.name!r}: expected codes of up to 4 bits, in blocks of an even size")
    (shape, dtype), width = codes, (length + 1) // 2
    if dtype != torch.uint8 or len(shape) < 1 or shape[-1] != width:
        raise ValueError(
            f"codes: got {dtype} {list(shape)}, expected torch.uint8 [..., {width}] for {length} weights a row in "
            f"{fmt.name}"
        )
    blocks = -(-length // fmt.block) if isinstance(fmt.block, int) else 1
    expected = [1] if fmt.block == "tensor" else [*shape[:-1], blocks]
    stored = (torch.uint8,) if hasattr(fmt.law, "type") else DTYPES
    if scales[1] not in stored or list(scales[0]) != expected:
        raise ValueError(
            f"scales: got {scales[1]} {list(scales[0])}, expected {' or '.join(map(str, stored))} {expected} for "
            f"{length} weights a row in {fmt.name}"
        )
    if (tensor_scale is not None) != fmt.law.two_level:
        has = "one" if fmt.law.two_level else "none"
        raise ValueError(
            f"tensor_scale: {'none' if tensor_scale is None else 'one'} is given, and {fmt.name} has {has}"
        )
    if tensor_scale is not None and tensor_scale != (1, torch.float32):
        raise ValueError(f"tensor_scale: got {tensor_scale[0]} of {tensor_scale[1]}, expected one torch.float32")


def _threads(weights: int) -> int:
    return 1 if weights <= _ALONE else torch.get_num_threads()


def values(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor | None, fmt: str, length: int, dtype: torch.dtype
) -> Tensor:
    """The weight [..., length] that was packed.

    Args:
        codes: uint8 [..., ceil(length / 2)], the low nibble being the even element.
        scales: of blocks, [..., blocks], or of the tensor, [1]: uint8 codes, float32, bfloat16 or float16, or the bits
            of what the format stores as int32 or int16.
        tensor_scale: float32, or its bits as int32, one element: of two-level formats, else None.
        fmt: the format's name.
        dtype: float32, bfloat16 or float16, to which the float32 weight is rounded.

    Raises:
        ValueError: a shape or a dtype is not the format's.
    """
    found, format = _functions(), resolve(fmt)
    if found is None or dtype not in DTYPES:
        if scales.dtype in _BITS:
            scales = scales.view(format.law.stored)
        if tensor_scale is not None and tensor_scale.dtype == torch.int32:
            tensor_scale = tensor_scale.view(torch.float32)
        kind = None if tensor_scale is None else (tensor_scale.numel(), tensor_scale.dtype)
        check((codes.shape, codes.dtype), (scales.shape, scales.dtype), kind, format, length)
        wide = scales if scales.dtype == torch.uint8 else scales.float()
        return unpack(Packed(codes, wide, tensor_scale), format, length).to(dtype)
    codes, scales = codes.contiguous(), scales.contiguous()
    weight = _weight(codes, scales, tensor_scale, fmt, length, dtype)
    out = torch.empty((*codes.shape[:-1], length), dtype=dtype)
    found.lotion_fx_values(ctypes.byref(weight), out.data_ptr(), WIDEST, _threads(out.numel()))
    return out


def linear(
    x: Tensor, codes: Tensor, scales: Tensor, tensor_scale: Tensor | None, bias: Tensor | None, fmt: str
) -> Tensor:
    """``y = x W^T + b`` for a packed ``W`` [N, K].

    Args:
        x: activations [..., K]; float32, bfloat16 or float16.
        codes: uint8 [N, ceil(K / 2)], the low nibble being the even element.
        scales, tensor_scale, fmt: as of `values`.
        bias: [N] in float32, bfloat16 or float16, or None.

    Returns:
        [..., N] in ``x``'s dtype.

    Raises:
        ValueError: a shape or a dtype is not the format's.
    """
    shape, dtype, found = x.shape, x.dtype, _functions()  # each attribute of a tensor is a call
    length, count = shape[-1], x.numel()
    if codes.dim() != 2 or (bias is not None and (bias.shape != codes.shape[:1] or bias.dtype not in DTYPES)):
        raise ValueError(
            f"bias: got {None if bias is None else [bias.dtype, *bias.shape]} with codes {list(codes.shape)}, expected "
            "floats [outputs] or None, and codes [outputs, bytes]"
        )
    if found is None or dtype not in DTYPES or not count or count // length > FEW:
        weight = values(codes, scales, tensor_scale, fmt, length, dtype)
        return F.linear(x, weight, None if bias is None else bias.to(dtype))
    x, codes, scales = x.contiguous(), codes.contiguous(), scales.contiguous()
    bias = None if bias is None else bias.contiguous()
    packed = _weight(codes, scales, tensor_scale, fmt, length, dtype)
    y = x.new_empty((*shape[:-1], packed.rows))
    found.lotion_fx_linear(
        ctypes.byref(packed),
        x.data_ptr(),
        count // length,
        None if bias is None else bias.data_ptr(),
        0 if bias is None else _KINDS[bias.dtype],
        y.data_ptr(),
        WIDEST,
        _threads(packed.rows * length),
    )
    return y


# Declared by hand: `torch.library.custom_op` wraps each call in ten microseconds of Python, a fifth of a small product.
_library = torch.library.Library("lotion_fx", "FRAGMENT")
_library.define(
    "cpu_linear(Tensor x, Tensor codes, Tensor scales, Tensor? tensor_scale, Tensor? bias, str fmt) -> Tensor"
)
_library.define(
    "cpu_values(Tensor codes, Tensor scales, Tensor? tensor_scale, str fmt, SymInt length, ScalarType dtype) -> Tensor"
)
_library.impl("cpu_linear", linear, "CPU")
_library.impl("cpu_values", values, "CPU")


@torch.library.register_fake("lotion_fx::cpu_linear")
def _linear_fake(
    x: Tensor, codes: Tensor, scales: Tensor, tensor_scale: Tensor | None, bias: Tensor | None, fmt: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.register_fake("lotion_fx::cpu_values")
def _values_fake(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor | None, fmt: str, length: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], length), dtype=dtype)


cpu_linear = torch.ops.lotion_fx.cpu_linear
cpu_values = torch.ops.lotion_fx.cpu_values
