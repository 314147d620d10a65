"""Number formats, each defined once: a grid of levels, a block, and a scale law.

A weight block ``w_B`` is stored as one scale ``s`` and one code per weight. In *grid units* ``z = w / s``; the grid
says which levels surround ``z``, which one is nearest and which bits encode it. Everything else in the package
(training forward, variance, packing, kernels) derives from the objects here and repeats none of their numbers.

All arithmetic is elementwise ATen on float32 or float64 (float64 for oracles): no fp8 dtype is created on the way,
because compilers cannot make E4M3 on every device, and exponents come from the float's own bits, because a
``log2`` is off by one unit in the last place just where it matters, at powers of two.
"""

from __future__ import annotations

import difflib
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

__all__ = [
    "Codebook",
    "Float32Scale",
    "Format",
    "Grid",
    "Integer",
    "Minifloat",
    "PowerOfTwo",
    "PowerOfTwoScale",
    "ScaleLaw",
    "TwoLevelScale",
    "codebook",
    "formats",
    "register_format",
    "resolve",
]

# dtype -> (integer of the same width, mantissa bits, exponent bias, bits of +inf): what reading a float's bits needs.
_FLOAT_LAYOUT = {
    torch.float32: (torch.int32, 23, 127, 0x7F800000),
    torch.float64: (torch.int64, 52, 1023, 0x7FF0000000000000),
}

# The smallest scale any law gives: float32's smallest normal number. Below it devices may flush to zero, and
# w / s would be 0 / 0 on one machine and a number on another.
SMALLEST_SCALE = 2.0**-126


def power_of_two_below(x: Tensor) -> Tensor:
    """``2^floor(log2 |x|)`` read from the exponent bits: exact, and 0 where ``x`` is 0 or subnormal.

    Args:
        x: float32 or float64, any shape.
    """
    integer, _, _, exponent_mask = _FLOAT_LAYOUT[x.dtype]
    return (x.view(integer) & exponent_mask).view(x.dtype)


def reciprocal_of_power(x: Tensor) -> Tensor:
    """``1 / x`` of powers of two from ``2^-126`` to ``2^126``, read from the exponent bits: exact, and no division.

    Args:
        x: float32 or float64, any shape.
    """
    integer, mantissa, bias, _ = _FLOAT_LAYOUT[x.dtype]
    return ((2 * bias << mantissa) - x.view(integer)).view(x.dtype)


def _divide(x: Tensor, divisor: float) -> Tensor:
    # CUDA's eager division by a scalar multiplies by the rounded reciprocal; by a tensor it divides. One result
    # on every device needs the tensor.
    return x / torch.full_like(x, divisor)


