"""What is believed of a factor that is only ever observed with noise: a density over its logarithm.

The logarithm starts near 0 and walks, both with the heavy tails of Cauchy's law: it mostly stays, and may be anywhere.
An observation says of a factor g that ``measured = g * predicted + noise``, with the noise's variance. So what is
measured well is followed at once, what is measured badly is averaged for long, and what tells nothing changes nothing.

What is predicted moves by itself, too: of squared gradients, down to nothing as residuals vanish. The truth does not
follow, of squares not at all and of likelihoods for long (`Predictions`); where it does, the walk does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

REACH, STEP = 46.0, 0.05
"""Logarithms are kept up to this on both sides, so far apart: factors from 1e-20 to 1e20, to within 5 %."""

PRIOR, TOLD = 0.25, 0.15
"""How far from 1 the factor is expected before anything was observed; and from what outputs tell of it."""

CLOSELY = 3.0
"""Degrees of freedom of the t law about what outputs tell, whose tails are lighter than Cauchy's."""

WALK, DRIFT = 0.03, 0.1
"""How far it walks from one observation to the next at least, and how far while the steps of a training double."""

DEGREES = 8.0
"""Of freedom, of the noise's t law: an observation far off is an outlier rather than a proof."""

NEARLY = 0.75
"""Of all predictions, as many have fallen where it is said that nearly all have."""

MODEL_ERROR = 0.2
"""What two observations without noise differ by, relatively: the increase is known to second order alone."""


class Gains:
    """Beliefs about several factors, each observed for itself.

    Args:
        count: of factors.
        reach: logarithms are kept up to this on both sides.
        step: how far apart.
        prior: scale of the first density.

    Attributes:
        density: float64 [count, logarithms], of the factors' logarithms less ``offset``.
        offset: where logarithms of 0 are by now.
    """

    def __init__(self, count: int, reach: float = REACH, step: float = STEP, prior: float = PRIOR) -> None:
        half = round(reach / step)
        self.logs = torch.linspace(-half * step, half * step, 2 * half + 1, dtype=torch.float64)
        self.step, self.offset = step, 0.0
        self.density = _cauchy(self.logs, prior, step).expand(count, -1).clone()

    def restore(self, density: Tensor, offset: float | None = None) -> None:
        """Believes what was believed then, whatever the shape it comes in; where logarithms of 0 are stays or comes."""
        self.density = density.to("cpu", torch.float64, copy=True).view(-1, len(self.logs))
        self.offset = self.offset if offset is None else offset

    def shift(self, log: float) -> None:
        """The logarithms are expected elsewhere, by so much."""
        self.offset += log

    def expected(self, log: float) -> None:
        """The logarithms were to be expected about that from the first, and closely; what was observed stays."""
        was, now = self.logs / PRIOR, (self.logs + self.offset - log) / TOLD
        density = self.density * (1 + was.square()) / (1 + now.square() / CLOSELY) ** ((CLOSELY + 1) / 2)
        self.density = density / density.sum(1, keepdim=True)

    def observe(self, measured: Tensor, predicted: Tensor, variance: Tensor, walk: float = WALK) -> None:
        """One observation of each factor. Left out are those that are not finite, whose prediction is not positive, and
        those without noise, of a weight that had no part in the loss.

        Args:
            measured, predicted, variance: float64 [count], all in the loss's units, the last squared.
            walk: how far factors have walked since the last one, in logarithms.
        """
        told = (predicted > 0) & measured.isfinite() & predicted.isfinite() & variance.isfinite()
        expected = predicted[:, None] * self._factors()
        noise = (variance + (MODEL_ERROR * measured).square())[:, None]
        told &= noise[:, 0] > 0
        z2 = (measured[:, None] - expected).square() / noise
        likelihood = -0.5 * (DEGREES + 1) * (z2 / DEGREES).log1p()
        posterior = self._walked(walk) * (likelihood - likelihood.amax(1, keepdim=True)).exp()
        posterior /= posterior.sum(1, keepdim=True)
        self.density = torch.where(told[:, None], posterior, self.density)

    def _walked(self, far: float) -> Tensor:
        """The densities a walk later."""
        kernel = _cauchy(self.logs, far, self.step)
        size = 2 * len(self.logs)
        spectrum = torch.fft.rfft(self.density, size) * torch.fft.rfft(kernel, size)
        half = len(self.logs) // 2
        return torch.fft.irfft(spectrum, size)[:, half : half + len(self.logs)].clamp(min=1e-300)

    @property
    def mean(self) -> Tensor:
        """Of each factor, float64 [count]."""
        return (self.density * self._factors()).sum(1)

    @property
    def error(self) -> Tensor:
        """The standard deviation of each factor, float64 [count]."""
        return (self.density * (self._factors() - self.mean[:, None]).square()).sum(1).sqrt()

    def _factors(self) -> Tensor:
        return (self.logs + self.offset).exp()


def walked(before: int, now: int) -> float:
    """How far a factor walks between two steps of a training, which changes fastest at its beginning."""
    return max(WALK, DRIFT * math.log2((now + 1) / (before + 1)))


class Predictions:
    """What is predicted of each of several things, and how far nearly all of it has fallen.

    Then it is residuals that vanish, and the truth does not depend on them. Where predictions grow, it is what comes
    before the loss, which moves the truth too; where a few fall, as of experts without tokens, it is not the loss.

    Attributes:
        known: of each its base, the highest prediction so far over what nearly all had fallen to then, and its last.
        fallen: the logarithm of what nearly all have fallen to, at most 0.
    """

    def __init__(self) -> None:
        self.known: dict[Any, tuple[float, float]] = {}
        self.fallen = 0.0
        self._round: set[Any] = set()  # of a step, over all its optimizers
        self._fallen_before = 0.0

    def told(self, predictions: Iterable[tuple[Any, float]]) -> float:
        """Some are predicted anew; returns by how much nearly all have fallen since the last call, a logarithm."""
        told = dict(predictions)
        if self._round & told.keys():
            self._round, self._fallen_before = set(), self.fallen
        self._round |= told.keys()
        for which, now in told.items():
            if now > 0:
                base, _ = self.known.get(which, (0.0, now))
                self.known[which] = max(base, now * math.exp(-self._fallen_before)), now
        logs = torch.tensor([math.log(now / base) for base, now in self.known.values()], dtype=torch.float64)
        last = self.fallen
        self.fallen = min(self._fallen_before, float(logs.quantile(NEARLY))) if len(logs) else last
        return self.fallen - last

    def restore(self, known: Mapping[Any, tuple[float, float]], fallen: float) -> None:
        """Stands where a round of predictions ended so."""
        self.known, self.fallen = dict(known), fallen
        self._round, self._fallen_before = set(), fallen


def _cauchy(x: Tensor, scale: float, step: float) -> Tensor:
    """Cauchy's law of that scale on a grid, from its distribution function: the scale may be finer than the grid."""
    below, above = torch.atan((x - step / 2) / scale), torch.atan((x + step / 2) / scale)
    density = (above - below) / math.pi
    return density / density.sum()
