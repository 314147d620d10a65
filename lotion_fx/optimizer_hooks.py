"""When the expected-loss term enters: just before any optimizer steps, whoever calls it.

One hook for all optimizers of the process finds the smoothed weights among their parameters and adds the term's
gradient to ``.grad``: after accumulation, after reduction over ranks, after clipping. `term` makes it.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lotion_fx import private, riding, scale_training
from lotion_fx.by_hand import warn_of_reduction
from lotion_fx.holding import optimizer_comes, step_may_be_skipped
from lotion_fx.missing import IDLE, has_curvature, look_for_missing
from lotion_fx.pull import pull
from lotion_fx.scalars import shown
from lotion_fx.state import Smoothing, Weight, registry
from lotion_fx.term import Step, TakesTerms


def install() -> None:
    """Hooks every optimizer's step, once per process."""
    global _handles
    if not _handles:
        _handles = [register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step)]
        private.watch_grad_scaler(step_may_be_skipped)
    riding.take_in_waiting()


_HOOKED_IN = torch.optim.Optimizer.__module__
_ONCE = ("torch.optim.", "lotion_fx.optim")
_handles: list[Any] = []
_rehearsing: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # taking a step that is none
_closed: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # those whose last step was given a closure


class _UnderWay(threading.local):
    """The steps on a thread's stack.

    Attributes:
        optimizers: one may step another inside its own step: ZeroRedundancyOptimizer does.
        done: weights that have their term in the outermost of these steps.
    """

    def __init__(self) -> None:
        self.optimizers: list[torch.optim.Optimizer] = []
        self.done: weakref.WeakSet[Weight] = weakref.WeakSet()


_under_way = _UnderWay()


@torch.compiler.disable  # a compiled train step leaves the term to Python, which has a graph of its own for it
def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    """Adds the term now, or after each call of the closure where the optimizer makes the gradients itself."""
    where = "kwargs" if kwargs.get("closure") is not None else "args" if len(args) > 1 and callable(args[1]) else None
    if _steps_running(optimizer) > 1 and (where is None or optimizer in _closed):
        return None  # the step around it has the term
    outer = [each for each in _under_way.optimizers if each is not optimizer and _steps_running(each)]
    if not outer:
        _under_way.done.clear()
    _under_way.optimizers = [*outer, optimizer]
    _closed.discard(optimizer)
    if where is None:
        add_term(optimizer)
        return None
    closure = kwargs["closure"] if where == "kwargs" else args[1]
    if isinstance(closure, _WithTerm):  # of the optimizer around this one
        return None
    closure = _WithTerm(closure, optimizer)
    _closed.add(optimizer)
    return (args, {**kwargs, "closure": closure}) if where == "kwargs" else ((args[0], closure, *args[2:]), kwargs)


def _steps_running(optimizer: torch.optim.Optimizer) -> int:
    """How many of an optimizer's hooked steps are on the stack.

    0 where it raised, and never came to its end; 2 where a subclass calls the step of its base class, which torch
    hooks as well.
    """
    found, frame = 0, inspect.currentframe()
    while frame is not None:
        found += frame.f_globals.get("__name__") == _HOOKED_IN and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return found


@torch.compiler.disable
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
    if _steps_running(optimizer) > 1:
        return
    if optimizer in _rehearsing:
        _rehearsing.discard(optimizer)
        riding.stay(optimizer)
    scale_training.after_step(parameter for group in optimizer.param_groups for parameter in group["params"])
    if optimizer in (stepping := _under_way.optimizers):
        del stepping[stepping.index(optimizer) :]


class _WithTerm:
    """An optimizer's closure with the term added to what each call of it leaves in ``.grad``."""

    def __init__(self, closure: Any, optimizer: torch.optim.Optimizer) -> None:
        self.closure, self.optimizer, self.calls = closure, optimizer, 0

    def __call__(self) -> Any:
        if self.calls or not _calls_once(self.optimizer):
            _compares(self.optimizer)
        with torch.enable_grad():
            loss = self.closure()
        _under_way.done.clear()
        add_term(self.optimizer, counts=self.calls == 0)
        self.calls += 1
        return loss


