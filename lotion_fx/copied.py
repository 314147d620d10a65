"""Copies of what a model is given: forwards may write into it, and a pass that nobody asked for must leave no trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lotion_fx.private import tree_flatten, tree_unflatten


def copied(given: Any) -> Any:
    """The same, in containers and tensors of their own; a tensor that comes twice is one tensor still.

    Parameters stay themselves: what is known of a weight is known by it.
    """
    leaves, spec = tree_flatten(given)
    known = {id(x): _copy(x) for x in leaves if isinstance(x, Tensor) and not isinstance(x, nn.Parameter)}
    return tree_unflatten([known.get(id(x), x) for x in leaves], spec)


def _copy(x: Tensor) -> Tensor:
    """With the same strides and attributes, such as marks of dynamic sizes, or graphs would be compiled for it anew."""
    copy = x.clone()
    if x.layout is torch.strided and x.numel() and copy.stride() != x.stride():  # a slice, or expanded
        span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        copy = x.as_strided((span,), (1,)).clone().as_strided(x.shape, x.stride(), 0)
    for name, value in vars(x).items():
        vars(copy).setdefault(name, value)
    return copy
