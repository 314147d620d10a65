"""What calling a transformed module runs: its own call, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lotion_fx import private


class CompiledCalls:
    """Makes what `nn.Module.compile` would call, for the modules of one model.

    A bare `nn.Sequential` needs a frame of our own, for Dynamo skips forwards of torch's own; so does a module that
    owns weights, whose hooks would run in Python and find them outside of every graph. Blocks of one model share the
    frame's code and what is compiled for it.
    """

    def __init__(self, backend: Callable[..., Any], **options: Any) -> None:
        self.options = {"backend": backend, **options}
        self.code = with_own_code(_frame(id)).__code__

    def __call__(self, module: nn.Module) -> Callable[..., Any]:
        call = private.plain_call(module)
        if private.needs_frame(module):
            call = _frame(call)
            call.__code__ = self.code  # type: ignore[attr-defined]
        return torch.compile(call, **self.options)


def with_own_code(function: Any) -> Any:
    """The function, to be compiled alone: Dynamo soon gives up on code that many models share."""
    function.__code__ = function.__code__.replace()
    return function


def _frame(call: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return forward
