"""PyTorch's private interfaces to activation checkpointing where Python runs it, see `private`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointFunction

from lotion_fx import private

Around = Callable[[], contextlib.AbstractContextManager[None]]

_SAVING = "_checkpoint_without_reentrant_generator"
_SAVING = f"{_SAVING}_impl" if hasattr(checkpoint, f"{_SAVING}_impl") else _SAVING  # from torch 2.14 on
_under_way, _installing = threading.local(), threading.Lock()


@contextlib.contextmanager
def recomputed_within(around: Around) -> Iterator[None]:
    """Inside, what a checkpoint runs is run within a context, there and once more in the backward pass.

    A backward pass computes it as it was: with the values that stood in for weights, and in the same calls, compiled or
    not. Checkpoints that Dynamo traces know nothing of it.
    """
    _install()
    before = getattr(_under_way, "around", None)
    _under_way.around = around
    try:
        yield
    finally:
        _under_way.around = before


def _within(function: Callable[..., Any]) -> Callable[..., Any]:
    around = getattr(_under_way, "around", None)
    if around is None:
        return function

    def run(*args: Any, **kwargs: Any) -> Any:
        with around():
            return function(*args, **kwargs)

    private.inline_only(run)
    return run


def _install() -> None:
    """Both kinds of checkpoints wrap what they are given, from the first such call on."""
    with _installing:
        if getattr(checkpoint, "_is_told_by_lotion_fx", False):
            return
        saving, reentrant = getattr(checkpoint, _SAVING), CheckpointFunction.apply

        def generator(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return saving(_within(fn), *args, **kwargs)

        def apply(function: Callable[..., Any], *args: Any) -> Any:
            return reentrant(_within(function), *args)

        setattr(checkpoint, _SAVING, generator)
        CheckpointFunction.apply = apply  # type: ignore[method-assign]
        checkpoint._is_told_by_lotion_fx = True  # type: ignore[attr-defined]
