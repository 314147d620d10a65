"""Functions with a backward of their own that is not the derivative of their forward.

A straight-through estimator, a gradient that is reversed or clipped: training follows what their backward says. How the
loss changes with the weights is a matter of the forward alone, and a trace of the loss has that one's derivative.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lotion_fx import private
from lotion_fx.followed import same_draws
from lotion_fx.private import tree_flatten, tree_leaves, tree_unflatten
from lotion_fx.private_tracing import FunctionsFollowed

FAR = 0.05
"""How far a gradient may be from another, relatively, and be the same one: half precision."""

_looked_at: weakref.WeakSet[type] = weakref.WeakSet()


def tell_of_own_backwards(found: Mapping[type, Sequence[Any]]) -> None:
    """Warns, once of each Function, where its backward is not the derivative of its forward.

    Args:
        found: Functions that a loss calls, each with arguments of such a call, which are copied.
    """
    new = [function for function in found if function not in _looked_at]
    _looked_at.update(new)
    others = [function for function in new if not _is_derivative(function, found[function])]
    if others:
        names = ", ".join(function.__name__ for function in others)
        has = "has a backward of its own that is" if len(others) == 1 else "have backwards of their own that are"
        warnings.warn(
            f"model: {names} {has} not the derivative of the forward, as of a straight-through estimator. Training "
            "follows the backward; expected_loss, suggest, diagnose, round_ and calibrate follow the forward, by which "
            "the loss changes",
            stacklevel=4,
        )


def _is_derivative(function: type, given: Sequence[Any]) -> bool:
    """Whether a Function's backward agrees with its forward's derivative, there and along one direction.

    It is taken to where that cannot be told. An argument that its backward gives no gradient is left out, as tables and
    masks have none; not so where none has one.
    """
    with private.outside_of_modes():
        leaves, spec = tree_flatten(tuple(given))
        inputs = [x.detach().clone() for x in leaves if isinstance(x, Tensor)]

    def run(*tensors: Tensor) -> list[Tensor]:
        values = iter(tensors)
        args = tree_unflatten([next(values) if isinstance(x, Tensor) else x for x in leaves], spec)
        out = function.apply(*args)  # type: ignore[attr-defined]
        return [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]

    def followed(*tensors: Tensor) -> list[Tensor]:
        with FunctionsFollowed():
            return run(*tensors)

    with contextlib.suppress(Exception):  # whatever a Function may raise that is called alone
        with torch.enable_grad(), same_draws(inputs):
            own, which = _gradients(run, inputs)
        with torch.enable_grad(), same_draws(inputs):
            traced = private.trace(followed, inputs)
        with torch.enable_grad(), same_draws(inputs):
            true, _ = _gradients(traced, inputs, which)
        pairs = list(zip(own, true, strict=True))
        known = [pair for pair in pairs if pair[0] is not None] or pairs
        return all(_are_near(a, b) for a, b in known)
    return True


def _gradients(
    function: Any, inputs: Sequence[Tensor], which: Sequence[int] = ()
) -> tuple[list[Tensor | None], list[int]]:
    """The gradient of a function's outputs by each floating input, along a random direction, always the same.

    Args:
        which: of the outputs, as returned for another function; by default all.

    Returns:
        Also, which of them have a gradient.
    """
    given = [x.clone() for x in inputs]
    leaves = [x.requires_grad_() for x in given if x.is_floating_point()]
    outputs = function(*(x.view_as(x) for x in given))
    draw = torch.Generator().manual_seed(0)
    along = [torch.randn(x.shape, generator=draw).to(x.device, x.dtype) for x in outputs]
    taken = [i for i, x in enumerate(outputs) if x.requires_grad and (not which or i in which)]
    if not taken:
        return [None] * len(leaves), taken
    ends, ways = [outputs[i] for i in taken], [along[i] for i in taken]
    return list(torch.autograd.grad(ends, leaves, ways, allow_unused=True)), taken


def _are_near(a: Tensor | None, b: Tensor | None) -> bool:
    lengths = [0.0 if x is None else float(x.double().norm()) for x in (a, b)]
    if a is None or b is None:
        return max(lengths) == 0
    return float((a.double() - b.double()).norm()) <= FAR * max(lengths)
