"""PyTorch's private interfaces to the backward pass that is running, see `private`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
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
