"""Moment propagation: a variance stream beside the mean, from randomly rounded weights to the loss.

Where the loss is in the graph, its expectation can be computed instead of estimated. Every value that depends on a
random weight is carried as a `Random`, its elementwise mean and variance and what is known of its dependences; a rule
for each op says how they pass through. The rules are PyTorch functions, so a graph is rewritten by tracing its own
interpretation: `stream` is a pure function from graph to graph.

Nothing is assumed in silence. A rule that is not exact leaves a `Note` on the mean or on the variance that it touches,
and the notes on the loss's mean are each weight's certificate: none, and the closed form equals the sum over all
roundings. An op without a rule ends the stream: the weights that reach it are handed to the joint-graph form.

Source: LOTION, arXiv 2510.08757, section 3; the rules name their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from lotion_fx import private
from lotion_fx.passes.moments.certificate import Certificate, analyse
from lotion_fx.passes.moments.interpret import interpret
from lotion_fx.passes.moments.random_tensor import Random, mean_of, weight

if TYPE_CHECKING:
    from lotion_fx.passes.pipeline import ForwardState


@dataclass(frozen=True)
class Streamed:
    """A graph whose loss is the expected one.

    Args:
        gm: takes the graph's inputs, then the variance of each weight in the stream.
        variances: for each of those weights' input index that of its variance.
        certificates: of each.
    """

    gm: fx.GraphModule
    variances: Mapping[int, int]
    certificates: Mapping[int, Certificate]


def stream(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    weights: Sequence[int],
    losses: Sequence[int],
    diagonal: bool,
    trace: Callable[[Callable[..., Any], Sequence[Any]], fx.GraphModule],
) -> Streamed:
    """Puts a variance stream beside the mean; a loss becomes the expected loss, any other output its mean.

    Args:
        gm: a pre-dispatch ATen graph with a list or tuple of outputs; left as it is.
        inputs: one (fake) tensor or number per placeholder.
        weights: the inputs that are weights under randomized rounding.
        losses, diagonal: see `analyse`.
        trace: makes a graph of a function of tensors.
    """
    names = {str(index): index for index in weights}
    candidates = [_random_weight(i, x, x) if str(i) in names else x for i, x in enumerate(inputs)]
    analysis = analyse(gm, candidates, losses, diagonal)
    certificates = {names[name]: certificate for name, certificate in analysis.certificates.items()}
    variances = {index: len(inputs) + position for position, index in enumerate(certificates)}

    def run(*args: Any) -> list[Any]:
        values = [_random_weight(i, x, args[variances[i]]) if i in variances else x for i, x in enumerate(args)]
        return [mean_of(output) for output in interpret(gm, values[: len(inputs)], losses).outputs]

    traced = trace(run, [*inputs, *(torch.zeros_like(inputs[i]) for i in certificates)])
    return Streamed(traced, variances, certificates)


def _random_weight(index: int, mean: Tensor, var: Tensor) -> Random:
    return weight(str(index), mean, var.to(mean.dtype))


def stream_losses(state: ForwardState) -> ForwardState:
    """`stream`, as a pass over a graph of torch functions.

    It does nothing where the graph returns no loss, or has a region that must stay whole: what is checkpointed would be
    no more.
    """
    weights = [index for index, plan in state.plans.items() if plan.moments != "off"]
    losses = _loss_outputs(state.gm) if weights and state.has_joint else []
    if not losses or any(isinstance(node.target, private.HigherOrderOperator) for node in state.gm.graph.nodes):
        return state
    diagonal = all(state.plans[index].moments == "diagonal" for index in weights)
    with torch.no_grad(), private.fake_mode_of(state.inputs):
        inputs = [x.detach() if isinstance(x, Tensor) else x for x in state.inputs]
        streamed = stream(private.trace(state.gm, inputs), inputs, weights, losses, diagonal, private.trace)
    for old, new in zip(*(gm.graph.find_nodes(op="placeholder") for gm in (state.gm, streamed.gm)), strict=False):
        private.copy_source(old, new)
    plans = {i: replace(p, layout=None) if i in streamed.variances else p for i, p in state.plans.items()}
    return replace(state, gm=streamed.gm, plans=plans, variances=streamed.variances, certificates=streamed.certificates)


def _loss_outputs(gm: fx.GraphModule) -> list[int]:
    """Which of a graph's outputs may be a loss: the floating scalars that require a gradient."""
    outputs = private.tree_leaves(gm.graph.output_node().args[0])
    values = [node.meta.get("example_value") if isinstance(node, fx.Node) else None for node in outputs]
    return [
        index
        for index, value in enumerate(values)
        if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point() and value.requires_grad
    ]