def _calls_once(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is known to call its closure once, before anything else, as torch's own do but for one."""
    step = inspect.unwrap(type(optimizer).step)
    return step.__module__.startswith(_ONCE) and not isinstance(optimizer, torch.optim.LBFGS)


def _compares(optimizer: torch.optim.Optimizer) -> None:
    """An optimizer may compare the losses of several forwards in a step: all are to be at the weights themselves."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for smoothing in {weight.smoothing for weight in registry.find(parameters) if weight is not None}:
        smoothing.tally.measuring.leave_off(f"{type(optimizer).__name__} may call a closure several times a step")


def apply_term(parameters: Iterable[Tensor]) -> None:
    """Adds the expected-loss term's gradient to the ``.grad`` of parameters, for a loop that updates them by hand.

    Once a step, after all of its backward passes and before the update; for what a torch.optim optimizer steps it is
    done already. ``curvature="fisher"`` takes a moving average of its own, for there is no second moment.

    Args:
        parameters: those about to be updated, of transformed models or not.

    Raises:
        TypeError: they are no iterable of tensors.
        ValueError: none of them is a transformed model's weight, or none of these has a ``.grad``; or the phase is
            ``"scales"``, in which weights are put back on their codes after an optimizer's step.
    """
    if isinstance(parameters, (Tensor, nn.Module, str)) or not isinstance(parameters, Iterable):
        raise TypeError(f"parameters={shown(parameters)}: expected an iterable of tensors, such as model.parameters()")
    given = list(parameters)
    if strangers := [p for p in given if not isinstance(p, Tensor)]:
        raise TypeError(f"parameters: expected tensors, got {shown(strangers[0])}; pass model.parameters()")
    weights = [(p, w) for p, w in zip(given, registry.find(given), strict=True) if w is not None and w.selected]
    if not weights:
        raise ValueError("parameters: none is a quantized weight; pass those of a model under lotion_fx.transform")
    if all(parameter.grad is None for parameter, _ in weights):
        raise ValueError(
            f"parameters: no quantized weight has a .grad, {weights[0][1].name!r} among them; call backward() before"
        )
    if not _under_way.optimizers:
        _under_way.done.clear()
    add_term(_ByHand(given))


class _ByHand:
    """What stands for the optimizer where there is none."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": parameters}]
        self.state: dict[Tensor, dict[str, Any]] = {}


@torch.no_grad()
def add_term(optimizer: Any, *, counts: bool = True) -> None:
    """Adds the expected-loss term's gradient to the ``.grad`` of every smoothed weight that an optimizer steps.

    Args:
        optimizer: with torch.optim's ``param_groups`` and ``state``.
        counts: whether this is one more step of the training.
    """
    if isinstance(optimizer, TakesTerms):
        optimizer.terms.clear()  # of a step that raised
    mine: dict[Smoothing, list[tuple[Weight, Tensor]]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held = [(p, weight) for p, weight in zip(parameters, registry.find(parameters), strict=True) if weight is not None]
    is_left_out = bool(held) and _is_left_out(optimizer)
    optimizer_comes({weight.smoothing.tally.measuring.holding for _, weight in held})
    riding.before_step(optimizer, held)
    if counts and len(_under_way.optimizers) <= 1:  # else it is a part of the step around it
        scale_training.forget(parameters)
    if is_left_out:
        return
    if held and _is_rehearsal(optimizer, [weight for _, weight in held]):
        _rehearsing.add(optimizer)
        return
    for parameter, weight in held:
        if weight not in _under_way.done:
            weight.smoothing.tally.step_begins()
            weight.smoothing.tally.measuring.holding.put_back([weight])
            weight.is_stepped_as(parameter)
            weight.gathered.is_in_optimizer()
            if parameter.grad is not None and weight.selected:
                weight.gathered.is_handed_over()
                mine.setdefault(weight.smoothing, []).append((weight, parameter))
                _under_way.done.add(weight)
    unscaled_by, pending = private.take_grad_scale(optimizer), getattr(optimizer, "grad_scale", None)
    for smoothing, pairs in mine.items():
        look_for_missing(smoothing, [weight for weight, _ in pairs], [p.grad for _, p in pairs if p.grad is not None])
        used = [(weight, p) for weight, p in pairs if weight.curvature.absent != IDLE]
        # What a moment stream put into the loss needs no more, unless another graph without the loss used the weight.
        outside = [(weight, p) for weight, p in used if not weight.gathered.in_loss or has_curvature(weight)]
        warn_of_reduction(smoothing.tally, pairs)
        for weight, _ in pairs:
            weight.gathered.forget_certificate()
        if smoothing.tally.has_term and outside:
            Step(smoothing, optimizer, outside, unscaled_by, pending).run()
        if smoothing.settings.schedule.pulls and counts:
            pull(smoothing.tally, pairs, optimizer)
        if smoothing.tally.phase.holds_codes:
            scale_training.before_step(pairs, optimizer, begins=counts)
        smoothing.tally.stepped([weight for weight, _ in pairs], counts=counts)


def _is_left_out(optimizer: Any) -> bool:
    """Whether a fused kernel is about to leave a step out that overflows, as a GradScaler does itself for all others.

    Reads the device, as it does for those.
    """
    overflows = getattr(optimizer, "found_inf", None)
    return isinstance(overflows, Tensor) and float(overflows) > 0


def _is_rehearsal(optimizer: Any, weights: Sequence[Weight]) -> bool:
    """Whether torch.distributed.checkpoint makes an optimizer fill its state: a step of nothing, before any call.

    Or at any time, inside that: it does so at each reading of a state that is empty.
    """
    began = any(weight.smoothing.tally.forwards or weight.smoothing.settings.adopted for weight in weights)
    if began and not riding.is_checkpointing():
        return False
    return all(float(group.get("lr", 1.0)) == 0 for group in optimizer.param_groups)