class Grid(ABC):
    """The levels of a format, in grid units. 0 is always one of them, so a zero weight stays zero.

    Every method is elementwise on a float32 or float64 tensor (codes are uint8). A value past the last level
    saturates to it.
    """

    @property
    @abstractmethod
    def max(self) -> float:
        """``q_max``, the largest magnitude among the levels."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of one code."""

    @property
    @abstractmethod
    def levels(self) -> tuple[float, ...]:
        """All levels, ascending, zero once."""

    @property
    def finest(self) -> float:
        """The smallest distance between two levels."""
        return min(b - a for a, b in pairwise(self.levels))

    @abstractmethod
    def neighbours(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The levels ``lo <= z <= hi`` around ``z``.

        At a level ``lo == hi == z``, and past the last level both are that level. So the variance
        ``(z - lo)(hi - z)`` is exactly 0 there, and its slope ``lo + hi - 2z`` is 0 as well: of the one-sided
        slopes at that kink, a minimum, the subgradient that leaves the weight in place. Code that divides by
        ``hi - lo`` must allow for 0.
        """

    @abstractmethod
    def nearest(self, z: Tensor) -> Tensor:
        """The level nearest to ``z``; a tie goes to the even code. Never -0.0, whose code would be a second zero."""

    @abstractmethod
    def encode(self, level: Tensor) -> Tensor:
        """The uint8 code of each level. ``level`` must hold levels; -0.0 gets the code of +0.0."""

    @abstractmethod
    def decode(self, code: Tensor) -> Tensor:
        """The float32 level of each uint8 code."""

    def clamp(self, z: Tensor) -> Tensor:
        """``z`` limited to the range of the levels."""
        return z.clamp(-self.max, self.max)

    def below(self, level: Tensor) -> Tensor:
        """The next level below each level; the last one itself at the end of the grid."""
        return self.neighbours(level - self._nudge(level))[0]

    def above(self, level: Tensor) -> Tensor:
        """The next level above each level; the last one itself at the end of the grid."""
        return self.neighbours(level + self._nudge(level))[1]

    def _nudge(self, level: Tensor) -> Tensor:
        # Less than any distance between levels, more than float32's at that level.
        return (level.abs() * 2.0**-20).clamp(min=self.finest / 2)


def _positive_zero(x: Tensor) -> Tensor:
    # Adding 0.0 would do, but a compiler that may ignore the sign of zero removes it.
    return torch.where(x == 0, 0.0, x)


@dataclass(frozen=True)
class Integer(Grid):
    """The integers ``-qmax .. qmax``, symmetric: the most negative two's complement value is not used.

    Codes are offset binary, ``code = level + 2^(bits-1)``: ascending with the level, and even exactly where it is.

    Args:
        qmax: largest level, 1 to 127.
    """

    qmax: int

    def __post_init__(self) -> None:
        if not 1 <= self.qmax <= 127:
            raise ValueError(f"qmax={self.qmax!r}: expected an integer from 1 to 127, so that a code fits in a byte")

    @property
    def max(self) -> float:
        return float(self.qmax)

    @property
    def bits(self) -> int:
        return self.qmax.bit_length() + 1

    @property
    def levels(self) -> tuple[float, ...]:
        return tuple(float(i) for i in range(-self.qmax, self.qmax + 1))

    def neighbours(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = self.clamp(z)
        return z.floor(), z.ceil()

    def nearest(self, z: Tensor) -> Tensor:
        return _positive_zero(self.clamp(z).round())

    def encode(self, level: Tensor) -> Tensor:
        return (level + 2 ** (self.bits - 1)).to(torch.uint8)

    def decode(self, code: Tensor) -> Tensor:
        return code.to(torch.float32) - 2 ** (self.bits - 1)


@dataclass(frozen=True)
class Minifloat(Grid):
    """A small float: sign, exponent with bias ``2^(E-1) - 1``, mantissa, subnormals. Codes are its bit patterns.

    With ``2^e`` the power of two at or below ``|z|``, neighbouring levels are ``step = max(2^e, 2^emin) 2^-M``
    apart. ``z / step``, a division by a power of two, is exact, so that ``floor``, ``ceil`` and ``round``
    (half to even) of it give the neighbours and the nearest level exactly, ties to the even mantissa.

    Args:
        exponent_bits: E.
        mantissa_bits: M.
        largest: largest finite level. Bit patterns past it (E4M3's NaN, E5M2's infinity and NaN) are never encoded,
            and decode to NaN.

    Source: OCP Microscaling Formats (MX) v1.0, section 5.3; OCP 8-bit Floating Point v1.0.
    """

    exponent_bits: int
    mantissa_bits: int
    largest: float

    @property
    def max(self) -> float:
        return self.largest

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What the exponent field stands above the exponent by."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def smallest(self) -> float:
        """The smallest positive level, a subnormal: ``2^(emin - M)`` with ``emin = 1 - bias``."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def largest_pattern(self) -> float:
        """What the bit pattern of all ones would stand for if it were a number."""
        return 2.0 ** (2**self.exponent_bits - 1 - self.bias) * (2 - 2.0**-self.mantissa_bits)

    @property
    def levels(self) -> tuple[float, ...]:
        codes = torch.arange(2 ** (self.bits - 1), dtype=torch.uint8)
        positive = [x for x in self.decode(codes).tolist() if 0 < x <= self.max]
        return (*(-x for x in reversed(positive)), 0.0, *positive)

    @property
    def finest(self) -> float:
        return self.smallest  # `levels` decodes tensors, which a compiler's fakes do not allow

    def step(self, z: Tensor) -> Tensor:
        """The distance between the levels around ``z``: a power of two."""
        smallest_normal = self.smallest * 2**self.mantissa_bits
        return power_of_two_below(z).clamp(min=smallest_normal) * 2.0**-self.mantissa_bits

    def neighbours(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = self.clamp(z)
        step = self.step(z)
        k = z * reciprocal_of_power(step)
        return k.floor() * step, k.ceil() * step

    def nearest(self, z: Tensor) -> Tensor:
        z = self.clamp(z)
        step = self.step(z)
        return _positive_zero((z * reciprocal_of_power(step)).round() * step)

    def encode(self, level: Tensor) -> Tensor:
        _, float32_mantissa, float32_bias, _ = _FLOAT_LAYOUT[torch.float32]
        magnitude = level.to(torch.float32).abs()
        # A normal level's code is its float32 bits with the exponent rebased and the mantissa cut; a subnormal's is
        # how many smallest levels it holds.
        rebase = (float32_bias - self.bias) << self.mantissa_bits
        normal = (magnitude.view(torch.int32) >> (float32_mantissa - self.mantissa_bits)) - rebase
        subnormal = (magnitude / self.smallest).to(torch.int32)
        code = torch.where(normal >= 2**self.mantissa_bits, normal, subnormal)
        return torch.where(level < 0, code + 2 ** (self.bits - 1), code).to(torch.uint8)

    def decode(self, code: Tensor) -> Tensor:
        _, float32_mantissa, float32_bias, _ = _FLOAT_LAYOUT[torch.float32]
        sign = 2 ** (self.bits - 1)
        magnitude = code.to(torch.int32) & (sign - 1)
        rebase = (float32_bias - self.bias) << self.mantissa_bits
        normal = ((magnitude + rebase) << (float32_mantissa - self.mantissa_bits)).view(torch.float32)
        value = torch.where(magnitude >= 2**self.mantissa_bits, normal, magnitude * self.smallest)
        if self.max < self.largest_pattern:
            value = torch.where(value > self.max, torch.nan, value)
        return torch.where((code.to(torch.int32) & sign) != 0, -value, value)


def _float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


@dataclass(frozen=True)
class Codebook(Grid):
    """Levels listed one by one; the code is the index into the list.

    The levels are rounded to float32 and the boundary between two neighbours is their midpoint in float32, since
    that is what a kernel holds. The methods unroll over the levels: meant for tables of 16, fit for 256.

    Args:
        entries: 2 to 256 finite numbers, ascending, distinct, 0 among them (so that a zero weight, and a zero
            block whose scale is then arbitrary, stays zero).

    Raises:
        ValueError: the entries are not as above.
    """

    entries: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 2 <= len(self.entries) <= 256:
            raise ValueError(f"levels: got {len(self.entries)}, expected 2 to 256, so that a code fits in a byte")
        float32_max = torch.finfo(torch.float32).max
        if not all(abs(x) <= float32_max for x in self.entries):
            raise ValueError(f"levels={self.entries!r}: expected finite float32 numbers")
        # + 0.0 turns a -0.0 into the one zero.
        entries = tuple(_float32(x) + 0.0 for x in self.entries)
        if any(a >= b for a, b in pairwise(entries)):
            raise ValueError(f"levels={self.entries!r}: expected ascending order, no level twice (in float32)")
        if 0.0 not in entries:
            raise ValueError(f"levels={self.entries!r}: expected 0 among them, so that a zero weight stays zero")
        object.__setattr__(self, "entries", entries)

    @property
    def levels(self) -> tuple[float, ...]:
        return self.entries

    @property
    def max(self) -> float:
        return max(-self.levels[0], self.levels[-1])

    @property
    def bits(self) -> int:
        return (len(self.levels) - 1).bit_length()

    @property
    def midpoints(self) -> tuple[float, ...]:
        """The boundary above each level but the last."""
        return tuple(_float32((a + b) / 2) for a, b in pairwise(self.levels))

    def clamp(self, z: Tensor) -> Tensor:
        return z.clamp(self.levels[0], self.levels[-1])

    def neighbours(self, z: Tensor) -> tuple[Tensor, Tensor]:
        lo = torch.full_like(z, self.levels[0])
        hi = torch.full_like(z, self.levels[-1])
        for level in self.levels[1:]:
            lo = torch.where(z >= level, level, lo)
        for level in self.levels[-2::-1]:
            hi = torch.where(z <= level, level, hi)
        return lo, hi

    def nearest(self, z: Tensor) -> Tensor:
        q = torch.full_like(z, self.levels[0])
        for index, (boundary, above) in enumerate(zip(self.midpoints, self.levels[1:], strict=True)):
            # On the boundary the even code wins: the upper one if the lower index is odd.
            q = torch.where(z >= boundary if index % 2 else z > boundary, above, q)
        return q

    def encode(self, level: Tensor) -> Tensor:
        code = torch.zeros_like(level, dtype=torch.uint8)
        for boundary in self.midpoints:
            code = code + (level > boundary)
        return code

    def decode(self, code: Tensor) -> Tensor:
        value = torch.full_like(code, self.levels[0], dtype=torch.float32)
        for index, level in enumerate(self.levels):
            value = torch.where(code == index, level, value)
        return value


@dataclass(frozen=True)
class PowerOfTwo:
    """E8M0, the scale type of the MX formats: code ``c`` is ``2^(c - 127)``, 255 is NaN.

    Source: OCP Microscaling Formats (MX) v1.0, section 5.4.1.
    """

    bits: ClassVar[int] = 8

    def encode(self, scale: Tensor) -> Tensor:
        """The uint8 code of a scale: a float32 or float64 power of two, at least ``2^-126``."""
        _, mantissa, _, _ = _FLOAT_LAYOUT[torch.float32]
        return (scale.to(torch.float32).view(torch.int32) >> mantissa).to(torch.uint8)

    def decode(self, code: Tensor) -> Tensor:
        """The float32 scale of a uint8 code."""
        _, mantissa, _, _ = _FLOAT_LAYOUT[torch.float32]
        value = (code.to(torch.int32) << mantissa).view(torch.float32)
        value = torch.where(code == 0, 2.0**-127, value)  # float32 holds this one as a subnormal
        return torch.where(code == 255, torch.nan, value)


class ScaleLaw(ABC):
    """How a block's largest magnitude ``amax`` becomes its scale.

    Every law follows ``amax`` down to ``smallest_amax`` and treats a smaller one, an all-zero block's included, as
    that. So a scale is never 0 or subnormal, ``z = w / s`` is always defined, and zeros give ``z = 0``, level 0,
    variance 0. The derivative of every law is taken as ``ds/damax = 1/q_max`` (a snapping to E4M3 or to a power
    of two is passed straight through), and 0 below ``smallest_amax``.
    """

    two_level: ClassVar[bool] = False

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of one stored block scale."""

    def tensor_scale(self, amax_tensor: Tensor, grid: Grid) -> Tensor | None:
        """The scale shared by the whole tensor, from its absmax; None unless the law is ``two_level``."""
        return None

    @abstractmethod
    def smallest_amax(self, grid: Grid, tensor_scale: Tensor | None = None) -> Tensor | float:
        """The block absmax below which the scale no longer falls."""

    @abstractmethod
    def block_scale(self, amax: Tensor, grid: Grid, tensor_scale: Tensor | None = None) -> Tensor:
        """Each block's stored scale, without the tensor's, in ``amax``'s dtype (float32 or float64)."""


@dataclass(frozen=True)
class Float32Scale(ScaleLaw):
    """``s = amax / q_max`` in float32, at least ``2^-126``: nothing saturates, rounding is unbiased everywhere."""

    @property
    def bits(self) -> int:
        return 32

    def smallest_amax(self, grid: Grid, tensor_scale: Tensor | None = None) -> float:
        return SMALLEST_SCALE * grid.max

    def block_scale(self, amax: Tensor, grid: Grid, tensor_scale: Tensor | None = None) -> Tensor:
        return _divide(amax.clamp(min=self.smallest_amax(grid)), grid.max)


@dataclass(frozen=True)
class PowerOfTwoScale(ScaleLaw):
    """A power of two (E8M0), found by comparing floats with powers of two taken from exponent bits.

    With ``b = 2^(floor(log2 amax) - floor(log2 q_max))`` the scale is ``b``, or ``2b`` when ``amax`` exceeds a
    threshold that is the rule:

    * ``ceil`` (default): ``q_max b``, so the scale is the smallest power of two at which nothing saturates,
      ``2^ceil(log2(amax / q_max))``. Randomized rounding is unbiased. The choice for training.
    * ``floor``: never. The OCP specification's rule; a block's largest weights may pass ``q_max`` and saturate.
    * ``even``: ``amax`` rounds up to a power of two in the element's mantissa width (the tie, halfway to it, is
      rounded to even, that is up). The rule of compressed-tensors; may saturate, less than ``floor``.

    A saturated weight takes the largest level and has zero variance. Scales are at least ``2^-126``; E8M0 itself
    reaches ``2^-127``, but float32 only as a subnormal.

    Args:
        rule: 'ceil', 'floor' or 'even' ('even' needs a `Minifloat` grid).

    Source: OCP Microscaling Formats (MX) v1.0, section 6.3.
    """

    rule: Literal["ceil", "floor", "even"] = "ceil"

    type: ClassVar[PowerOfTwo] = PowerOfTwo()
    rules: ClassVar[tuple[str, ...]] = ("ceil", "floor", "even")

    def __post_init__(self) -> None:
        if self.rule not in self.rules:
            raise ValueError(f"rule={self.rule!r}: expected one of {', '.join(self.rules)}")

    @property
    def bits(self) -> int:
        return self.type.bits

    @staticmethod
    def _top_power(grid: Grid) -> float:
        return 2.0 ** (math.frexp(grid.max)[1] - 1)

    def smallest_amax(self, grid: Grid, tensor_scale: Tensor | None = None) -> float:
        return SMALLEST_SCALE * self._top_power(grid)

    def block_scale(self, amax: Tensor, grid: Grid, tensor_scale: Tensor | None = None) -> Tensor:
        amax = amax.clamp(min=self.smallest_amax(grid))
        base = power_of_two_below(amax) / self._top_power(grid)
        base = torch.where(amax < torch.inf, base, torch.nan)  # which E8M0 has; exponent bits would hide what amax is
        if self.rule == "ceil":
            return torch.where(amax > base * grid.max, base * 2, base)
        if self.rule == "even":
            assert isinstance(grid, Minifloat)
            halfway = (2 - 2.0 ** -(grid.mantissa_bits + 1)) * self._top_power(grid)
            return torch.where(amax >= base * halfway, base * 2, base)
        return base


@dataclass(frozen=True)
class TwoLevelScale(ScaleLaw):
    """A minifloat scale per block times a float32 scale per tensor: NVFP4's ``s = E4M3(amax / q_max / ts) ts``.

    ``ts = amax_tensor / (q_max * type.max)`` maps the largest block's scale onto the scale type's largest value
    (448). The block scale is the nearest E4M3 value, from ``2^-9`` (the type's smallest) to 448. Rounded down, it
    lets weights pass ``q_max``: they saturate when rounded and have zero variance. ``ts`` is at least ``2^-117``,
    so that the product is never subnormal. ``ts`` is held constant in derivatives.

    Args:
        type: the block scale's type.

    Source: NVIDIA, "Introducing NVFP4" (2025), and the layout of compressed-tensors and ModelOpt checkpoints.
    """

    type: Minifloat

    two_level: ClassVar[bool] = True

    @property
    def bits(self) -> int:
        return self.type.bits

    def tensor_scale(self, amax_tensor: Tensor, grid: Grid) -> Tensor:
        """``ts``, 0-dimensional like ``amax_tensor``, which must be at least every block's absmax."""
        return _divide(amax_tensor, grid.max * self.type.max).clamp(min=SMALLEST_SCALE / self.type.smallest)

    def smallest_amax(self, grid: Grid, tensor_scale: Tensor | None = None) -> Tensor:
        assert tensor_scale is not None
        return tensor_scale * (self.type.smallest * grid.max)

    def block_scale(self, amax: Tensor, grid: Grid, tensor_scale: Tensor | None = None) -> Tensor:
        assert tensor_scale is not None
        exact = _divide(amax, grid.max) / tensor_scale
        return self.type.nearest(exact.clamp(min=self.type.smallest))


Block = int | Literal["tensor", "channel"]


@dataclass(frozen=True)
class Format:
    """A number format for weights: which levels, how many weights share a scale, and how the scale is found.

    Args:
        name: what `resolve` calls it.
        grid: the levels.
        block: weights per scale along the contraction axis; "channel" for that whole axis, "tensor" for all weights.
        law: the scale law.

    Raises:
        ValueError: ``block`` is not a positive integer, "tensor" or "channel"; or the law needs another grid.
    """

    name: str
    grid: Grid
    block: Block
    law: ScaleLaw = Float32Scale()

    def __post_init__(self) -> None:
        whole = isinstance(self.block, int) and not isinstance(self.block, bool) and self.block >= 1
        if not whole and self.block not in ("tensor", "channel"):
            raise ValueError(f"block={self.block!r}: expected a positive integer, 'tensor' or 'channel'")
        if self.law == PowerOfTwoScale("even") and not isinstance(self.grid, Minifloat):
            raise ValueError(f"law={self.law!r}: the rule 'even' rounds to a mantissa, which {self.grid!r} has not")

    @property
    def saturates(self) -> bool:
        """Whether a scale may be rounded down, so that a block's largest weights can lie past the last level."""
        return self.law.two_level or (isinstance(self.law, PowerOfTwoScale) and self.law.rule != "ceil")

    @property
    def bits_per_weight(self) -> float:
        """Bits of a code plus a weight's share of its block's scale.

        A scale shared by a whole channel or tensor is left out: its share depends on the shape and is far below a bit.
        """
        return self.grid.bits + (self.law.bits / self.block if isinstance(self.block, int) else 0.0)


def codebook(levels: Sequence[float], block: Block = 32, name: str = "codebook") -> Format:
    """A format with the user's own levels and a float32 scale ``amax / max|level|`` per block.

    Args:
        levels: 2 to 256 finite numbers, ascending, distinct, 0 among them.
        block: weights per scale, "channel" or "tensor".
        name: the format's name.

    Raises:
        ValueError: the levels or the block are not as above.
    """
    return Format(name, Codebook(tuple(levels)), block)


_E2M1 = Minifloat(2, 1, 6.0)
_E2M3 = Minifloat(2, 3, 7.5)
_E3M2 = Minifloat(3, 2, 28.0)
_E4M3 = Minifloat(4, 3, 448.0)
_E5M2 = Minifloat(5, 2, 57344.0)

# 4-bit NormalFloat: quantiles of the standard normal, eight on each side of 0. Listed because the levels in use are
# the float32 roundings of one particular computation. Source: QLoRA, Dettmers et al. 2023, appendix E.
_NF4 = Codebook(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)

_GROUP = 32  # weights per scale of a format whose name says nothing else
_MX_BLOCK = 32  # fixed by the MX specification
_NVFP4_BLOCK = 16  # fixed by the hardware


def _builtin() -> dict[str, Format]:
    table = [Format(f"int{b}", Integer(2 ** (b - 1) - 1), "channel" if b == 8 else _GROUP) for b in range(2, 9)]
    table += [Format("fp4", _E2M1, _GROUP), Format("fp8", _E4M3, "channel"), Format("nf4", _NF4, _GROUP)]
    table += [Format("nvfp4", _E2M1, _NVFP4_BLOCK, TwoLevelScale(_E4M3))]
    mx = {"mxfp4": _E2M1, "mxfp6_e2m3": _E2M3, "mxfp6_e3m2": _E3M2, "mxfp8_e4m3": _E4M3, "mxfp8_e5m2": _E5M2}
    table += [Format(name, grid, _MX_BLOCK, PowerOfTwoScale()) for name, grid in mx.items()]
    return {fmt.name: fmt for fmt in table}


_BUILTIN = _builtin()
_ALIASES = {"mxfp6": "mxfp6_e2m3", "mxfp8": "mxfp8_e4m3"}
_REGISTERED: dict[str, Format] = {}


def formats() -> tuple[str, ...]:
    """The names `resolve` knows: built in, their aliases, and registered ones, sorted."""
    return tuple(sorted({*_BUILTIN, *_ALIASES, *_REGISTERED}))


def register_format(name: str, format: Format) -> Format:
    """Make ``format`` available as ``name`` wherever a format is named.

    A name keeps its meaning: compiled graphs and their caches hold formats by name.

    Args:
        name: an identifier-like name; not a built-in one.
        format: what the name stands for.

    Returns:
        The format under its new name.

    Raises:
        ValueError: the name is taken by a built-in or by another format, empty, or holds '/' (which separates options)
            or spaces.
        TypeError: ``format`` is not a `Format`.
    """
    if not isinstance(name, str) or not name or "/" in name or name.split() != [name]:
        raise ValueError(f"name={name!r}: expected a non-empty string without '/' and spaces")
    if name in _BUILTIN or name in _ALIASES:
        raise ValueError(f"name={name!r}: a built-in format has this name; choose another")
    if not isinstance(format, Format):
        raise TypeError(f"format={format!r}: expected a Format, such as codebook(levels) returns")
    named = replace(format, name=name)
    known = _REGISTERED.setdefault(name, named)
    if known != named:
        raise ValueError(f"name={name!r}: another format was registered under this name; choose another")
    return known


def registered() -> tuple[Format, ...]:
    """The formats that `register_format` added, in order of their names."""
    return tuple(_REGISTERED[name] for name in sorted(_REGISTERED))


def resolve(fmt: str | Format) -> Format:
    """The format that ``fmt`` names; a `Format` is returned as it is.

    A name is one of `formats()`, optionally with one option after a slash: ``/tensor``, ``/channel`` or ``/128``
    sets the block of a format with float32 scales; ``/ceil``, ``/floor`` or ``/even`` the scale rule of an MX format.
    An option that is the format's own default gives the plain format.

    Raises:
        ValueError: the name or the option is unknown, or the format fixes what the option would set.
        TypeError: ``fmt`` is neither a string nor a `Format`.
    """
    if isinstance(fmt, Format):
        return fmt
    if not isinstance(fmt, str):
        raise TypeError(f"fmt={fmt!r}: expected a format name (a string) or a Format")
    name, slash, option = fmt.partition("/")
    base = _REGISTERED.get(name) or _BUILTIN.get(_ALIASES.get(name, name))
    if base is None:
        near = difflib.get_close_matches(name.lower(), formats(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"fmt={fmt!r}: unknown format; {hint}Known: {', '.join(formats())}")
    return _with_option(base, fmt, option) if slash else base


def _with_option(base: Format, fmt: str, option: str) -> Format:
    if isinstance(base.law, PowerOfTwoScale):
        if option not in PowerOfTwoScale.rules:
            raise ValueError(
                f"fmt={fmt!r}: {base.name} has blocks of {base.block} and takes a scale rule, "
                f"one of {', '.join('/' + rule for rule in PowerOfTwoScale.rules)}"
            )
        changed = replace(base, law=PowerOfTwoScale(option))  # type: ignore[arg-type]
    elif not isinstance(base.law, Float32Scale):
        raise ValueError(f"fmt={fmt!r}: {base.name} has blocks of {base.block} and takes no option")
    elif option in ("tensor", "channel"):
        changed = replace(base, block=option)  # type: ignore[arg-type]
    elif option.isascii() and option.isdecimal() and int(option) > 0:
        changed = replace(base, block=int(option))
    else:
        raise ValueError(f"fmt={fmt!r}: expected /tensor, /channel or a block size such as /128 after {base.name}")
    return base if changed == base else replace(changed, name=f"{base.name}/{option}")
