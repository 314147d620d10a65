"""A quantizer: a format, the dimension that its blocks run along, and the law of its random rounding, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import Format, resolve
from lotion_fx.numerics.noise import RANDOMIZED, NoiseLaw, resolve_noise


@dataclass(frozen=True)
class Quantizer:
    """How one weight is rounded. The methods are those of `rounding`, of a weight ``w`` of any shape and float dtype.

    Args:
        format: levels, block and scale law.
        axis: the dimension that blocks run along.
        noise: the law of random rounding.
    """

    format: Format
    axis: int
    noise: NoiseLaw = RANDOMIZED

    @staticmethod
    def of(fmt: str, axis: int, noise: str) -> Quantizer:
        """The one that `constants` gave."""
        return Quantizer(resolve(fmt), axis, resolve_noise(noise))

    def __hash__(self) -> int:
        """By name alone: plans are compared at every call of a graph, and a format's levels are many."""
        return hash((self.format.name, self.axis, self.noise.name))

    @property
    def constants(self) -> tuple[str, int, str]:
        """Format, axis and noise as plain values, which graphs, ops and compile caches hold."""
        return self.format.name, self.axis, self.noise.name

    @property
    def unbiased(self) -> bool:
        """Whether the mean of a randomly rounded weight is the weight itself, wherever it lies."""
        return self.noise.unbiased and not self.format.saturates

    def rtn(self, w: Tensor, **options: Any) -> Tensor:
        return rounding.rtn(w, self.format, self.axis, **options)

    def rtn_vjp(self, w: Tensor, grad: Tensor) -> Tensor:
        return rounding.rtn_vjp(w, grad, self.format, self.axis)

    def rr(self, w: Tensor, generator: torch.Generator | None = None, **options: Any) -> Tensor:
        return rounding.rr(w, self.format, self.axis, law=self.noise, generator=generator, **options)

    def mean(self, w: Tensor) -> Tensor:
        return w if self.unbiased else rounding.mean(w, self.format, self.axis, law=self.noise)

    def mean_vjp(self, w: Tensor, grad: Tensor) -> Tensor:
        return rounding.mean_vjp(w, grad, self.format, self.axis, law=self.noise)

    def variance(self, w: Tensor) -> Tensor:
        return rounding.variance(w, self.format, self.axis, law=self.noise)

    def variance_vjp(self, w: Tensor, h: Tensor, **options: Any) -> Tensor:
        return rounding.variance_vjp(w, h, self.format, self.axis, law=self.noise, **options)
