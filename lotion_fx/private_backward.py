"""PyTorch's private interfaces to the backward pass that is running, see `private`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge


def current_backward() -> int:
    """A number for the backward pass that is running on this thread, -1 outside of one."""
    return torch._C._current_graph_task_id()


def after_backward(callback: Callable[[], None]) -> None:
    """Runs a callback when the backward pass under way is over, after DDP's and FSDP's own."""
    engine = torch.autograd.Variable._execution_engine
    engine.queue_callback(lambda: engine.queue_callback(callback))


def adds_to_grad_of(parameter: Tensor) -> bool:
    """Whether the backward pass under way will add to the ``.grad`` of a parameter that requires one.

    It does not where others are asked for, as by ``autograd.grad`` or ``backward(inputs=)``.
    """
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)
    except RuntimeError:  # `autograd.grad` of this very parameter, which leaves `.grad` alone
        return False


@torch.compiler.disable
def is_batched(grad: Tensor) -> bool:
    """Whether a pass with ``is_grads_batched=True`` hands on several gradients in one, which few ops know."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)


def takes_grad_of(parameter: Tensor) -> bool:
    """Whether the backward pass under way is an `autograd.grad` that was asked for the gradient of a parameter."""
    try:
        torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)
    except RuntimeError:
        return True
    return False


def graph_node(node: Any) -> Any:
    """The node of the compiled graph that has an output with this node, or with a view's; None if it is none."""
    while node is not None and not isinstance(node, BackwardCFunction):
        node = node.next_functions[0][0] if node.next_functions else None
    return node


def places_in(node: Any, leaves: Sequence[Tensor | None]) -> list[int | None]:
    """Which of the gradients that a node makes are those of these leaves."""
    places = {after: place for place, (after, _) in enumerate(node.next_functions) if after is not None}
    return [None if leaf is None else places.get(get_gradient_edge(leaf).node) for leaf in leaves]
