"""What is believed of a factor that is only ever observed with noise: a density over its logarithm.

The logarithm starts near 0 and walks, both with the heavy tails of Cauchy's law: it mostly stays, and may be anywhere.
An observation says of a factor g that ``measured = g * predicted + noise``, with the noise's variance. So what is
measured well is followed at once, what is measured badly is averaged for long, and what tells nothing changes nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

REACH, STEP = 46.0, 0.05
"""Logarithms are kept up to this on both sides, so far apart: factors from 1e-20 to 1e20, to within 5 %."""

PRIOR = 0.25
"""How far from 1 the factor is expected before anything was observed."""

WALK = 0.03
"""How far it walks from one observation to the next."""

DEGREES = 8.0
"""Of freedom, of the noise's t law: an observation far off is an outlier rather than a proof."""

MODEL_ERROR = 0.1
"""What two observations without noise differ by, relatively: the increase is known to second order alone."""


class Gains:
    """Beliefs about several factors, each observed for itself.

    Args:
        count: of factors.
        reach: logarithms are kept up to this on both sides.
        step: how far apart.
        prior: scale of the first density.
    """

    def __init__(self, count: int, reach: float = REACH, step: float = STEP, prior: float = PRIOR) -> None:
        half = round(reach / step)
        self.logs = torch.linspace(-half * step, half * step, 2 * half + 1, dtype=torch.float64)
        self.step = step
        self.density = _cauchy(self.logs, prior, step).expand(count, -1).clone()

    def restore(self, density: Tensor) -> None:
        """Believes what was believed then, whatever the shape it comes in."""
        self.density = density.to("cpu", torch.float64, copy=True).view(-1, len(self.logs))

    def shift(self, log: float) -> None:
        """All densities are moved by so much."""
        places = max(-len(self.logs) // 2, min(len(self.logs) // 2, round(log / self.step)))
        moved = torch.roll(self.density, places, 1)
        self.density = moved / moved.sum(1, keepdim=True)

    def observe(self, measured: Tensor, predicted: Tensor, variance: Tensor) -> None:
        """One observation of each factor. Left out are those that are not finite, whose prediction is not positive, and
        those without noise, of a weight that had no part in the loss.

        Args:
            measured, predicted, variance: float64 [count], all in the loss's units, the last squared.
        """
        told = (predicted > 0) & measured.isfinite() & predicted.isfinite() & variance.isfinite()
        expected = predicted[:, None] * self.logs.exp()
        noise = (variance + (MODEL_ERROR * measured).square())[:, None]
        told &= noise[:, 0] > 0
        z2 = (measured[:, None] - expected).square() / noise
        likelihood = -0.5 * (DEGREES + 1) * (z2 / DEGREES).log1p()
        likelihood = (likelihood - likelihood.amax(1, keepdim=True)).exp()
        posterior = self._walked() * likelihood
        posterior /= posterior.sum(1, keepdim=True)
        self.density = torch.where(told[:, None], posterior, self.density)

    def _walked(self) -> Tensor:
        """The densities a walk later."""
        kernel = _cauchy(self.logs, WALK, self.step)
        size = 2 * len(self.logs)
        spectrum = torch.fft.rfft(self.density, size) * torch.fft.rfft(kernel, size)
        half = len(self.logs) // 2
        return torch.fft.irfft(spectrum, size)[:, half : half + len(self.logs)].clamp(min=1e-300)

    @property
    def mean(self) -> Tensor:
        """Of each factor, float64 [count]."""
        return (self.density * self.logs.exp()).sum(1)

    @property
    def error(self) -> Tensor:
        """The standard deviation of each factor, float64 [count]."""
        return (self.density * (self.logs.exp() - self.mean[:, None]).square()).sum(1).sqrt()


def _cauchy(x: Tensor, scale: float, step: float) -> Tensor:
    """Cauchy's law of that scale on a grid, from its distribution function: the scale may be finer than the grid."""
    below, above = torch.atan((x - step / 2) / scale), torch.atan((x + step / 2) / scale)
    density = (above - below) / math.pi
    return density / density.sum()
