"""PyTorch's private interfaces to a model that is traced at other parameters, see `private`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


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
