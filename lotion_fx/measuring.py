"""The size of the expected-loss term, measured instead of assumed.

The curvature that graphs hand out tells how the term is spread over weights. How large it is depends on the loss: the
count T of its terms, their weights, how its residuals are scaled. That is measured. Where a step's forward runs at
weights w + eps, rounded at random about their mean w,

    1/2 eps . grad L(w + eps)        has the mean        1/2 E[eps' H eps] = E L(w + eps) - L(w)        to second order

for any loss whatever; `narrowed` takes out most of what noise as wide as weights adds beyond it. So a few early steps
and then one in `EVERY` have their forwards at such weights; the gradient that arrives at the optimizer tells the rest.
What it holds of the loss's slope at w has mean zero and most of the spread: the optimizer's first moment, where it
keeps one, is taken out as far as it agrees, and eps is scaled to show beside what remains (`amplitude`). What scales or
clips gradients between backward and step scales the term: it is told apart, for one step's is not that of all. `gain`
holds what is believed after each measurement: of the whole term, and of each weight's share in it.
`holding` tells when parameters are at such weights. What is expected before, and in between, `output_noise` tells of
the loss, and `lag` of how curvature's average is behind.
"""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lotion_fx.amplitude import next_amplitude
from lotion_fx.gain import Gains, Predictions, walked
from lotion_fx.held import Forwards, can_be_measured, clipping_of, gradient_of, narrowed, sums_of
from lotion_fx.holding import Holding
from lotion_fx.lag import Lag, bounded
from lotion_fx.optimizers import ascending, first_moments
from lotion_fx.output_noise import MOVE, OUTPUTS, SUMS, OutputNoise, Told
from lotion_fx.residuals import Residuals, size_known, size_told
from lotion_fx.shards import over_shards, summed

if TYPE_CHECKING:
    from lotion_fx.state import Weight

FIRST = 2
"""Steps in a row that measure, from the second with a term on: the first has no curvature yet."""

EVERY = 200
"""From then on the next measurement comes after as many steps as there were so far, for a training changes fastest at
its beginning, and in the long run after so many."""

LOOKS, MOVES = 8, 4
"""From one measurement to the next curvature's sum is looked at so often, for what the loss does may not follow it; and
outputs so often, or have noise, see `output_noise`."""

RARELY = 3
"""So many times as far apart are measurements where outputs tell a likelihood's curvature; looks are as near."""

NOTHING_TOLD = "none of {} measurements told anything: do weights change between forward and step?"
_OWN_REACH, _OWN_STEP, _OWN_PRIOR = math.log(8.0), 0.1, 0.25  # of one weight's factor beside the common one


