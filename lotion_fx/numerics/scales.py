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
    variance 0. The derivative of every law is taken as ``ds/damax = 1/q_max`` (a snapping to E4M3, to 16 bits
    or to a power of two is passed straight through), and 0 below ``smallest_amax``.
    """

    two_level: ClassVar[bool] = False

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of one stored block scale."""

    @property
    def stored(self) -> torch.dtype:
        """The dtype of a stored block scale; uint8 for a code."""
        return self.held

    def tensor_scale(self, amax_tensor: Tensor, grid: Grid) -> Tensor | None:
        """The scale shared by the whole tensor, from its absmax; None unless the law is ``two_level``."""
        return None

    @property
    def held(self) -> torch.dtype:
        """The dtype in which kernels hold a stored block scale: 16-bit scales are widened to float32."""
        return torch.uint8 if hasattr(self, "type") else torch.float32

    @abstractmethod
    def saturates(self, grid: Grid) -> bool:
        """Whether a block's largest weights can lie past the last level."""

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

    def saturates(self, grid: Grid) -> bool:
        return False

    def smallest_amax(self, grid: Grid, tensor_scale: Tensor | None = None) -> float:
        return SMALLEST_SCALE * grid.max

    def block_scale(self, amax: Tensor, grid: Grid, tensor_scale: Tensor | None = None) -> Tensor:
        return divide(amax.clamp(min=self.smallest_amax(grid)), grid.max)


@dataclass(frozen=True)
class HalfScale(ScaleLaw):
    """``s = amax / q_max`` rounded up to a bfloat16 or float16 number, in float32: what clients store, exactly.

    Up and not to nearest, so that nothing saturates and randomized rounding is unbiased. bfloat16 scales reach from
    ``2^-119`` (its steps below are no normal float32 numbers) to its largest number, float16 scales from ``2^-24``
    (its smallest subnormal: ``amax / 127`` of a trained channel is often below ``2^-14``) to 65504. A block past
    ``q_max`` times the largest saturates, which no float32 weight reaches with bfloat16 where ``q_max > 1.004``.

    Args:
        name: 'bf16' or 'fp16'.
    """

    name: Literal["bf16", "fp16"]

    names: ClassVar[tuple[str, ...]] = ("bf16", "fp16")

    def __post_init__(self) -> None:
        if self.name not in self.names:
            raise ValueError(f"name={self.name!r}: expected one of {', '.join(self.names)}")

    @property
    def bits(self) -> int:
        return 16

    @property
    def stored(self) -> torch.dtype:
        return torch.bfloat16 if self.name == "bf16" else torch.float16

    @property
    def _numbers(self) -> Minifloat:
        return _BFLOAT16 if self.name == "bf16" else _FLOAT16

    @property
    def _smallest(self) -> float:
        return max(self._numbers.smallest, SMALLEST_SCALE * 2**self._numbers.mantissa_bits)

    def saturates(self, grid: Grid) -> bool:
        return self._numbers.max * grid.max < torch.finfo(torch.float32).max

    def smallest_amax(self, grid: Grid, tensor_scale: Tensor | None = None) -> float:
        return self._smallest * grid.max

    def block_scale(self, amax: Tensor, grid: Grid, tensor_scale: Tensor | None = None) -> Tensor:
        exact = divide(amax.clamp(min=self.smallest_amax(grid)), grid.max)
        _, up = self._numbers.neighbours(exact.clamp(min=self._smallest))
        return torch.where(amax < torch.inf, up, torch.nan)  # `neighbours` limits what is past the largest


_BFLOAT16 = Minifloat(8, 7, torch.finfo(torch.bfloat16).max)
_FLOAT16 = Minifloat(5, 10, torch.finfo(torch.float16).max)


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

    def saturates(self, grid: Grid) -> bool:
        return self.rule != "ceil"

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
    """A minifloat scale per block times one scale per tensor: NVFP4's ``s = E4M3(amax / q_max / ts) ts``.

    ``ts = amax_tensor / (q_max * type.max)`` maps the largest block's scale onto the scale type's largest value
    (448). The block scale is the nearest E4M3 value, from ``2^-9`` (the type's smallest) to 448. Rounded down, it
    lets weights pass ``q_max``: they saturate when rounded and have zero variance. ``ts`` is at least ``2^-117``,
    so that the product is never subnormal. ``ts`` is held constant in derivatives.

    As a power of two, ``ts`` is rounded up, so that no block's scale passes 448. A level of E2M1 times an E4M3 scale
    times a power of two has six significant bits: every weight is a bfloat16 number, and dividing by ``1 / ts``,
    multiplying by ``ts`` in any order, or holding either in bfloat16 give the same weights.

    Args:
        type: the block scale's type.
        tensor: what the tensor's scale is, 'fp32' (any float32) or 'pow2' (a power of two, held in float32).

    Source: NVIDIA, "Introducing NVFP4" (2025), and the layout of compressed-tensors and ModelOpt checkpoints.
    """

    type: Minifloat
    tensor: Literal["fp32", "pow2"] = "fp32"

    two_level: ClassVar[bool] = True
    tensors: ClassVar[tuple[str, ...]] = ("fp32", "pow2")

    def __post_init__(self) -> None:
        if self.tensor not in self.tensors:
            raise ValueError(f"tensor={self.tensor!r}: expected one of {', '.join(self.tensors)}")

    @property
    def bits(self) -> int:
        return self.type.bits

    def saturates(self, grid: Grid) -> bool:
        return True

    def tensor_scale(self, amax_tensor: Tensor, grid: Grid) -> Tensor:
        """``ts``, 0-dimensional like ``amax_tensor``, which must be at least every block's absmax."""
        exact = divide(amax_tensor, grid.max * self.type.max).clamp(min=SMALLEST_SCALE / self.type.smallest)
        if self.tensor == "fp32":
            return exact
        below = power_of_two_below(exact)
        up = torch.where(exact > below, below * 2, below)
        return torch.where(exact < torch.inf, up, torch.nan)  # exponent bits would hide what ``exact`` is

    def smallest_amax(self, grid: Grid, tensor_scale: Tensor | None = None) -> Tensor:
        assert tensor_scale is not None
        return tensor_scale * (self.type.smallest * grid.max)

    def block_scale(self, amax: Tensor, grid: Grid, tensor_scale: Tensor | None = None) -> Tensor:
        assert tensor_scale is not None
        exact = divide(amax, grid.max) / tensor_scale
        return self.type.nearest(exact.clamp(min=self.type.smallest))
