"""PyTorch's private interfaces to activation checkpointing where Python runs it, see `private`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch._dynamo.eval_frame import skip_code
from torch.utils import checkpoint

Around = Callable[[], contextlib.AbstractContextManager[None]]

_under_way, _installing = threading.local(), threading.Lock()


@contextlib.contextmanager
def recomputed_within(around: Around) -> Iterator[None]:
    """Inside, what a checkpoint runs once more, in the backward pass, it runs within a context.

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

    skip_code(run.__code__)  # no graph of its own
    return run


def _install() -> None:
    """Checkpoints that save tensors wrap what they run once more, from the first such call on.

    Reentrant ones are left: what they run once more is a call of its own, with a backward pass of its own.
    """
    with _installing:
        if getattr(checkpoint, "_is_told_by_lotion_fx", False):
            return
        original, name = checkpoint._checkpoint_without_reentrant_generator, "_checkpoint_without_reentrant_generator"
        if (inner := getattr(checkpoint, f"{name}_impl", None)) is not None:  # from torch 2.14 on
            original, name = inner, f"{name}_impl"

        def generator(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return original(_within(fn), *args, **kwargs)

        setattr(checkpoint, name, generator)
        setattr(checkpoint, "_is_told_by_lotion_fx", True)  # noqa: B010
