"""How each weight's part of one batch's expected loss is estimated: what `expected_loss` shows and `calibrate` fits.

Weights whose noise reaches the loss by the rules of `passes.moments` are in a moment stream; the others take the
joint-graph form ``1/2 <h, sigma^2>`` (`joint_form`). Sampled roundings stand beside both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor

from lotion_fx import private
from lotion_fx.joint_form import curvatures_of
from lotion_fx.loss_graph import LossFunction, LossGraph, grad_mode_kept, loss_graph
from lotion_fx.passes.attach.attach import MEAN, smooth, variance
from lotion_fx.passes.moments import random_tensor
from lotion_fx.passes.moments.certificate import EXACT, SECOND_ORDER, UNKNOWN, Certificate, analyse
from lotion_fx.passes.moments.interpret import interpret, name_of
from lotion_fx.passes.moments.random_tensor import Note, Random
from lotion_fx.state import Weight, names_of
from lotion_fx.uses import learn_uses
from lotion_fx.vanishing import unknown

# Gauss-Legendre nodes and weights on [0, 1]: exact for losses that are polynomials of degree 8 in the variances.
_NODES = (0.06943184420297371, 0.33000947820757187, 0.6699905217924281, 0.9305681557970262)
_WEIGHTS = (0.17392742256872692, 0.32607257743127308, 0.32607257743127308, 0.17392742256872692)


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

    def total(
        self, shares: Mapping[str, Any], parameters: Mapping[str, Tensor], gm: fx.GraphModule | None = None
    ) -> Tensor:
        """The expected loss with each weight's noise at a share of its variance; 0 for one that is not named.

        Args:
            gm: another graph of the loss than its own.
        """
        changed, joint = self._noisy(shares, parameters)
        with grad_mode_kept(), self.graph.same_draws():
            loss = interpret(gm or self.graph.gm, self.graph.inputs({**parameters, **changed})).outputs[0]
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
            noise = variance(parameter, *weight.quantizer.constants) * (share * self.strength(name))
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

    def parts(self) -> dict[str, Tensor]:
        """Each weight's part: the increase along the way from no noise to all of it (Aumann and Shapley's value)."""
        fixed = {name: parameter.detach() for name, parameter in self.graph.parameters.items()}
        parts = dict.fromkeys(self.weights, 0.0)
        gm = _differentiable(self.graph.gm)
        for node, size in zip(_NODES, _WEIGHTS, strict=True):
            shares = {name: torch.tensor(node, dtype=torch.float64, requires_grad=True) for name in self.weights}
            with torch.enable_grad():
                total = self.total(shares, fixed, gm)
            slopes = torch.autograd.grad(total, list(shares.values()), allow_unused=True)
            for name, slope in zip(shares, slopes, strict=True):
                parts[name] += size * float(slope) if slope is not None else 0.0
        return {name: torch.tensor(part, dtype=torch.float64) for name, part in parts.items()}

    @torch.no_grad()
    def at_nearest(self) -> float:
        """The loss with every weight rounded to nearest."""
        return float(self.graph.loss({name: w.quantizer.rtn(self._latent(name)) for name, w in self.weights.items()}))

    @torch.no_grad()
    def sample(self, names: list[str], samples: int, generator: torch.Generator | None) -> tuple[float, float]:
        """The mean increase of the loss with these weights randomly rounded, and its standard error (nan of one).

        The part linear in the noise about its mean has mean zero and most of the spread: it is taken out.
        """
        increases = []
        for _ in range(samples):
            drawn = {name: self.weights[name].quantizer.rr(self._latent(name), generator) for name in names}
            steps = {name: q - self._mean(name) for name, q in drawn.items() if name in self.slopes}
            linear = sum(float((self.slopes[name] * step).sum()) for name, step in steps.items())
            increases.append(float(self.graph.loss(drawn)) - linear - self.latent)
        error = statistics.stdev(increases) / math.sqrt(samples) if samples > 1 else math.nan
        return statistics.fmean(increases), error

    @property
    @torch.no_grad()
    def off_levels(self) -> list[str]:
        """The weights that rounding changes."""
        return [
            n for n, w in self.weights.items() if not torch.equal(w.quantizer.rtn(self._latent(n)), self._latent(n))
        ]

    def _latent(self, name: str) -> Tensor:
        return self.graph.parameters[name].detach()

    def _mean(self, name: str) -> Tensor:
        return _mean(self.weights[name], self.graph.parameters[name])

    @cached_property
    def slopes(self) -> dict[str, Tensor]:
        """The loss's gradient at the latent weights."""
        leaves = {name: self._latent(name).requires_grad_() for name in self.weights}
        with torch.enable_grad():
            grads = torch.autograd.grad(self.graph.loss(leaves), list(leaves.values()), allow_unused=True)
        return {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}


