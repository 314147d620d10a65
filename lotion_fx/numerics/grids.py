"""Grids: the levels that a format's weights may take, in units of the block's scale.

All arithmetic is elementwise ATen on float32 or float64 (float64 for oracles): no fp8 dtype is created on the way,
because compilers cannot make E4M3 on every device, and exponents come from the float's own bits, because a
``log2`` is off by one unit in the last place just where it matters, at powers of two.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# dtype -> (integer of the same width, mantissa bits, exponent bias, bits of +inf): what reading a float's bits needs.
FLOAT_LAYOUT = {
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
    integer, _, _, exponent_mask = FLOAT_LAYOUT[x.dtype]
    return (x.view(integer) & exponent_mask).view(x.dtype)


def reciprocal_of_power(x: Tensor) -> Tensor:
    """``1 / x`` of powers of two from ``2^-126`` to ``2^126``, read from the exponent bits: exact, and no division.

    Args:
        x: float32 or float64, any shape.
    """
    integer, mantissa, bias, _ = FLOAT_LAYOUT[x.dtype]
    return ((2 * bias << mantissa) - x.view(integer)).view(x.dtype)


def divide(x: Tensor, divisor: float) -> Tensor:
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
        _, float32_mantissa, float32_bias, _ = FLOAT_LAYOUT[torch.float32]
        magnitude = level.to(torch.float32).abs()
        # A normal level's code is its float32 bits with the exponent rebased and the mantissa cut; a subnormal's is
        # how many smallest levels it holds.
        rebase = (float32_bias - self.bias) << self.mantissa_bits
        normal = (magnitude.view(torch.int32) >> (float32_mantissa - self.mantissa_bits)) - rebase
        subnormal = (magnitude / self.smallest).to(torch.int32)
        code = torch.where(normal >= 2**self.mantissa_bits, normal, subnormal)
        return torch.where(level < 0, code + 2 ** (self.bits - 1), code).to(torch.uint8)

    def decode(self, code: Tensor) -> Tensor:
        _, float32_mantissa, float32_bias, _ = FLOAT_LAYOUT[torch.float32]
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
