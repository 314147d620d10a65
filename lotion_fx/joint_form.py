"""The curvature h of one batch, in the form that training takes it in: the joint graph's, uncompiled."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lotion_fx.compiling import joint_vectors
from lotion_fx.likelihood import LABELS, draws, likelihood_of, parametrizing, sampled_loss
from lotion_fx.loss_graph import LossFunction, LossGraph
from lotion_fx.passes.attach.attach import LATENT, Plan
from lotion_fx.passes.attach.part import Part
from lotion_fx.passes.attach.probe import HEADER, Code, Header, Layout
from lotion_fx.passes.moments.certificate import ANALYTIC, FISHER
from lotion_fx.state import Weight
from lotion_fx.update import dense, marginals


def curvatures_of(
    graph: LossGraph, weights: Mapping[str, Weight], loss_fn: LossFunction | None
) -> dict[str, tuple[Tensor, str]]:
    """h of each weight, float32 in its shape, and the form that it is in, ``"analytic"`` or ``"fisher"``.

    Args:
        graph: of the loss on one batch.
        weights: by their names in the graph.
        loss_fn: what made the loss, if that is known: under ``curvature="ggn"`` it may tell the likelihood.

    Returns:
        Without the weights that the loss does not depend on.
    """
    if not weights:
        return {}
    at = {list(graph.parameters).index(name): name for name in weights}
    plans = {index: Plan(LATENT, weights[name].quantizer, weights[name].layout) for index, name in at.items()}
    with graph.same_draws():
        given = joint_vectors(graph.gm, graph.inputs({}), plans, [lambda outputs: outputs[0]])
    vectors = {i: (vector, grad, _loss_count(vector)) for i, (vector, grad) in given.items()}
    likelihood = next(weight.smoothing.settings.likelihood for weight in weights.values())
    if likelihood is not None:
        with contextlib.suppress(ValueError):  # a loss that is known tells more than what `transform` was told
            likelihood = likelihood_of(loss_fn)
        own, count = _at_drawn_labels(graph, plans, likelihood)
        for i, vector in own.items():
            if i in vectors and Header.of(vector).common_code is Code.ANALYTIC:
                vectors[i] = vector, vectors[i][1], float(count)
    return {at[i]: _curvature(weights[at[i]], *found) for i, found in vectors.items()}


def _loss_count(vector: Tensor) -> float:
    header = Header.of(vector)
    return max(float(header.loss_count / header.calls), 1.0)


def _at_drawn_labels(graph: LossGraph, plans: Mapping[int, Plan], likelihood: str) -> tuple[dict[int, Tensor], int]:
    """Probe vectors of the loss at labels that the model draws itself, and how many labels a draw has."""
    count = 1

    def drawn(outputs: Sequence[Tensor]) -> Tensor:
        nonlocal count
        output = parametrizing(outputs[1:], likelihood)
        count = draws(output, likelihood)
        return sampled_loss(output, likelihood)

    with graph.same_draws():
        found = joint_vectors(graph.gm, graph.inputs({}), plans, [drawn] * LABELS)
    return {i: vector for i, (vector, _) in found.items()}, count


def _curvature(weight: Weight, vector: Tensor, grad: Tensor, count: float) -> tuple[Tensor, str]:
    layout = weight.layout
    if Header.of(vector).common_code is Code.ANALYTIC:
        return _dense(layout.scaled(vector[:-HEADER].float(), count), layout), ANALYTIC
    h = grad.float().square() * count
    return _dense(marginals(h, layout), layout) if layout.kind == "factored" else h, FISHER


def _dense(payload: Tensor, layout: Layout) -> Tensor:
    return dense(torch.cat([payload, payload.new_ones(1)]), Part.whole(layout))
