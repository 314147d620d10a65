"""`calibrate`: the strength of each weight's term from sampled roundings.

Curvature is an estimate, and the second order is not the whole: the predicted increase of the loss is commonly 0.7 to
0.9 of the measured one. Both can be had for each weight alone; their ratio is the factor its term is multiplied by.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lotion_fx.estimate import Estimate, check_rounds, estimate
from lotion_fx.loss_graph import LossFunction, listed
from lotion_fx.passes.moments.certificate import EXACT
from lotion_fx.scalars import check_count, check_generator
from lotion_fx.state import names_of, smoothings_of
from lotion_fx.switches import switched
from lotion_fx.vanishing import unknown

LIMIT = 8.0
"""A factor is kept within 1 / LIMIT and LIMIT: beyond, the measurement is noise or the model is far from trained."""

_SPREAD = 0.25
"""How far weights' own factors are expected to lie from the common one, relatively: noisier ones are drawn to it."""

_FITS = 3


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction | None = None,
    *,
    samples: int = 8,
    every: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Multiplies each weight's term so that the increase of the loss it predicts is the one that roundings show.

    A weight's factor is the measured over the predicted increase with it alone rounded; all are then scaled to meet the
    increase with all rounded. Exact terms keep theirs, 1; weights on their levels, as after `round_`, keep what they
    have, for rounding them tells nothing. The factors hold for training and for `expected_loss`, and `state_dict` saves
    them; what steps measure by themselves (`transform`'s ``calibrate``) ends here.

    Args:
        model: transformed; best trained for a while.
        batches: a few of them, as `expected_loss` takes them.
        loss_fn: as `expected_loss` takes it.
        samples: roundings a batch, of all weights together and of each alone.
        every: does nothing unless this many optimizer steps were taken since the last calibration, so that a training
            loop can call it each step; None calibrates at once.
        generator: of the roundings.

    Returns:
        The factor of each weight's term in training, by name, of those that it was measured for.

    Raises:
        ValueError: no batches, fewer than 2 samples, or what `expected_loss` raises.
    """
    check_count("samples", samples, 2, "at least 2 roundings, to know how far to trust them")
    if every is not None:
        check_count("every", every, 1, "a number of optimizer steps, or None to calibrate at once")
    check_generator(generator)
    names = {name: weight for weight, name in names_of(model).items()}
    check_rounds("calibrate", names.values())
    smoothings = smoothings_of(model)
    tallies = [smoothing.tally for smoothing in smoothings]
    if every is not None and not any(t.calibrated is None or t.steps - t.calibrated >= every for t in tallies):
        return {}
    batches = listed(batches)
    moments = smoothings[0].settings.moments
    forms = ("closed" if moments == "off" else moments, "off")
    measured = _Measured()
    estimates: dict[str, list[Estimate]] = {form: [] for form in forms}
    # Terms as they are: without factors, the user's strength included, which is no estimate's fault.
    with switched(model, plain=True):
        for place, batch in enumerate(batches):
            for form in forms:
                estimates[form].append(estimate(model, batch, loss_fn, form, called_batch=f"batches[{place}]"))
            measured.add(estimates[forms[0]][-1], samples, generator)
        streamed, joint = (_fit(estimates[form], measured) for form in forms)
    if not joint:
        return {}
    for name in streamed:
        names[name].gains = (streamed[name], joint[name])
    for tally in tallies:
        tally.calibrated_now()
        tally.measuring.forget()
    return joint


@dataclass
class _Measured:
    """Increases of the loss under sampled rounding, summed over batches."""

    together: float = 0.0
    alone: dict[str, float] = field(default_factory=dict)
    error2: dict[str, float] = field(default_factory=dict)

    def add(self, estimate: Estimate, samples: int, generator: torch.Generator | None) -> None:
        # What gradients say nothing of, no factor mends.
        names = [name for name in estimate.off_levels if name not in unknown(estimate.graph.steps, estimate.weights)]
        self.together += estimate.sample(names, samples, generator)[0] if names else 0.0
        for name in names:
            increase, error = estimate.sample([name], samples, generator)
            self.alone[name] = self.alone.get(name, 0.0) + increase
            self.error2[name] = self.error2.get(name, 0.0) + error**2


def _fit(estimates: list[Estimate], measured: _Measured) -> dict[str, float]:
    """The factors for one form of the term."""
    first = estimates[0]
    free = [name for name in measured.alone if first.certificates[name].kind != EXACT]
    factors = dict.fromkeys(measured.alone, 1.0)
    if not free:
        return factors
    predicted = {name: sum(e.predicted([name], {}) for e in estimates) for name in free}
    whole = sum(predicted.values())
    common = sum(measured.alone[name] for name in free) / whole if whole > 0 else 1.0
    for name in free:
        factors[name] = _own(predicted[name], measured.alone[name], measured.error2[name], common)
    for _ in range(_FITS):  # the terms are not quite additive, nor linear in their factors
        total = sum(e.predicted(list(factors), factors) for e in estimates)
        ratio = measured.together / total if total > 0 and measured.together > 0 else 1.0
        factors.update({name: _limited(factors[name] * ratio) for name in free})
    return factors


def _own(predicted: float, measured: float, error2: float, common: float) -> float:
    """One weight's ratio, drawn to the common one as far as its noise reaches (the mean of two Gaussians)."""
    if predicted <= 0:
        return _limited(common)
    prior2 = (predicted * common * _SPREAD) ** 2
    trust = prior2 / (prior2 + error2) if error2 > 0 else 1.0
    return _limited(trust * measured / predicted + (1 - trust) * common)


def _limited(factor: float) -> float:
    return min(max(factor, 1 / LIMIT), LIMIT)
