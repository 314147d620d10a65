"""Scale laws: how a block's largest magnitude becomes its stored scale."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lotion_fx.numerics.grids import FLOAT_LAYOUT, SMALLEST_SCALE, Grid, Minifloat, divide, power_of_two_below


@dataclass(frozen=True)
class PowerOfTwo:
    """E8M0, the scale type of the MX formats: code ``c`` is ``2^(c - 127)``, 255 is NaN.

    Source: OCP Microscaling Formats (MX) v1.0, section 5.4.1.
    """

    bits: ClassVar[int] = 8

    def encode(self, scale: Tensor) -> Tensor:
        """The uint8 code of a scale: a float32 or float64 power of two, at least ``2^-126``."""
        _, mantissa, _, _ = FLOAT_LAYOUT[torch.float32]
        return (scale.to(torch.float32).view(torch.int32) >> mantissa).to(torch.uint8)

    def decode(self, code: Tensor) -> Tensor:
        """The float32 scale of a uint8 code."""
        _, mantissa, _, _ = FLOAT_LAYOUT[torch.float32]
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

    @property
    def stored(self) -> torch.dtype:
        """The dtype of a stored block scale; uint8 for a code."""
        return torch.uint8 if hasattr(self, "type") else torch.float32

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
        return divide(amax.clamp(min=self.smallest_amax(grid)), grid.max)


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
        return divide(amax_tensor, grid.max * self.type.max).clamp(min=SMALLEST_SCALE / self.type.smallest)

    def smallest_amax(self, grid: Grid, tensor_scale: Tensor | None = None) -> Tensor:
        assert tensor_scale is not None
        return tensor_scale * (self.type.smallest * grid.max)

    def block_scale(self, amax: Tensor, grid: Grid, tensor_scale: Tensor | None = None) -> Tensor:
        assert tensor_scale is not None
        exact = divide(amax, grid.max) / tensor_scale
        return self.type.nearest(exact.clamp(min=self.type.smallest))
