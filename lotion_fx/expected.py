"""`expected_loss`: what a model's loss is expected to be under randomized rounding of its weights, and who says so.

Weights whose noise reaches the loss by the rules of `passes.moments` are in a moment stream; the others take the
joint-graph form ``1/2 <h, sigma^2>``. `calibrate` compares both with sampled roundings.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lotion_fx import variants as backend
from lotion_fx.likelihood import draws, likelihood_of, output_in, sampled_loss
from lotion_fx.loss_graph import LossFunction, LossGraph, grad_mode_kept, loss_graph
from lotion_fx.numerics import rounding
from lotion_fx.passes.attach.attach import LATENT, MEAN, Plan, smooth, variance
from lotion_fx.passes.attach.probe import HEADER, Code, Layout
from lotion_fx.passes.attach.usage import weight_uses
from lotion_fx.passes.moments import random_tensor
from lotion_fx.passes.moments.certificate import ANALYTIC, EXACT, FISHER, SECOND_ORDER, Certificate, analyse
from lotion_fx.passes.moments.interpret import interpret
from lotion_fx.passes.moments.random_tensor import Note, Random
from lotion_fx.private import faked
from lotion_fx.state import MOMENTS, Weight
from lotion_fx.transformation import names_of
from lotion_fx.update import dense, marginals

_LABELS = 4  # draws that Gauss-Newton curvature is averaged over

# Gauss-Legendre nodes and weights on [0, 1]: exact for losses that are polynomials of degree 8 in the variances.
_NODES = (0.06943184420297371, 0.33000947820757187, 0.6699905217924281, 0.9305681557970262)
_WEIGHTS = (0.17392742256872692, 0.32607257743127308, 0.32607257743127308, 0.17392742256872692)


@dataclass(frozen=True)
class ExpectedLoss:
    """The expected loss of one batch. ``str()`` is a table.

    Args:
        loss: at the latent weights, 0-d.
        total: the expected loss, 0-d; differentiable, the blocks' scales included.
        terms: each quantized weight's part of ``total - loss``; they add up to it, to rounding where all are exact.
        certificates: how each part is known.
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

    def __str__(self) -> str:
        rows = []
        for name, term in self.terms.items():
            row = [name, f"{float(term.detach()):.4g}"]
            if self.samples:
                predicted, measured, error = self.alone[name]
                row += [f"{measured:.4g} ± {error:.1g}", f"{_ratio(predicted, measured):.2f}"]
            rows.append([*row, str(self.certificates[name])])
        headers = ["parameter", "term", *(["measured alone", "ratio"] if self.samples else []), "certificate"]
        widths = [*[None] * (len(headers) - 1), 60]
        return tabulate(rows, headers, disable_numparse=True, maxcolwidths=widths) + "\n" + self._foot()

    def _foot(self) -> str:
        loss, total = float(self.loss.detach()), float(self.total.detach())
        text = f"loss {loss:.6g}, expected {total:.6g} (+{total - loss:.4g})"
        if self.samples:
            text += f"; {self.samples} roundings: {self.sampled:.6g} ± {self.error:.2g}, ratio {self.ratio:.2f}"
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
    moments: str = "closed",
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
            are rules) or ``"off"`` (for all the joint-graph form, which trains without the loss in the graph).
        generator: of the sampled roundings.

    Raises:
        ValueError: the model is not under lotion_fx, or sharded; the batch or the loss is not as above.
    """
    if samples < 0:
        raise ValueError(f"samples={samples!r}: expected the number of roundings to sample, 0 or more")
    if moments not in MOMENTS:
        raise ValueError(f"moments={moments!r}: expected one of {', '.join(MOMENTS)}")
    found = estimate(model, batch, loss_fn, moments)
    result = found.result()
    return found.with_samples(result, samples, generator) if samples else result


@dataclass
class Estimate:
    """One batch's graph and its quantized weights, by name, with how each one's part is estimated.

    Args:
        curvatures: h of the weights outside of the moment stream, in their shapes, float32.
    """

    graph: LossGraph
    weights: dict[str, Weight]
    certificates: dict[str, Certificate]
    curvatures: dict[str, Tensor]

    def total(self, shares: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Tensor:
        """The expected loss with each weight's noise at a share of its variance; 0 for one that is not named."""
        changed, joint = self._noisy(shares, parameters)
        with grad_mode_kept():
            loss = interpret(self.graph.gm, self.graph.inputs({**parameters, **changed})).outputs[0]
        loss = loss.mean if isinstance(loss, Random) else loss
        return loss + torch.stack(joint).sum() if joint else loss

    def _noisy(
        self, shares: Mapping[str, Any], parameters: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """The weights that enter the graph changed, random or at their mean; and the terms that stand beside it."""
        changed: dict[str, Any] = {}
        joint: list[Tensor] = []
        for name, share in shares.items():
            weight, parameter = self.weights[name], parameters[name]
            mean = _mean(weight, parameter)
            if mean is not parameter:
                changed[name] = parameter + share * (mean - parameter)
            assert weight.format is not None
            law = weight.format.name, weight.axis, weight.smoothing.noise.name
            noise = variance(parameter, *law) * (share * self.strength(name))
            if name in self.curvatures:
                joint.append(0.5 * (self.curvatures[name] * noise).sum())
            else:
                changed[name] = random_tensor.weight(name, changed.get(name, parameter), noise.to(parameter.dtype))
        return changed, joint

    def strength(self, name: str) -> float:
        """What its term is multiplied by, in the form that it takes here."""
        weight = self.weights[name]
        return weight.joint_strength if name in self.curvatures else weight.stream_strength

    @torch.no_grad()
    def predicted(self, names: list[str], factors: Mapping[str, float]) -> float:
        """The increase of the loss with these weights rounded, each term multiplied by its factor, 1 by default."""
        shares = {name: factors.get(name, 1.0) for name in names}
        changed, joint = self._noisy(shares, self.graph.parameters)
        beside = float(sum(joint))  # not as a difference of losses, which rounds it off
        return beside + (float(self.total(shares, self.graph.parameters)) - self.latent - beside if changed else 0.0)

    @cached_property
    @torch.no_grad()
    def latent(self) -> float:
        """The loss at the latent weights."""
        return float(self.graph.loss({}))

    def result(self) -> ExpectedLoss:
        total = self.total(dict.fromkeys(self.weights, 1.0), self.graph.parameters)
        loss = total.detach().new_tensor(self.latent)
        return ExpectedLoss(loss, total, self._terms(), self.certificates)

    def _terms(self) -> dict[str, Tensor]:
        """Each weight's part: the increase along the way from no noise to all of it (Aumann and Shapley's value)."""
        fixed = {name: parameter.detach() for name, parameter in self.graph.parameters.items()}
        parts = dict.fromkeys(self.weights, 0.0)
        for node, size in zip(_NODES, _WEIGHTS, strict=True):
            shares = {name: torch.tensor(node, dtype=torch.float64, requires_grad=True) for name in self.weights}
            with torch.enable_grad():
                total = self.total(shares, fixed)
            slopes = torch.autograd.grad(total, list(shares.values()), allow_unused=True)
            for name, slope in zip(shares, slopes, strict=True):
                parts[name] += size * float(slope) if slope is not None else 0.0
        return {name: torch.tensor(part, dtype=torch.float64) for name, part in parts.items()}

    # ------------------------------------------------------------------------------------------------------- sampling

    def with_samples(self, result: ExpectedLoss, samples: int, generator: torch.Generator | None) -> ExpectedLoss:
        """The result with what sampled roundings say beside it."""
        increase, error = self.sample(list(self.weights), samples, generator)
        alone = {}
        for name in self.weights:
            alone[name] = (self.predicted([name], {}), *self.sample([name], samples, generator))
        with torch.no_grad():
            rtn = float(self.graph.loss({name: self._rounded(name, rounding.rtn) for name in self.weights}))
        return replace(result, samples=samples, sampled=self.latent + increase, error=error, rtn=rtn, alone=alone)

    @torch.no_grad()
    def sample(self, names: list[str], samples: int, generator: torch.Generator | None) -> tuple[float, float]:
        """The mean increase of the loss with these weights randomly rounded, and its standard error (nan of one).

        The part linear in the noise about its mean has mean zero and most of the spread: it is taken out.
        """
        increases = []
        for _ in range(samples):
            draw = partial(rounding.rr, generator=generator)
            drawn = {name: self._rounded(name, draw, law=self.weights[name].smoothing.noise) for name in names}
            steps = {name: q - self._mean(name) for name, q in drawn.items() if name in self.slopes}
            linear = sum(float((self.slopes[name] * step).sum()) for name, step in steps.items())
            increases.append(float(self.graph.loss(drawn)) - linear - self.latent)
        error = statistics.stdev(increases) / math.sqrt(samples) if samples > 1 else math.nan
        return statistics.fmean(increases), error

    def _rounded(self, name: str, how: Callable[..., Tensor], **options: Any) -> Tensor:
        weight = self.weights[name]
        assert weight.format is not None
        return how(self.graph.parameters[name].detach(), weight.format, weight.axis, **options)

    def _mean(self, name: str) -> Tensor:
        return _mean(self.weights[name], self.graph.parameters[name])

    @cached_property
    def slopes(self) -> dict[str, Tensor]:
        """The loss's gradient at the latent weights."""
        leaves = {name: self.graph.parameters[name].detach().requires_grad_() for name in self.weights}
        with torch.enable_grad():
            grads = torch.autograd.grad(self.graph.loss(leaves), list(leaves.values()), allow_unused=True)
        return {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}


def estimate(model: nn.Module, batch: Any, loss_fn: LossFunction | None, moments: str) -> Estimate:
    names = names_of(model)
    for weight, name in names.items():
        if isinstance(weight.held(), DTensor):
            raise ValueError(f"model: {name!r} is sharded; expected_loss needs whole weights")
    graph = loss_graph(model, batch, loss_fn)
    at = {name: index for index, name in enumerate(graph.parameters)}
    with grad_mode_kept(), faked(graph.inputs({})) as fakes:
        new = {at[name]: weight for weight, name in names.items() if weight.uses is None and name in at}
        for index, uses in weight_uses(graph.gm, fakes, list(new)).items():
            new[index].learn(uses)
        weights = {name: weight for weight, name in names.items() if weight.selected and name in at}
        if not weights:
            raise ValueError("model: no weight of it is quantized, so nothing is random; see lotion_fx.report(model)")
        certificates: dict[str, Certificate] = {}
        ended = dict.fromkeys(weights, "moments='off'")
        if moments != "off":
            for name in weights:
                fakes[at[name]] = random_tensor.weight(name, fakes[at[name]], fakes[at[name]])
            analysis = analyse(graph.gm, fakes, [0], moments == "diagonal")
            certificates, ended = dict(analysis.certificates), dict(analysis.ended)
    curvatures = {}
    if joint := {name: why for name, why in ended.items() if name in weights}:
        vectors = _vectors(graph, {at[name]: _plan(weights[name]) for name in joint}, loss_fn, weights)
        for name, why in joint.items():
            found = vectors.get(at[name])
            curvatures[name], kind = _curvature(weights[name], *found) if found else (torch.zeros(()), EXACT)
            certificates[name] = Certificate(kind, ended=why)
    estimated = Estimate(graph, weights, {}, curvatures)
    for name in weights:
        estimated.certificates[name] = _with_strength(certificates[name], name, estimated.strength(name))
    return estimated


def _with_strength(certificate: Certificate, name: str, strength: float) -> Certificate:
    """A term that is multiplied by anything but 1 is no expectation."""
    if certificate.kind != EXACT or strength == 1 or not certificate.path:
        return certificate
    return replace(certificate, kind=SECOND_ORDER, notes=(Note(f"strength {strength:.3g}", "term", frozenset({name})),))


def _mean(weight: Weight, parameter: Tensor) -> Tensor:
    """The mean of a weight's random rounding, differentiable: itself, if the law is unbiased and nothing saturates."""
    assert weight.format is not None
    noise = weight.smoothing.noise
    if noise.unbiased and not weight.format.saturates:
        return parameter
    return smooth(parameter, None, MEAN, weight.format.name, weight.axis, "none", 1, 1, noise.name)


def _plan(weight: Weight) -> Plan:
    assert weight.format is not None
    return Plan(LATENT, weight.format.name, weight.axis, weight.layout)


def _vectors(
    graph: LossGraph, plans: Mapping[int, Plan], loss_fn: LossFunction | None, weights: Mapping[str, Weight]
) -> dict[int, tuple[Tensor, Tensor, float]]:
    """By placeholder index: the probe vector, the loss's gradient and the number of loss terms T."""
    given = backend.joint_vectors(graph.gm, graph.inputs({}), plans, [lambda outputs: outputs[0]])
    vectors = {i: (v, g, max(float(v[-1] / v[-HEADER]), 1.0)) for i, (v, g) in given.items()}
    likelihood = next(weight.smoothing.likelihood for weight in weights.values())
    if likelihood is None:
        return vectors
    with contextlib.suppress(ValueError):  # a loss that is known tells more than what `transform` was told
        likelihood = likelihood_of(loss_fn)
    name, terms = likelihood, 1

    def drawn(outputs: Sequence[Tensor]) -> Tensor:
        nonlocal terms
        output = output_in(outputs[1:], name)
        terms = draws(output, name)
        return sampled_loss(output, name)

    own = backend.joint_vectors(graph.gm, graph.inputs({}), plans, [drawn] * _LABELS)
    for i, (vector, _) in own.items():
        if i in vectors and vector[-2] == vector[-HEADER] * Code.ANALYTIC:
            vectors[i] = vector, vectors[i][1], float(terms)
    return vectors


def _curvature(weight: Weight, vector: Tensor, grad: Tensor, terms: float) -> tuple[Tensor, str]:
    """h of one weight from this batch, in the form that its training takes, and that form's name."""
    layout, (calls, code, _) = weight.layout, vector[-HEADER:].tolist()
    if code == calls * Code.ANALYTIC:
        payload = vector[:-HEADER].float()
        scaled = layout.groups * layout.rows if layout.kind == "factored" else payload.numel()
        payload = torch.cat([payload[:scaled] * terms, payload[scaled:]])
        return _dense(payload, layout), ANALYTIC
    h = grad.float().square() * terms
    return _dense(marginals(h, layout), layout) if layout.kind == "factored" else h, FISHER


def _dense(payload: Tensor, layout: Layout) -> Tensor:
    return dense(torch.cat([payload, payload.new_ones(1)]), layout, (0, layout.shape[0]))
