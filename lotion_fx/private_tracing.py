"""PyTorch's private interfaces to a model that is traced, at other parameters than its own, see `private`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointFunction

_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def parameters_replaced(model: nn.Module, others: Mapping[Tensor, Any]) -> Iterator[None]:
    """Inside, other tensors stand in for some of a model's parameters, wherever in it these are.

    `torch.func.functional_call` goes by name, and what it puts back into a module with two names is the stand-in.
    """
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in others
    ]
    try:
        for module, name, parameter in places:
            module._parameters[name] = others[parameter]
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


@contextlib.contextmanager
def checkpoints_inlined() -> Iterator[None]:
    """Inside, what is traced of a reentrant checkpoint is the function that it calls.

    It runs that without gradients, and once more in a backward pass of its own, of which a graph knows nothing.
    """

    def apply(function: Any, preserve: bool, *args: Any) -> Any:
        return original(function, preserve, *args) if get_proxy_mode() is None else function(*args)

    with _one_at_a_time:
        original, held = CheckpointFunction.apply, vars(CheckpointFunction).get("apply")
        try:
            CheckpointFunction.apply = apply  # type: ignore[method-assign]
            yield
        finally:
            if held is None:
                del CheckpointFunction.apply
            else:
                CheckpointFunction.apply = held  # type: ignore[method-assign]