def estimate(
    model: nn.Module, batch: Any, loss_fn: LossFunction | None, moments: str, *, called_batch: str = "batch"
) -> Estimate:
    names = names_of(model)
    for weight, name in names.items():
        if isinstance(weight.parameter(), DTensor):
            raise ValueError(f"model: {name!r} is sharded; expected_loss needs whole weights")
    graph = loss_graph(model, batch, loss_fn, called_batch=called_batch)
    weights = quantized_in(graph, names)
    at = {name: index for index, name in enumerate(graph.parameters)}
    certificates: dict[str, Certificate] = {}
    ended = dict.fromkeys(weights, "moments='off'")
    if moments != "off":
        with grad_mode_kept(), private.faked(graph.inputs({})) as fakes:
            for name in weights:
                fakes[at[name]] = random_tensor.weight(name, fakes[at[name]], fakes[at[name]])
            analysis = analyse(graph.gm, fakes, [0], moments == "diagonal")
            certificates, ended = dict(analysis.certificates), dict(analysis.ended)
    curvatures = {}
    if joint := {name: why for name, why in ended.items() if name in weights}:
        found = curvatures_of(graph, {name: weights[name] for name in joint}, loss_fn)
        for name, why in joint.items():
            curvatures[name], kind = found.get(name, (torch.zeros((), dtype=torch.float32), EXACT))
            certificates[name] = Certificate(kind, ended=why)
    for name, why in unknown(graph.steps, joint).items():
        certificates[name] = Certificate(UNKNOWN, ended=why)
    estimated = Estimate(graph, weights, {}, curvatures)
    for name in weights:
        known = _with_choices(certificates[name], name, graph)
        estimated.certificates[name] = _with_strength(known, name, estimated.strength(name))
    return estimated


def quantized_in(graph: LossGraph, names: Mapping[Weight, str]) -> dict[str, Weight]:
    """The quantized weights of a loss, by name; those that no graph has contained yet learn their uses from it.

    Raises:
        ValueError: there is none.
    """
    with grad_mode_kept():
        learn_uses(graph.gm, list(graph.parameters), graph.inputs({}), names)
    weights = {name: weight for weight, name in names.items() if weight.selected and name in graph.parameters}
    if not weights:
        raise ValueError("model: no weight of it is quantized, so nothing is random; see lotion_fx.report(model)")
    return weights


def check_rounds(what: str, weights: Iterable[Weight]) -> None:
    """Refuses to sample roundings whose variance is not the law's.

    Args:
        what: asks for them, as the user wrote it.
    """
    for noise in {weight.smoothing.settings.noise for weight in weights}:
        if not noise.rounds:
            raise ValueError(
                f"{what}: the model was transformed with noise={noise.name!r}, whose variance is that of no random "
                "rounding, so that none can be sampled to compare; leave it out: `round_` prints what its loss becomes"
            )


def _with_choices(certificate: Certificate, name: str, graph: LossGraph) -> Certificate:
    """A sum over roundings that all choose the same elements, as a mask, is none over all roundings."""
    step = graph.steps.get(name)
    if certificate.kind != EXACT or step is None or step.is_hidden:
        return certificate
    note = Note(f"what {step.op} chooses is taken as fixed", step.op, frozenset({name}))
    return replace(certificate, kind=SECOND_ORDER, notes=(note,))


def _differentiable(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph in which nothing hides a derivative: what `detach` hides changes with the noise nevertheless."""
    if not any(name_of(node.target) in _HIDING for node in gm.graph.nodes):
        return gm
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes:
        if name_of(node.target) == "detach":
            node.target = torch.ops.aten.alias.default
        elif name_of(node.target) == "_set_grad_enabled":
            node.args = (True,)
    return fx.GraphModule(gm, graph)


_HIDING = ("detach", "_set_grad_enabled")


def _with_strength(certificate: Certificate, name: str, strength: float) -> Certificate:
    """A term that is multiplied by anything but 1 is no expectation."""
    if certificate.kind != EXACT or strength == 1 or not certificate.path:
        return certificate
    return replace(certificate, kind=SECOND_ORDER, notes=(Note(f"strength {strength:.3g}", "term", frozenset({name})),))


def _mean(weight: Weight, parameter: Tensor) -> Tensor:
    """The mean of a weight's random rounding, differentiable: itself, if the law is unbiased and nothing saturates."""
    if weight.quantizer.unbiased:
        return parameter
    fmt, axis, noise = weight.quantizer.constants
    return smooth(parameter, None, MEAN, fmt, axis, "none", 1, 1, noise)