class Measuring:
    """When a model's term is measured, and what is known of its size.

    Args:
        weights: the model's, selected or not.
        is_on: whether it is measured at all.
        counts: whether T is in the term; else its curvature is that of a loss of its own, a mean over rows.

    Attributes:
        is_on: whether it still is.
        begun: steps that were to measure so far.
        draws: those of them that told something.
        next_at: the step of the next one.
        amplitude: of its noise, in units of that of randomized rounding.
        idle: forwards that were to measure, and no weight could be.
        guess: the size as the gradients at the outputs of the first step tell it; None before.
        holding: the parameters that are at noisy values for it.
        outputs: the noise at the model's outputs.
        lag: how far curvature's moving average is behind.
    """

    def __init__(self, weights: Sequence[Weight], *, is_on: bool, counts: bool = True) -> None:
        self.weights, self.is_on, self.counts = weights, is_on, counts
        self.begun, self.draws, self.next_at, self.amplitude, self.idle = 0, 0, 1, 1.0, 0
        self.residuals, self.outputs = Residuals(), OutputNoise(is_on=is_on and counts)
        self.guess: float | None = None
        self._is_told, self._is_stepped, self._since, self._left_off = False, False, 0, ""
        self._common, self._own, self._walk = Gains(1), _own_gains(0), 0.0
        self._whole, self._before = torch.zeros(5, dtype=torch.float64), self._common.density
        self._unexpected = self._before
        self._clips: dict[Weight, float] = {}  # what gradients were scaled by after their backward pass, of late
        self._order: list[Weight] = []  # of the rows of `_own`
        self._factors: dict[Weight, float] = {}
        self._curvatures, self.lag = Predictions(), Lag()  # the sum of each weight's
        self._looked_at: dict[Weight, float] = {}  # that sum's average, in the step under way
        self._moved_at: int | None = None  # the step whose outputs had noise
        self._told: Told | None = None  # what that told
        self._to_look_at: set[Weight] = set()
        self._begun_from = 0, 0, 0  # how often, when due, since when, before the measurement under way
        self.holding, self._forwards = Holding(), Forwards()

    # ----------------------------------------------------------------------------------------------------- the outcome

    def factor(self, weight: Weight, steps: int) -> float:
        """By what a weight's term is multiplied in the step after so many with a term.

        It has none until its size was measured, unless that does not come about.
        """
        if self.is_on and not self.draws and steps < FIRST:
            return 0.0
        return self.size(weight)

    def size(self, weight: Weight) -> float:
        """Measured over counted size of a weight's term; as it is guessed where nothing was measured."""
        return self._unclipped(weight) * (self._clips.get(weight, 1.0) if self.draws else 1.0)

    def _unclipped(self, weight: Weight) -> float:
        if weight in self._factors:
            return self._factors[weight]
        return float(self._common.mean) if self.draws else self.guess or 1.0

    @property
    def common(self) -> tuple[float, float] | None:
        """Measured over counted size of the whole term, and its standard error; None before any measurement."""
        clip = statistics.fmean(self._clips.values()) if self._clips else 1.0
        return (clip * float(self._common.mean), clip * float(self._common.error)) if self.draws else None

    @property
    def why_not(self) -> str:
        """Why the term's size was not measured, where it was to be; empty if it was, or was not to be."""
        if self.draws:
            return ""
        tried = self.begun or self.idle
        why = NOTHING_TOLD.format(tried) if self.is_on and tried > FIRST else self._left_off
        guess = "" if self.guess in (None, 1) else f"; by the gradients at the outputs {self.guess:.3g} times the count"
        return why and why + guess

    def leave_off(self, why: str = "") -> None:
        """Nothing is measured any more; what was, holds."""
        self.holding.drop()
        self.is_on, self._left_off = False, why

    def forget(self) -> None:
        """Nothing is measured any more, and nothing that was holds."""
        self.leave_off()
        self.begun, self.draws, self.guess, self._factors = 0, 0, None, {}

    # ------------------------------------------------------------------------------------------------------- measuring

    def looks_away(self) -> None:
        """A forward comes that is no training's."""
        self.holding.put_back()
        self.outputs.leave_alone()
        self._moved_at = None

    def hold(self, steps: int, *, of_part: bool = False, gathers: bool = True) -> None:
        """A training forward of the step after so many begins, and it is to measure if one is due.

        Args:
            steps: optimizer steps since the term first came.
            of_part: it is a forward of a part of the model, after which noise stays until the step.
            gathers: the step gathers curvature.
        """
        holding = self.holding
        self._forwards.come(steps, is_first=holding.is_anew)
        holding.is_anew = False
        if holding.held and (steps != holding.steps or self._forwards.give_up(holding.held)):
            holding.drop()
        if holding.held:
            holding.go_on(of_part=of_part)
            return
        looks, gap = steps - self._since, max((self.next_at - self._since) // self._apart, 1)
        is_due = self.draws and LOOKS * looks // gap > LOOKS * (looks - 1) // gap
        self._to_look_at, self._looked_at = set(self.weights) if is_due else set(), {}
        self.lag.step_comes()
        is_due = self.draws and MOVES * looks // gap > MOVES * (looks - 1) // gap
        if self.outputs.forward_comes(steps, is_due=bool(is_due), gathers=gathers and self.is_on):
            self.residuals.clear()
        self._told = None
        if self.outputs.now:
            self._to_look_at = set(self.weights)
        if not self.is_on or steps < self.next_at:
            return
        if not any(can_be_measured(weight) for weight in self.weights):  # as those of a discriminator that waits
            self.idle += 1
            return
        self._begun_from = self.begun, self.next_at, self._since
        self.begun += 1
        self._walk = self.outputs.walk or walked(self._since, steps)
        self.residuals.clear()
        self.next_at, self._since = steps + self._pause(steps), steps
        self._is_told, self._is_stepped, self._to_look_at = False, False, set()  # a measurement looks at all
        self.outputs.leave_alone()
        holding.begin(self.weights, steps, self.amplitude, of_part=of_part)

    def _pause(self, steps: int) -> int:
        """Steps to the next measurement."""
        return 1 if self.begun < FIRST else min(max(steps, 1), EVERY) * self._apart

    @property
    def _apart(self) -> int:
        return RARELY if self.outputs.is_known else 1

    # ------------------------------------------------------------------------------------------------------- observing

    @property
    def watches(self) -> bool:
        """Whether the gradients at the outputs are to tell of the loss in the step under way."""
        guesses = bool(self._left_off) and self.begun <= 1 and self.guess is None
        return self.holding.is_noisy or bool(self.outputs.now) or guesses

    def _expect(self, loss_count: Tensor | None, loss_scale: Tensor | None, group: Any, device: torch.device) -> None:
        """Before anything was measured: what the size may be expected to be, see `residuals.size_told`."""
        if self.begun > 1 or self.guess is not None:
            return
        terms = loss_count if loss_count is not None or self.counts else 0.0
        self.guess = size_told(*self.residuals.over_ranks(terms, loss_scale, group, device), counts=self.counts)
        self._common.shift(math.log(self.guess))

    def _outputs_tell(
        self, loss_count: Tensor | None, loss_scale: Tensor | None, group: Any, device: torch.device, sign: float
    ) -> None:
        """A step ends of which the outputs were looked at, or had noise; the loss is `sign` times what backward saw."""
        seen, scale, ranks = self.residuals.over_ranks(loss_count, loss_scale, group, device)
        known, moved = size_known(seen, scale, ranks), seen[-1 - OUTPUTS * SUMS : -1].view(OUTPUTS, SUMS)
        self._told = self.outputs.observe(moved, float(seen[-1]), sign * scale, ranks, known=known)

    def _scale(self, factor: float) -> None:
        """All that is known of the size is another by a factor."""
        self._factors = {weight: _rounded(factor * size) for weight, size in self._factors.items()}

    def observe(
        self,
        pairs: Sequence[tuple[Weight, Tensor]],
        optimizer: torch.optim.Optimizer,
        pending: Tensor | None,
        loss_scale: Tensor | None,
        loss_count: Tensor | None,
        group: Any,
        curvature_of: Callable[[Weight, Tensor], Tensor | None],
        total_of: Callable[[Weight, Tensor], Tensor],
    ) -> set[Weight]:
        """An optimizer is about to step, and the gradients are the loss's own still.

        Args:
            pairs: its weights, with their parameters, which have a ``.grad`` and hold their own values.
            pending: the loss scale that is still in the gradients.
            loss_scale: the one that backward saw.
            loss_count: T of the step on this rank.
            group: of ranks, over which gradients are averaged; None of one alone.
            curvature_of: h over this rank's part of a weight, without this step's.
            total_of: its sum, float64 [1].

        Returns:
            The weights whose noise was wider than rounding's, or all where outputs had some: what the step gathered is
            curvature elsewhere.
        """
        self._is_stepped = True
        if self.outputs.now == MOVE:
            self._moved_at = self._forwards.steps
        are_moved = self._moved_at == self._forwards.steps
        if self.outputs.now:
            sign = -1.0 if pairs[0][1] in ascending(optimizer) else 1.0
            self._outputs_tell(loss_count, loss_scale, group, pairs[0][1].device, sign)
        told = [(weight, p, h) for weight, p in pairs if (h := self.holding.held.pop(weight, None)) is not None]
        moments = first_moments(optimizer, [parameter for _, parameter in pairs]) if told else {}
        signs = {parameter: -1.0 for parameter in ascending(optimizer)} if told else {}
        sums = []
        for weight, p, h in told:
            grad = signs.get(p, 1.0) * gradient_of(p, pending)
            sums.append(sums_of(weight, p, h, grad, moments.get(p), curvature_of(weight, p), loss_scale))
        if self._is_given_up(group, pairs[0][1].device):
            self.amplitude = min(self.amplitude, 1.0)
            return {weight for weight, _ in pairs}
        if sums:
            self._expect(loss_count, loss_scale, group, told[0][1].device)
            whole = over_shards(torch.stack(sums), [p for _, p, _ in told])
            self._learn([weight for weight, _, _ in told], whole, told[0][2].amplitude)
        elif self.watches:
            self._expect(loss_count, loss_scale, group, pairs[0][1].device)
        elif seen := [pair for pair in pairs if pair[0] in self._to_look_at]:
            curvatures = over_shards(torch.stack([total_of(weight, p) for weight, p in seen]), [p for _, p in seen])
            self._look_at([weight for weight, _ in seen], curvatures[:, 0].tolist())
        return {w for w, _ in pairs} if are_moved else {w for w, _, h in told if h.amplitude > 1}

    def _is_given_up(self, group: Any, device: torch.device) -> bool:
        """Whether any rank gave the step up, if it measures."""
        if not self.is_on or self._since != self._forwards.steps:
            return False
        return bool(summed(torch.tensor(float(self._forwards.gave_up), device=device), group))

    def _learn(self, weights: Sequence[Weight], sums: Tensor, amplitude: float) -> None:
        """One measurement of these weights; where each optimizer steps a few, of them and those before.

        Args:
            sums: float64 [weights, 12] of eps g, eps m, sigma^2 g^2, sigma^2 g m, sigma^2 m^2, sigma^2 h, sigma^2, w^2,
                h, g b, b^2 and g^2, with the gradient g, what is known of the slope m, the curvature h, and the
                gradient b as the backward pass left it; the last three of samples.
            amplitude: of the noise.
        """
        eps_g, eps_m, gg, gm, mm, predicted, spread, energy, total, *samples = sums.cpu().unbind(1)
        clip, told = clipping_of(samples, [self._clips.get(weight, 1.0) for weight in weights])
        eps_g, gm, gg = eps_g / clip, gm / clip, gg / clip**2
        agrees, half = torch.where(mm > 0, gm / mm, 0.0), 0.5 * narrowed(spread, energy, amplitude)
        measured = half * (eps_g - agrees * eps_m)
        variance = half.square() * (gg - agrees * gm).clamp(min=0)
        predicted = 0.5 * predicted
        if not bool((predicted.sum() > 0) & (variance.sum() > 0) & sums.isfinite().all()):
            self.amplitude = 1.0  # if it was that
            return
        if not self._is_told:
            self.draws, self._is_told = self.draws + 1, True
            self._whole, self._before = torch.zeros_like(self._whole), self._common.density
        self._common.restore(self._before)
        self._averages(dict(zip(weights, total.tolist(), strict=True)))
        self._whole += torch.stack([measured, predicted, variance, spread, energy]).sum(1)
        measured_whole, predicted_whole, variance_whole, spread_whole, energy_whole = self._whole
        found = zip(weights, clip.tolist(), told.tolist(), strict=True)
        self._clips |= {w: _rounded(0.5 * (c + self._clips.get(w, c))) for w, c, is_told in found if is_told}
        self._common.observe(measured_whole[None], predicted_whole[None], variance_whole[None], self._walk)
        shown, widest = predicted_whole / variance_whole.sqrt(), (energy_whole / spread_whole).sqrt()
        self.amplitude = next_amplitude(amplitude, float(self._common.mean * shown), float(widest))
        self._align()
        places = {weight: place for place, weight in enumerate(self.weights)}
        at, common = torch.tensor([places[weight] for weight in weights]), float(self._common.mean)
        everything = torch.zeros(3, len(self.weights), dtype=torch.float64)
        everything[:, at] = torch.stack([measured, common * predicted, variance])
        self._own.observe(*everything)
        own = self._own.mean
        own = own * (predicted.sum() / (own[at] * predicted).sum())  # together they are the whole
        self._factors = {weight: _rounded(common * float(own[place])) for weight, place in places.items()}

    def _look_at(self, weights: Sequence[Weight], curvatures: Sequence[float]) -> None:
        """Between two measurements, the sum of each of these weights' curvature."""
        before, self._looked_at = float(self._common.mean), dict(zip(weights, curvatures, strict=True))
        self._averages(self._looked_at)
        self._scale(float(self._common.mean) / before)
        self._to_look_at -= set(weights)

    def _averages(self, curvatures: Mapping[Weight, float]) -> None:
        """The averages' sums have changed: the size is larger by what they have fallen by, where residuals vanish.

        Where outputs told what the curvature is, it is that still, whether they fall or rise.
        """
        now = {weight: math.exp(self.lag.before) * h for weight, h in curvatures.items() if h > 0}
        logs = [math.log(h / known[1]) for w, h in now.items() if (known := self._curvatures.known.get(w))]
        moved = self._curvatures.told(now.items())
        moved = moved if self.outputs.log is None else self.lag.moves.tell(logs)
        self._common.shift(-moved)
        self.outputs.shift(-moved)

    @property
    def looks(self) -> bool:
        """Whether `lags` is to be told of the step under way."""
        return bool(self._looked_at)

    def lags(self, fresh: Mapping[Weight, float]) -> None:
        """The sums of the curvature that the step itself gathered: their average is behind while they grow or fall."""
        seen, self._looked_at = self.lag.seen(self._looked_at, fresh), {}
        if seen is None or (self._moved_at == self._forwards.steps and self._told is None):
            return
        before, known, steps = float(self._common.mean), self.outputs.log, self._forwards.steps
        if self._told is None:  # what outputs told holds this in it
            self._common.shift(self.lag.learn(seen, steps) if known is None else 0.0)
        else:
            self._unexpected = self._common.density if known is None else self._unexpected
            log = self.outputs.learn(self._told, bounded(seen, steps))
            if self.outputs.is_first:  # for all of the step's optimizers
                self._common.restore(self._unexpected)
                self._common.expected(log)
            else:
                self._common.shift(log - (known or 0.0))
        self._scale(float(self._common.mean) / before)

    def _align(self) -> None:
        """The beliefs of weights stand in their order: a model may get and lose some."""
        if self._order == self.weights:
            return
        before, self._own = dict(zip(self._order, self._own.density, strict=True)), _own_gains(len(self.weights))
        for place, weight in enumerate(self.weights):
            self._own.density[place] = before.get(weight, self._own.density[place])
        self._order = list(self.weights)

    # ----------------------------------------------------------------------------------------------------- saved state

    def saved(self) -> dict[str, Any]:
        """What `restore` takes, in the order of the weights."""
        is_anew = self.holding.held and not self._is_stepped  # who resumes measures in this step
        begun, next_at, since = self._begun_from if is_anew else (self.begun, self.next_at, self._since)
        return {
            "is_on": self.is_on,
            "left_off": self._left_off,
            "guess": self.guess,
            "begun": begun,
            "draws": self.draws,
            "next_at": next_at,
            "amplitude": self.amplitude,
            "since": since,
            "forwards": self._forwards.most_by_now,
            "fallen": self._curvatures.fallen,
            "lag": self.lag.log,
            "outputs": self.outputs.saved(),
            "offset": self._common.offset,
            "told": self._packed(),
        }

    def _packed(self) -> str:
        """What is believed, as text whose length the number of weights tells."""
        self._align()
        known, clips = self._curvatures.known, self._clips
        each = [[self._unclipped(w), *known.get(w, (0.0, 0.0)), clips.get(w, 0.0)] for w in self.weights]
        factors = torch.tensor(each, dtype=torch.float64).flatten()
        values = torch.cat([self._common.density.flatten(), self._own.density.flatten(), factors])
        return base64.b64encode(values.numpy().tobytes()).decode()

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Stands where `saved` was called; of other weights than now only what holds for all is taken."""
        self.holding.drop()
        self.is_on, self.begun, self.draws = saved["is_on"], saved["begun"], saved["draws"]
        self.next_at, self.amplitude, self.guess = saved["next_at"], saved["amplitude"], saved.get("guess")
        self._left_off, self._forwards.most = saved.get("left_off", ""), saved.get("forwards", 1)
        self._factors, self._clips, self._curvatures = {}, {}, Predictions()
        self._order, self._own, self._moved_at = [], _own_gains(0), None
        if "offset" not in saved:  # of before: beliefs had another form, and all is measured anew
            self.begun = self.draws = self.next_at = 0
            self.guess = None
            return
        self._since, known, self.lag = saved["since"], {}, Lag(saved.get("lag", 0.0))
        self.outputs.restore(saved.get("outputs"))
        values = torch.frombuffer(bytearray(base64.b64decode(saved["told"])), dtype=torch.float64)
        count, each, common = len(self.weights), len(self._own.logs), self._common.density.numel()
        self._common.restore(values[:common], saved["offset"])
        if len(values) == common + count * (each + 4):
            own, factors = values[common:].split([count * each, count * 4])
            self._own.restore(own)
            self._order = list(self.weights)
            told = dict(zip(self.weights, factors.view(-1, 4).tolist(), strict=True))
            self._factors = {weight: size for weight, (size, *_) in told.items()} if self.draws else {}
            self._clips = {weight: clip for weight, (*_, clip) in told.items() if clip > 0}
            known = {weight: (base, now) for weight, (_, base, now, _) in told.items() if now > 0}
        self._curvatures.restore(known, saved["fallen"])


def _rounded(x: float) -> float:
    """To three digits, more than are known: the last bits of sums depend on the number of ranks, and stay out."""
    return float(f"{x:.2e}")


def _own_gains(count: int) -> Gains:
    return Gains(count, _OWN_REACH, _OWN_STEP, _OWN_PRIOR)
