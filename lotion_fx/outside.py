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

from lotion_fx import private
from lotion_fx.passes.attach.attach import LATENT, MEAN, RR, STE
from lotion_fx.private import tree_leaves
from lotion_fx.state import Weight, registry
from lotion_fx.tally import Tally

_latent: weakref.WeakKeyDictionary[nn.Module, list[tuple[Tensor, Tensor]]] = weakref.WeakKeyDictionary()


def hook_owners(weights: Iterable[Weight]) -> None:
    """Hooks every module that owns a weight with a format."""
    modules = {module: None for weight in weights if weight.format for ref, _ in weight.owners if (module := ref())}
    for module in modules:
        private.hook_forward(module, _round, _restore)


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
        parameter, smoothing = weight.parameter(), weight.smoothing
        mode = _mode(weight)
        if mode == LATENT or parameter is None or not weight.selected:
            continue
        if weight.training and not smoothing.tally.override:
            asked, instead = f"method={smoothing.settings.method!r}", "method='lotion'"
            if mode == MEAN:
                asked, instead = f"noise={smoothing.settings.noise.name!r}", "noise='randomized'"
            raise ValueError(
                f"{asked} needs a rounded training forward, and no compiled graph contains {weight.name!r}; "
                f"use {instead}, or leave it out: only={{{weight.name!r}: None}}"
            )
        if isinstance(parameter, DTensor):
            raise ValueError(f"no compiled graph contains {weight.name!r}, and it is sharded: put it into regions=")
        _latent.setdefault(module, []).append((parameter, parameter.data))
        rounded = weight.quantizer.rr if mode == RR else weight.quantizer.rtn
        parameter.data = rounded(parameter.detach())


@torch.compiler.disable
def _swap_out(module: nn.Module) -> None:
    for parameter, values in _latent.pop(module, []):
        parameter.data = values


def _mode(weight: Weight) -> str:
    """The forward that a weight is to take now."""
    tally = weight.smoothing.tally
    # Finishing begins in the middle of a training: what no graph contains goes on at its latent values there.
    training = LATENT if tally.finishing else tally.forward_mode
    return tally.override or (training if weight.training else STE)


def count_rows(call: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    """Wraps a model's forward so that T is counted at its output where no joint graph counts it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        tally.forward_began()
        out = call(*args, **kwargs)
        if not tally.counted_in_graph and tally.has_term and tally.needs_loss_count and torch.is_grad_enabled():
            _count_rows(out, tally)
        return out

    return forward


def _count_rows(out: Any, tally: Tally) -> None:
    """T is the number of rows with non-zero gradient in the first output that has rows.

    All of its rows where the model made the loss itself: such a graph does not show what gradient they had.
    """
    leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.dim()]
    if leaves:
        leaf = next((leaf for leaf in leaves if leaf.dim() > 1), leaves[0])
        every = torch.full((), leaf.shape[: leaf.dim() - 1 or 1].numel(), dtype=torch.float32, device=leaf.device)
        leaf.register_hook(lambda grad: tally.rows_counted(_rows(grad, every)))


def _rows(grad: Tensor | None, every: Tensor) -> Tensor:
    if grad is None:
        return every
    nonzero = grad.ne(0)
    return (nonzero.any(-1) if grad.dim() > 1 else nonzero).sum().float()
