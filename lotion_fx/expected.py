"""`expected_loss`: what a model's loss is expected to be under randomized rounding of its weights, and who says so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from lotion_fx.estimate import Estimate, check_rounds, estimate
from lotion_fx.loss_graph import LossFunction
from lotion_fx.passes.moments.certificate import EXACT, UNKNOWN, Certificate
from lotion_fx.progress import with_a_bar
from lotion_fx.scalars import check_count, check_generator
from lotion_fx.settings import MOMENTS
from lotion_fx.switches import switched
from lotion_fx.vanishing import tell_of_unknown, unknown

_ARBITERS = 8  # roundings that tell which of two estimates is nearer


@dataclass(frozen=True)
class ExpectedLoss:
    """The expected loss of one batch. ``str()`` is a table.

    It is of this batch and this loss, by the graph alone. The ``term`` of `report` is what training adds: of the loss
    that is trained on, over the last steps, its size measured there.

    Args:
        loss: at the latent weights, 0-d.
        total: the expected loss, 0-d; differentiable, the blocks' scales included.
        terms: each quantized weight's part of ``total - loss``; they add up to it, to rounding where all are exact.
        certificates: how each part is known; one that is ``"unknown"`` is counted as 0.
        samples: the number of roundings sampled; what follows is None without any.
        sampled: mean loss over them, and ``error``, its standard error.
        rtn: loss at round-to-nearest weights.
        alone: for each weight, (predicted, measured, standard error) of the increase with it alone rounded.
    """

    loss: Tensor
    total: Tensor
    terms: Mapping[str, Tensor]
    certificates: Mapping[str, Certificate]
    samples: int = 0
    sampled: float | None = None
    error: float | None = None
    rtn: float | None = None
    alone: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)

    @property
    def ratios(self) -> dict[str, float]:
        """Predicted over measured increase, for each weight alone; nan where none was measured."""
        return {name: _ratio(predicted, measured) for name, (predicted, measured, _) in self.alone.items()}

    @property
    def ratio(self) -> float:
        """Predicted over measured increase, all weights rounded."""
        loss = float(self.loss.detach())
        return math.nan if self.sampled is None else _ratio(float(self.total.detach()) - loss, self.sampled - loss)

    @property
    def ratio_error(self) -> float:
        """The standard error of `ratio`, that of the roundings; nan where there were fewer than two."""
        if self.sampled is None or self.error is None:
            return math.nan
        return abs(_ratio(self.ratio * self.error, self.sampled - float(self.loss.detach())))

    def __str__(self) -> str:
        rows = []
        for name, term in self.terms.items():
            is_known = self.certificates[name].kind != UNKNOWN
            row = [name, f"{float(term.detach()):.4g}" if is_known else "?"]
            if self.samples:
                predicted, measured, error = self.alone[name]
                ratio = _ratio(predicted, measured)
                told = f"{ratio:.2f} ± {abs(_ratio(ratio * error, measured)):.1g}" if is_known else "?"
                row += [f"{measured:.4g} ± {error:.1g}", told]
            rows.append([*row, str(self.certificates[name])])
        headers = ["parameter", "increase", *(["measured alone", "ratio"] if self.samples else []), "certificate"]
        widths = [*[None] * (len(headers) - 1), 60]
        return tabulate(rows, headers, disable_numparse=True, maxcolwidths=widths) + "\n" + self._foot()

    def _foot(self) -> str:
        loss, total = float(self.loss.detach()), float(self.total.detach())
        text = f"loss {loss:.6g}, expected {total:.6g} (+{total - loss:.4g})"
        if self.samples:
            text += f"; {self.samples} roundings: {self.sampled:.6g} ± {self.error:.2g}"
            text += f", ratio {self.ratio:.2f} ± {self.ratio_error:.1g}"
            text += f"; at round-to-nearest {self.rtn:.6g}"
        return text


def _ratio(predicted: float, measured: float) -> float:
    return predicted / measured if measured else math.nan


def expected_loss(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None = None,
    samples: int = 0,
    *,
    moments: str = "auto",
    generator: torch.Generator | None = None,
) -> ExpectedLoss:
    """The loss expected under randomized rounding of a transformed model's weights, on one batch.

    The model runs in ``eval()`` mode at its latent weights, uncompiled. Parts are multiplied by ``strength`` and by
    what `calibrate` found.

    Args:
        model: transformed; it need not have run yet.
        batch: ``(inputs, targets)`` with ``loss_fn(model(inputs), targets)``; without ``loss_fn`` the arguments of a
            model that returns its loss, a dictionary as keywords.
        samples: roundings to sample, of all weights together and of each alone. Their linear part, whose mean is known,
            is taken out, so that a few tell much.
        moments: ``"closed"`` (a moment stream wherever no covariance need be dropped), ``"diagonal"`` (wherever there
            are rules), ``"auto"`` (the one of these two that a few roundings, always the same ones, bear out) or
            ``"off"`` (for all the joint-graph form, which trains without the loss in the graph).
        generator: of the sampled roundings.

    Raises:
        ValueError: the model is not under lotion_fx, or sharded; the batch or the loss is not as above.
    """
    check_count("samples", samples, 0, "the number of roundings to sample, 0 or more")
    check_generator(generator)
    if moments not in ("auto", *MOMENTS):
        raise ValueError(f"moments={moments!r}: expected one of auto, {', '.join(MOMENTS)}")
    found = _borne_out(model, batch, loss_fn) if moments == "auto" else estimate(model, batch, loss_fn, moments)
    if samples:
        check_rounds(f"samples={samples}", found.weights.values())
    result = _predicted(found)
    uncertain = [name for name, certificate in found.certificates.items() if certificate.kind == UNKNOWN]
    tell_of_unknown("expected_loss, which counts it as 0", unknown(found.graph.steps, uncertain))
    return _with_samples(found, result, samples, generator) if samples else result


def _borne_out(model: nn.Module, batch: Any, loss_fn: LossFunction | None) -> Estimate:
    """The estimate with closed moments; the one with diagonal moments where roundings show that it is nearer."""
    closed = estimate(model, batch, loss_fn, "closed")
    if not all(weight.quantizer.noise.rounds for weight in closed.weights.values()):
        return closed
    if all(certificate.kind in (EXACT, UNKNOWN) for certificate in closed.certificates.values()):
        return closed
    # Of the others neither says anything.
    names = [name for name, certificate in closed.certificates.items() if certificate.kind != UNKNOWN]
    diagonal = estimate(model, batch, loss_fn, "diagonal")
    device = closed.graph.parameters[names[0]].device
    measured, error = closed.sample(names, _ARBITERS, torch.Generator(device).manual_seed(0))
    with switched(model, plain=True):  # an increase, without the user's strength
        away = [abs(each.predicted(names, {}) - measured) for each in (closed, diagonal)]
    return diagonal if away[1] + error < away[0] else closed


def _predicted(found: Estimate) -> ExpectedLoss:
    total = found.total(dict.fromkeys(found.weights, 1.0), found.graph.parameters)
    return ExpectedLoss(total.detach().new_tensor(found.latent), total, found.parts(), found.certificates)


def _with_samples(
    found: Estimate, result: ExpectedLoss, samples: int, generator: torch.Generator | None
) -> ExpectedLoss:
    """The result with what sampled roundings say beside it."""
    increase, error = found.sample(list(found.weights), samples, generator)
    alone = {}
    for name in with_a_bar("sampling", found.weights, len(found.weights)):
        alone[name] = (found.predicted([name], {}), *found.sample([name], samples, generator))
    sampled, rtn = found.latent + increase, found.at_nearest()
    return replace(result, samples=samples, sampled=sampled, error=error, rtn=rtn, alone=alone)
