"""Noise at a model's outputs: how much curvature the loss has there, beside what squared gradients say.

A few rows' worth of squared gradients tell the curvature of a likelihood whose labels the model predicts. Of squares,
hinges or ratios they tell the size of residuals instead. But for noise s of mean zero, added to the outputs z,

    s . grad L(z + s)        has the mean        s' H s        to third order,

H the loss's own second derivatives, whatever it is, and next to ``T sum (s grad)^2`` that is the factor by which
squared gradients are wrong (Hutchinson 1989, of a trace). So a few steps have their outputs moved a little, by a
quarter of what the loss would have them move, or by as little as shows. Where a likelihood is recognized, nothing is.

The noise is ``sin`` of the outputs themselves, of a short period and a phase for each column. So ranks, micro-batches
and what is computed once more in a backward pass have the noise that one batch would have, and no random number is
drawn. It never takes an output across 0 or 1 that never was there, such as a rate or a probability.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lotion_fx.gain import WALK
from lotion_fx.numerics.uniforms import uniforms

OUTPUTS, SUMS = 8, 13
"""Tensors of one forward that may have noise at most; numbers that are told of each."""

SHARE = 0.25
"""How large the noise is to be, next to residuals: the change of the outputs that would undo their gradient."""

WIDE = 1.5
"""By what gradients' squares grow where outputs have noise that is too wide for the loss: by 1 + SHARE^2 they may."""

SHOWS, LITTLE, ENOUGH = 2.5, 4.0, 16.0
"""An observation counts if the curvature shows so many standard deviations. Noise that shows it by more than `ENOUGH`
is not taken, nor, where it is `LARGE`, one that shows it by more than `LITTLE`."""

LARGE = 0.5
"""Standard deviations of the outputs. Wider noise is taken where targets are far off, which a loss has to tell."""

CHANGE, TRIES = 4.0, 6
"""By what factor noise grows at most from one observation to the next, and how many that show nothing end it."""

PERIOD = 0.25
"""Of the noise, in standard deviations of the outputs."""

FACTOR_WALK, ERROR = 0.4, 0.1
"""How far the factor walks from one observation to the next, in logarithms, and what they differ by for no reason."""

KNOWN_WALK = 0.01
"""How far the size of a likelihood's term walks from one measurement to the next."""

LOOK, MOVE = "look", "move"


def told_of(place: int, output: Tensor, noise: Tensor | None, grad: Tensor) -> Tensor:
    """What the gradient g of one output tells, as the loss saw it with its noise s: float64 [`OUTPUTS`, `SUMS`].

    In the row of its place sums over the elements of rows that have a gradient: 1, z, z^2, z < 0, z > 0, z > 1, s g,
    (s g)^2 and s^2; then 1 and g^2 of rows without noise, and of those with.
    """
    told = torch.zeros(OUTPUTS, SUMS, dtype=torch.float64, device=grad.device)
    if place >= OUTPUTS or not _may_move(output) or type(grad) is not Tensor:
        return told
    g, s = grad.float(), torch.zeros_like(grad, dtype=torch.float32) if noise is None else noise.float()
    z, live, moved = output.float() - s, g.ne(0), s.ne(0)
    if g.dim() > 1:
        live, moved = (each.any(-1, keepdim=True).expand_as(g) for each in (live, moved))
    z, squares, clean, moved = torch.where(live, z, 0.0), g.square(), live & ~moved, live & moved
    of_all = live, z, z.square(), z < 0, z > 0, z > 1, s * g, s.square() * squares, s.square() * live
    sums = *of_all, clean, squares * clean, moved, squares * moved
    told[place] = torch.stack([each.sum(dtype=torch.float64) for each in sums])
    return told


def _may_move(output: Tensor) -> bool:
    """Whether an output is a plain tensor of real numbers, no shard of one, nor a nested one."""
    return (
        type(output) is Tensor
        and output.is_floating_point()
        and output.layout == torch.strided
        and not output.is_nested
    )


