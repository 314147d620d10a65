"""Runs in-place work on many weights in as few compiled calls as there are layers.

Weights of equal make, the same matrix of every layer, are dealt out one to a call, and kinds that occur equally often
go together. So each kind is compiled once, however deep the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from lotion_fx import compiling

CHUNK = 16  # weights in one compiled call at most, which bounds the time to compile it

Make = tuple[Any, ...]


class Kind(Protocol):
    """All that the code of one weight's work depends on; hashable, and called with the weight's tensors."""

    @property
    def tensors(self) -> Make:
        """Of the arguments, see `make_of`."""

    def __call__(self, args: Sequence[Tensor]) -> None:
        """Does the work, in place."""


def make_of(args: Sequence[Tensor]) -> Make:
    """Shape, stride, dtype and device of each argument."""
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in args)


_compiled: dict[tuple[str, tuple[Kind, ...]], Callable[..., Any]] = {}


def run(inner: str, work: Sequence[tuple[Kind, list[Tensor]]]) -> None:
    """Does all of some work.

    Args:
        inner: ``"inductor"``; anything else runs it as it is.
        work: each with its arguments.
    """
    alike: dict[Kind, list[list[Tensor]]] = {}
    for kind, args in work:
        alike.setdefault(kind, []).append(args)
    by_count: dict[int, list[Kind]] = {}
    for kind, jobs in alike.items():
        by_count.setdefault(len(jobs), []).append(kind)
    for count, kinds in by_count.items():
        for start in range(0, len(kinds), CHUNK):
            for group in _known_groups(inner, tuple(kinds[start : start + CHUNK])):
                for layer in range(count):
                    flat = [tensor for kind in group for tensor in alike[kind][layer]]
                    if (inner, group) not in _compiled:
                        _compiled[inner, group] = compiling.compile_function(_many(group), flat, inner)
                    _compiled[inner, group](*flat)


def _known_groups(inner: str, kinds: tuple[Kind, ...]) -> list[tuple[Kind, ...]]:
    """These kinds together, or one by one where other company was compiled for them already.

    Where the weights with a gradient change from step to step, there would be no end of groups to compile.
    """
    if (inner, kinds) in _compiled or not any(kind in group for _, group in _compiled for kind in kinds):
        return [kinds]
    return [(kind,) for kind in kinds]


def _many(kinds: tuple[Kind, ...]) -> Callable[..., None]:
    counts = [len(kind.tensors) for kind in kinds]

    def call(*flat: Tensor) -> None:
        at = 0
        for kind, count in zip(kinds, counts, strict=True):
            kind(flat[at : at + count])
            at += count

    return call
