"""PyTorch's private interfaces to a model that is traced, at other parameters than its own, see `private`."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

_one_at_a_time = threading.RLock()
_DETACHING = (torch.detach, Tensor.detach)


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


class FunctionsFollowed(TorchFunctionMode):
    """Inside, what is traced of a `torch.autograd.Function` is its forward, as if it had been written without one.

    Autograd looks away while such a forward runs, which no graph is told: what the forward itself switches on and off,
    or detaches, has no bearing on its gradient, and would end that of the graph.

    Args:
        found: told of each Function that is not torch's own, with the arguments of its first call.
    """

    def __init__(self, found: dict[type, tuple[Any, ...]] | None = None) -> None:
        super().__init__()
        self.found = {} if found is None else found
        self.forwards = _forwards()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        switches, detaches = func is torch._C._set_grad_enabled, func in _DETACHING
        called = _function_called(self.forwards) if switches or detaches or not torch.is_grad_enabled() else None
        if called is None:
            return func(*args, **kwargs)
        function, given = called
        if function not in self.found and not function.__module__.startswith("torch."):
            self.found[function] = given
        if switches:
            with torch._C.DisableTorchFunction():
                return func(*args)
        return torch.ops.aten.alias.default(*args, *kwargs.values()) if detaches else func(*args, **kwargs)


def _forwards() -> dict[CodeType, type | None]:
    """Each `torch.autograd.Function` by the code of its forward; None by that of what decorates one, or anything."""
    found: dict[CodeType, type | None] = {}
    above: list[type] = [torch.autograd.Function]
    while above:
        below: list[type] = type.__subclasses__(above.pop())
        above += below
        for function in below:
            forward: Any = function.forward  # type: ignore[attr-defined]
            inner = inspect.unwrap(forward)
            if forward is not inner and hasattr(forward, "__code__"):
                found[forward.__code__] = None
            if hasattr(inner, "__code__"):
                found[inner.__code__] = function
    return found


def _function_called(forwards: Mapping[CodeType, type | None]) -> tuple[type, tuple[Any, ...]] | None:
    """The outermost `torch.autograd.Function` whose forward runs now, with its arguments; None of none."""
    found, frame = None, inspect.currentframe()
    while frame is not None:
        if frame.f_code in forwards and (function := _of_frame(frame, forwards)) is not None:
            names, others, _, values = inspect.getargvalues(frame)
            given = (*(values[name] for name in names), *(values[others] if others else ()))
            of_context: type | None = getattr(type(given[0]), "_forward_cls", None) if given else None
            found = (function, given) if of_context is None else (of_context, given[1:])
        frame = frame.f_back
    return found


def _of_frame(frame: FrameType, forwards: Mapping[CodeType, type | None]) -> type | None:
    """The Function whose forward a frame runs, or decorates."""
    known = forwards[frame.f_code]
    if known is not None:
        return known
    inside = (forwards.get(x.__code__) for x in frame.f_locals.values() if isinstance(x, FunctionType))
    return next((function for function in inside if function is not None), None)