@dataclass(frozen=True, eq=False)
class Told:
    """One observation of the factor.

    Args:
        log, variance: its logarithm, beside the squared gradients of the step itself, and how far that is off.
    """

    log: float
    variance: float


class OutputNoise:
    """Of one model.

    Attributes:
        now: what the forwards of the step under way have: `LOOK`, their outputs are looked at; `MOVE`, and moved; "".
        is_on: whether steps still are to come; not where a likelihood was recognized, or noise shows nothing.
        log: the logarithm of the factor, beside the moving average of squared gradients; None before it was seen.
        amplitude: of the noise, in standard deviations of the outputs; 0 before these were looked at.
    """

    def __init__(self, *, is_on: bool) -> None:
        self.is_on, self.now, self.amplitude = is_on, "", 0.0
        self.log: float | None = None
        self._variance, self._unseen, self._steps, self._is_owed = 0.0, 0, -1, False
        self._last: Told | None = None
        self._before: tuple[float | None, float] = None, 0.0
        self._scales = torch.zeros(OUTPUTS, 3, dtype=torch.float64)  # deviation, is of one sign, is in [0, 1]

    @property
    def walk(self) -> float:
        """How far the term's size walks from one measurement to the next, beside what outputs tell; 0 of nothing."""
        return 0.0 if self.log is None else KNOWN_WALK if self.is_known else WALK

    @property
    def is_known(self) -> bool:
        """Whether outputs tell a likelihood's curvature, which they do exactly: the rest is of the weights alone."""
        return self.log is not None and not self.amplitude

    # ---------------------------------------------------------------------------------------------------- forward pass

    def forward_comes(self, steps: int, *, is_due: bool, gathers: bool) -> bool:
        """A training forward of the step after so many begins; returns whether it is the step's first.

        Args:
            is_due: this step is to be one; ``gathers``: it gathers curvature, else the next that does is it.
        """
        is_first, self._steps, self._is_owed = steps != self._steps, steps, self._is_owed or is_due
        self.now = "" if not (self.is_on and self._is_owed and gathers) else MOVE if self.amplitude else LOOK
        return is_first

    def leave_alone(self) -> None:
        """The forward under way is none of these."""
        self.now = ""

    def noise(self, output: Tensor, place: int) -> Tensor | None:
        """What is to be added to the output at a place among a forward's, of its shape and dtype; None of nothing."""
        deviation, has_sign, is_share = self._scales[place].tolist() if place < OUTPUTS else (0.0, 0.0, 0.0)
        if self.now != MOVE or not deviation or not _may_move(output):
            return None
        columns = output.shape[-1] if output.dim() > 1 else 1
        phases = uniforms(self._steps * OUTPUTS + place, torch.arange(columns, device=output.device))
        z = output.float()
        waves = (2 * math.pi * (z / (PERIOD * deviation) + phases)).sin()
        first = waves[..., :1] if waves.dim() > 1 else (2 * math.pi * z / deviation).sin()
        waves = waves * (0.5 + 2 * first).clamp(0, 1)  # of two rows in five nothing, to compare with
        noise = math.sqrt(2) * self.amplitude * deviation * waves
        if has_sign:
            room = 0.5 * torch.minimum(z.abs(), (1 - z).abs()) if is_share else 0.5 * z.abs()
            noise = torch.minimum(torch.maximum(noise, -room), room)
        return noise.to(output.dtype)

    # ------------------------------------------------------------------------------------------------------------ step

    def observe(self, seen: Tensor, terms: float, scale: float, ranks: int, *, known: float | None) -> Told | None:
        """A step ends that had these: what it tells, None of nothing.

        Args:
            seen: what `told_of` tells, over all outputs and ranks.
            terms: T, over all ranks.
            scale: of the loss, in the gradients, which may be the negative of them.
            ranks: over which gradients are averaged.
            known: the factor, if the gradients at the outputs are a likelihood's.
        """
        had, self.now, self._is_owed = self.now, "", False
        if not had or not self.is_on:
            return None
        if known is not None:
            self.amplitude = 0.0
            return Told(math.log(known), ERROR**2)
        count, total, squares, below, above, beyond, moved, hidden, energy, *apart = seen.cpu().unbind(1)
        variance = (squares / count.clamp(min=1) - (total / count.clamp(min=1)).square()).clamp(min=0)
        has_sign = (below == 0) | (above == 0)
        scales = torch.stack([variance.sqrt(), has_sign, has_sign & (below == 0) & (beyond == 0)], 1)
        self._scales = torch.where(scales.isfinite().all(1, keepdim=True), scales, self._scales)
        elements = max(float(count.sum()), 1.0)
        wanted = min(max(SHARE * math.sqrt(elements), SHOWS), ENOUGH)  # standard deviations to show it by
        if had == LOOK:
            self.amplitude = wanted / math.sqrt(elements) if bool((variance > 0).any()) else 0.0
            return None
        clean, still, noisy, stirred = (torch.where(energy > 0, each, 0.0) for each in apart)
        mean, share = still / clean.clamp(min=1), noisy.sum() / clean.sum().clamp(min=1)
        numerator, denominator = math.copysign(1, scale) * float(moved.sum()), terms * float((energy * mean).sum())
        if not (denominator > 0 and float(hidden.sum()) > 0 and math.isfinite(denominator + numerator)):
            return None
        shown, grown = numerator / math.sqrt(float(hidden.sum())), float(stirred.sum() / (share * still.sum()))
        change = wanted / abs(shown) if abs(shown) > 1 else CHANGE
        change = min(change, SHARE * math.sqrt(2 / (grown - 1))) if grown > WIDE else change
        if self.amplitude * change > LARGE:
            change = min(change, max(LARGE / self.amplitude, LITTLE / abs(shown)))
        self.amplitude *= min(max(change, CHANGE**-2), CHANGE)
        if shown < SHOWS:
            self._unseen += 1
            self.is_on = self._unseen < TRIES
            return None
        self._unseen = 0
        return Told(math.log(ranks * numerator * abs(scale) / denominator), shown**-2 + ERROR**2)

    def learn(self, told: Told, lag: float) -> float:
        """One observation, of which the last `lag` that is told holds; returns the logarithm.

        Args:
            lag: the logarithm of the step's own curvature over its moving average, beside which the factor is kept.
        """
        if told is not self._last:
            self._last, self._before = told, (self.log, self._variance)
        before, variance = self._before
        known = variance + FACTOR_WALK**2
        share = 1.0 if before is None else known / (known + told.variance)
        self.log = share * (told.log + lag) + (1 - share) * (before or 0.0)
        self._variance = share * told.variance
        return self.log

    @property
    def is_first(self) -> bool:
        """Whether the last observation was the first."""
        return self._last is not None and self._before[0] is None

    def shift(self, log: float) -> None:
        """The moving average of squared gradients is known to have changed, and the factor with it."""
        before, variance = self._before
        self.log = None if self.log is None else self.log + log
        self._before = None if before is None else before + log, variance

    # ----------------------------------------------------------------------------------------------------- saved state

    def saved(self) -> str:
        """What `restore` takes, as text of one length."""
        log = math.nan if self.log is None else self.log
        numbers = [self.is_on, log, self._variance, self.amplitude, self._unseen, self._is_owed]
        values = torch.cat([torch.tensor(numbers, dtype=torch.float64), self._scales.flatten()])
        return base64.b64encode(values.numpy().tobytes()).decode()

    def restore(self, saved: str | None) -> None:
        """Stands where `saved` was called; as before anything was seen, of a state that has none."""
        if saved is None:
            self.__init__(is_on=self.is_on)  # type: ignore[misc]
            return
        values = torch.frombuffer(bytearray(base64.b64decode(saved)), dtype=torch.float64)
        is_on, log, self._variance, self.amplitude, unseen, is_owed = values[:6].tolist()
        self.is_on, self._unseen, self._is_owed = bool(is_on), int(unseen), bool(is_owed)
        self.log, self._scales = None if math.isnan(log) else log, values[6:].view(OUTPUTS, 3).clone()
        self.leave_alone()
