"""Backward passes that are asked for some gradients alone, and what they tell of curvature.

Autograd hands a probe its gradient in a plain ``backward()``. ``backward(inputs=...)`` and ``torch.autograd.grad`` name
what they want, and nobody names probes. But the node of a compiled graph computes theirs all the same, and is asked for
them here, where the pass asks for their weights. What `autograd.grad` returns may be looked at only: it counts where a
loop hands gradients to an optimizer that no backward pass has made.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lotion_fx import private_backward

if TYPE_CHECKING:
    from lotion_fx.state import Weight
    from lotion_fx.tally import Tally


def tell_of_backward(outputs: Iterable[Any], tally: Tally, probed: Sequence[Weight]) -> None:
    """Has a model's tally told before a backward pass comes through a graph, and of curvature that it leaves out.

    Args:
        outputs: of the graph.
        probed: the weights whose probes its node has gradients of.
    """
    nodes = {x.grad_fn for x in outputs if isinstance(x, Tensor) and x.grad_fn is not None}
    graphs = {found for node in nodes if (found := private_backward.graph_node(node)) is not None}
    watch = _Watch(tally, probed, graphs)
    for node in nodes:
        node.register_prehook(watch)


class _Watch:
    """Called before a backward pass comes through any output of a graph."""

    def __init__(self, tally: Tally, probed: Sequence[Weight], graphs: Iterable[Any]) -> None:
        self.tally = weakref.ref(tally)  # autograd's nodes are no place to keep a model, nor themselves
        self.weights = [weakref.ref(weight) for weight in probed]
        self.graphs = [weakref.ref(graph) for graph in graphs]  # one, and those before it whose outputs it passes on
        self.backward = -1

    def __call__(self, _: Any) -> None:
        tally, backward = self.tally(), private_backward.current_backward()
        if tally is None:
            return
        tally.backward_comes()
        weights = [weight for known in self.weights if (weight := known()) is not None]
        if not weights or tally.sampling or self.backward == backward:
            return
        self.backward = backward
        probe = weights[0].gathered.probe
        if probe is None or private_backward.adds_to_grad_of(probe):
            return
        for graph in [graph for known in self.graphs if (graph := known()) is not None]:
            _take_from(graph, tally, weights)


def _take_from(graph: Any, tally: Tally, weights: Sequence[Weight]) -> None:
    """Takes the probes' gradients as soon as a graph's node has them, once."""
    places = private_backward.places_in(graph, [weight.gathered.probe for weight in weights])
    if all(place is None for place in places):
        return

    def arrived(gradients: Sequence[Tensor | None], _: Any) -> None:
        handle.remove()
        for weight, place in zip(weights, places, strict=True):
            gradient, parameter = None if place is None else gradients[place], weight.master
            if gradient is None or parameter is None:
                continue
            if private_backward.adds_to_grad_of(parameter):
                weight.gathered.arrived(gradient)
                tally.curvature_arrived(weight)
            elif private_backward.takes_grad_of(parameter):
                weight.gathered.was_taken(gradient)
                tally.curvature_arrived(weight, taken=gradient)

    handle = graph.register_hook(arrived)
