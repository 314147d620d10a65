"""Weights that run outside of every graph: recurrent modules, which Dynamo skips, and what a graph break or an
exhausted recompile limit leaves to Python.

Two hooks on each module that owns a weight do nothing where the module is traced, which is where a graph contains it.
Where it runs in Python they see to it that its weights are rounded whenever those in graphs would be. Their
expected-loss term takes the Fisher form at the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lotion_fx.numerics import rounding
from lotion_fx.passes.attach.attach import LATENT, MEAN, RR
from lotion_fx.private import after_backward, hook_forward, tree_leaves
from lotion_fx.state import Smoothing, Weight, registry

_latent: weakref.WeakKeyDictionary[nn.Module, list[tuple[Tensor, Tensor]]] = weakref.WeakKeyDictionary()


def hook_owners(weights: Iterable[Weight]) -> None:
    """Hooks every module that owns a weight with a format."""
    modules = {module: None for weight in weights if weight.format for ref, _ in weight.owners if (module := ref())}
    for module in modules:
        hook_forward(module, _round, _restore)


def _round(module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        _swap_in(module)


def _restore(module: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        _swap_out(module)


@torch.compiler.disable
def _swap_in(module: nn.Module) -> None:
    """Rounds in place what a graph would have rounded.

    Raises:
        ValueError: the training forward would have to be rounded, or the weight is sharded.
    """
    for weight in registry.owned.get(module, {}).values():
        parameter = weight.held()
        mode = _mode(weight)
        if mode == LATENT or parameter is None or weight.format is None or not weight.selected:
            continue
        if weight.training and not weight.smoothing.override:
            asked, instead = f"method={weight.smoothing.method!r}", "method='lotion'"
            if mode == MEAN:
                asked, instead = f"noise={weight.smoothing.noise.name!r}", "noise='randomized'"
            raise ValueError(
                f"{asked} needs a rounded training forward, and no compiled graph contains {weight.name!r}; "
                f"use {instead}, or leave it out: only={{{weight.name!r}: None}}"
            )
        if isinstance(parameter, DTensor):
            raise ValueError(f"no compiled graph contains {weight.name!r}, and it is sharded: put it into regions=")
        fmt, axis, latent = weight.format, weight.axis, parameter.detach()
        _latent.setdefault(module, []).append((parameter, parameter.data))
        if mode == RR:
            parameter.data = rounding.rr(latent, fmt, axis, law=weight.smoothing.noise)
        else:
            parameter.data = rounding.rtn(latent, fmt, axis)


@torch.compiler.disable
def _swap_out(module: nn.Module) -> None:
    for parameter, values in _latent.pop(module, []):
        parameter.data = values


def _mode(weight: Weight) -> str:
    """The forward that a weight is to take now."""
    smoothing = weight.smoothing
    # Finishing begins in the middle of a training: what no graph contains goes on at its latent values there.
    training = LATENT if smoothing.finishing else smoothing.forward_mode
    return smoothing.override or (training if weight.training else "rtn")


def count_terms(call: Callable[..., Any], smoothing: Smoothing) -> Callable[..., Any]:
    """Wraps a model's forward so that T is counted at its output where no joint graph counts it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        smoothing.told = False
        smoothing.forwards += 1
        out = call(*args, **kwargs)
        if not smoothing.told and smoothing.has_term and smoothing.needs_terms and torch.is_grad_enabled():
            _count_rows(out, smoothing)
        return out

    return forward


def _count_rows(out: Any, smoothing: Smoothing) -> None:
    """T is the number of rows with non-zero gradient in the first output that has rows.

    All of its rows where the model made the loss itself: such a graph does not show what gradient they had.
    """
    leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.dim()]
    if leaves:
        leaf = next((leaf for leaf in leaves if leaf.dim() > 1), leaves[0])
        every = torch.full((), leaf.shape[: leaf.dim() - 1 or 1].numel(), dtype=torch.float32, device=leaf.device)
        leaf.register_hook(lambda grad: _count(grad, every, smoothing))


def _count(grad: Tensor | None, every: Tensor, smoothing: Smoothing) -> None:
    if grad is not None:
        nonzero = grad.ne(0)
        every = (nonzero.any(-1) if grad.dim() > 1 else nonzero).sum().float()
    smoothing.add_terms(every)
    after_backward(smoothing.backward_is_over)
