"""What is believed of a factor that is only ever observed with noise: a density over its logarithm.

The logarithm starts near 0 and walks, both with the heavy tails of Cauchy's law: it mostly stays, and may be anywhere.
An observation says of a factor g that ``measured = g * predicted + noise``, with the noise's variance. So what is
measured well is followed at once, what is measured badly is averaged for long, and what tells nothing changes nothing.

What is predicted moves by itself, too. The truth may follow it, as a likelihood's curvature follows squared gradients,
or not at all, as that of squares whose residuals vanish: how far it does is learned with the factor (`Gain`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

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

SHARES = (0.0, 0.5, 1.0)
"""How much of a prediction's own movement, in logarithms, the truth may have no part in."""

NEARLY = 0.75
"""Of all predictions, as many have fallen where it is said that nearly all have."""

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

    def observe(self, measured: Tensor, predicted: Tensor, variance: Tensor) -> None:
        """One observation of each factor. Left out are those that are not finite, whose prediction is not positive, and
        those without noise, of a weight that had no part in the loss.

        Args:
            measured, predicted, variance: float64 [count], all in the loss's units, the last squared.
        """
        told, likelihood = self._likelihood(measured, predicted, variance)
        posterior = self._walked() * (likelihood - likelihood.amax(1, keepdim=True)).exp()
        posterior /= posterior.sum(1, keepdim=True)
        self.density = torch.where(told[:, None], posterior, self.density)

    def _likelihood(self, measured: Tensor, predicted: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Which observations tell anything, and the logarithm of their likelihood for each factor."""
        told = (predicted > 0) & measured.isfinite() & predicted.isfinite() & variance.isfinite()
        expected = predicted[:, None] * self.logs.exp()
        noise = (variance + (MODEL_ERROR * measured).square())[:, None]
        told &= noise[:, 0] > 0
        z2 = (measured[:, None] - expected).square() / noise
        return told, -0.5 * (DEGREES + 1) * (z2 / DEGREES).log1p()

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


class Gain(Gains):
    """Belief about one factor, and about what share of its prediction's movement the truth has no part in.

    Attributes:
        density: float64 [shares, logarithms], of both together.
    """

    def __init__(self) -> None:
        super().__init__(len(SHARES))
        self.density /= len(SHARES)

    def shift(self, log: float) -> None:
        """The logarithm is expected elsewhere, by so much."""
        self._move(torch.full((len(SHARES),), log))

    def follow(self, log: float) -> None:
        """What is predicted has grown by so much, in logarithms, since it was last told."""
        self._move(-log * torch.tensor(SHARES))

    def observe(self, measured: Tensor, predicted: Tensor, variance: Tensor) -> None:
        """One observation, see `Gains.observe`; 0-d float64."""
        told, likelihood = self._likelihood(*(x.expand(len(SHARES)) for x in (measured, predicted, variance)))
        if told.all():
            posterior = self._walked() * (likelihood - likelihood.max()).exp()
            self.density = posterior / posterior.sum()

    def _move(self, by: Tensor) -> None:
        """Moves each share's logarithms, between places linearly."""
        size = len(self.logs)
        at = torch.arange(size) - by[:, None].double() / self.step
        below = at.floor()
        part, below = at - below, below.long().clamp(0, size - 1)
        above = (below + 1).clamp(max=size - 1)
        moved = (1 - part) * self.density.gather(1, below) + part * self.density.gather(1, above)
        self.density = moved / moved.sum()

    @property
    def mean(self) -> Tensor:
        """Of the factor, 0-d float64."""
        return super().mean.sum()

    @property
    def error(self) -> Tensor:
        """The factor's standard deviation, 0-d float64."""
        return (self.density * (self.logs.exp() - self.mean).square()).sum().sqrt()


class Predictions:
    """What is predicted of each of several things, and how far nearly all of it has fallen.

    Then it is residuals that vanish, and the truth may not depend on them. Where predictions grow, it is what comes
    before the loss, which moves the truth too; where a few fall, as of experts without tokens, it is not the loss.

    Attributes:
        known: of each its base, which is its first prediction or so, and its last.
        fallen: the logarithm of what nearly all have fallen to, at most 0.
    """

    def __init__(self) -> None:
        self.known: dict[Any, tuple[float, float]] = {}
        self.fallen = 0.0

    def told(self, predictions: Iterable[tuple[Any, float]]) -> float:
        """Some are predicted anew; returns by how much nearly all have fallen further, a logarithm, at most 0."""
        for which, now in predictions:
            if now > 0:
                base, _ = self.known.get(which, (now * math.exp(-self.fallen), now))
                self.known[which] = base, now
        logs = torch.tensor([math.log(now / base) for base, now in self.known.values()], dtype=torch.float64)
        before = self.fallen
        self.fallen = min(before, float(logs.quantile(NEARLY))) if len(logs) else before
        return self.fallen - before


def _cauchy(x: Tensor, scale: float, step: float) -> Tensor:
    """Cauchy's law of that scale on a grid, from its distribution function: the scale may be finer than the grid."""
    below, above = torch.atan((x - step / 2) / scale), torch.atan((x + step / 2) / scale)
    density = (above - below) / math.pi
    return density / density.sum()
