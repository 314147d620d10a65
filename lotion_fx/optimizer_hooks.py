"""When the expected-loss term enters: just before any optimizer steps, whoever calls it.

One hook for all optimizers of the process finds the smoothed weights among their parameters and adds the term's
gradient to ``.grad``: after accumulation, after reduction over ranks, after clipping. `term` makes it.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lotion_fx import private
from lotion_fx.by_hand import warn_of_reduction
from lotion_fx.missing import has_curvature, look_for_missing
from lotion_fx.state import Smoothing, Weight, registry
from lotion_fx.term import Step, TakesTerms


def install() -> None:
    """Hooks every optimizer's step, once per process."""
    global _handles
    if not _handles:
        _handles = [register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step)]
        private.watch_grad_scaler()


_handles: list[Any] = []
_stepping: list[torch.optim.Optimizer] = []  # one may step another inside its own step: ZeroRedundancyOptimizer does
_done: weakref.WeakSet[Weight] = weakref.WeakSet()  # weights that have their term in the outermost of those steps


@torch.compiler.disable  # a compiled train step leaves the term to Python, which has a graph of its own for it
def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    """Adds the term now, or after each call of the closure where the optimizer makes the gradients itself."""
    _stepping[:] = [outer for outer in _stepping if outer is not optimizer and _is_running(outer)]
    if not _stepping:
        _done.clear()
    _stepping.append(optimizer)
    where = "kwargs" if kwargs.get("closure") is not None else "args" if len(args) > 1 and callable(args[1]) else None
    if where is None:
        add_term(optimizer)
        return None
    closure = kwargs["closure"] if where == "kwargs" else args[1]
    if isinstance(closure, _WithTerm):  # of the optimizer around this one
        return None
    closure = _WithTerm(closure, optimizer)
    return (args, {**kwargs, "closure": closure}) if where == "kwargs" else ((args[0], closure, *args[2:]), kwargs)


def _is_running(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of this optimizer is on the stack: one that raised never came to its end."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


@torch.compiler.disable
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
    if optimizer in _stepping:
        del _stepping[_stepping.index(optimizer) :]


class _WithTerm:
    """An optimizer's closure with the term added to what each call of it leaves in ``.grad``."""

    def __init__(self, closure: Any, optimizer: torch.optim.Optimizer) -> None:
        self.closure, self.optimizer, self.calls = closure, optimizer, 0

    def __call__(self) -> Any:
        with torch.enable_grad():
            loss = self.closure()
        _done.clear()
        add_term(self.optimizer, counts=self.calls == 0)
        self.calls += 1
        return loss


@torch.no_grad()
def add_term(optimizer: torch.optim.Optimizer, *, counts: bool = True) -> None:
    """Adds the expected-loss term's gradient to the ``.grad`` of every smoothed weight that an optimizer steps.

    Args:
        counts: whether this is one more step of the training.
    """
    if isinstance(optimizer, TakesTerms):
        optimizer.terms.clear()  # of a step that raised
    mine: dict[Smoothing, list[tuple[Weight, Tensor]]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, weight in zip(parameters, registry.find(parameters), strict=True):
        if weight is not None and weight not in _done:
            weight.is_stepped_as(parameter)
            weight.gathered.is_in_optimizer()
            if parameter.grad is not None and weight.selected:
                mine.setdefault(weight.smoothing, []).append((weight, parameter))
                _done.add(weight)
    unscaled_by, pending = private.take_grad_scale(optimizer), getattr(optimizer, "grad_scale", None)
    for smoothing, pairs in mine.items():
        if smoothing.tally.loss_count is None and all(float(group["lr"]) == 0 for group in optimizer.param_groups):
            continue  # torch.distributed.checkpoint makes an optimizer's state by such a step
        # What a moment stream put into the loss needs no more, unless another graph without the loss used the weight.
        outside = [(weight, p) for weight, p in pairs if not weight.gathered.in_loss or has_curvature(weight)]
        look_for_missing(smoothing, [weight for weight, _ in pairs], [p.grad for _, p in pairs if p.grad is not None])
        warn_of_reduction(smoothing.tally, pairs)
        for weight, _ in pairs:
            weight.gathered.forget_certificate()
        if smoothing.tally.has_term and outside:
            Step(smoothing, optimizer, outside, unscaled_by, pending).run()
        smoothing.tally.stepped([weight for weight, _ in pairs], counts=counts)
