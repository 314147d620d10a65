"""What calling a transformed module runs: its own call, compiled."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from lotion_fx import private, private_checkpoints, unhooked
from lotion_fx.announcing import announcer
from lotion_fx.carried import MADE_ITSELF, all_standing_in
from lotion_fx.holders import tell_of_views
from lotion_fx.rows import count_rows, watched
from lotion_fx.state import Smoothing
from lotion_fx.uses import learn_in_python


class CompiledCalls:
    """Makes what `nn.Module.compile` would call, for the modules of one model.

    A bare `nn.Sequential` needs a frame of our own, for Dynamo skips forwards of torch's own; so does a module that
    owns weights, whose hooks would run in Python and find them outside of every graph. Blocks of one model share the
    frame's code and what is compiled for it, which goes when the model does.
    """

    def __init__(self, model: nn.Module, backend: Callable[..., Any], **options: Any) -> None:
        self.options = {"backend": backend, **options}
        self.code = with_own_code(_frame(id), model).__code__

    def __call__(self, module: nn.Module) -> Callable[..., Any]:
        call = private.plain_call(module)
        if private.needs_frame(module):
            call = _frame(call)
            call.__code__ = self.code  # type: ignore[attr-defined]
        return torch.compile(call, **self.options)


def with_own_code(function: Any, model: nn.Module) -> Any:
    """The function, to be compiled alone: Dynamo soon gives up on code that many models share.

    Its graphs go when the model does: they hold the code themselves, so that neither would ever go alone.
    """
    function.__code__ = function.__code__.replace()
    weakref.finalize(model, private.forget_graphs, function.__code__).atexit = False
    return function


def _frame(call: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return forward


def outermost(call: Callable[..., Any], model: nn.Module, smoothing: Smoothing) -> Callable[..., Any]:
    """What calling a transformed model runs: its compiled ``call``, or in Python where something else traces it.

    Another compiler's graph ends here, for the model has graphs of its own.
    """
    reference, tally = weakref.ref(model), smoothing.tally  # the model's own state must not keep it alive

    @torch.compiler.disable(reason=MADE_ITSELF)
    def forward(*args: Any, **kwargs: Any) -> Any:
        model = reference()
        assert model is not None
        tracer = private.tracer()
        with private.outside_of_modes() if tracer else contextlib.nullcontext():
            smoothing.take_in(model)
        announcer.new_call()
        unhooked.look(smoothing, model, tracer)
        if not tracer:
            tally.forward_comes(trains=model.training and torch.is_grad_enabled())
        tally.forward_began()
        if tracer:
            _warn_of_training(tracer, smoothing)
            with all_standing_in(smoothing), private.uncompiled(model):
                return private.plain_call(model)(*args, **kwargs)
        with all_standing_in(smoothing), private_checkpoints.recomputed_within(partial(all_standing_in, smoothing)):
            out = call(*args, **kwargs)
        learn_in_python(smoothing, model, args, kwargs)
        tell_of_views(smoothing, model)
        count_rows(out, tally)
        return watched(out, tally) if tally.has_term and tally.measuring.watches else out

    return forward


def _warn_of_training(tracer: str, smoothing: Smoothing) -> None:
    """An exported model that trains is not the one that is deployed, and has no expected-loss term."""
    if tracer in ("torch.export", "torch.jit.trace") and any(w.selected and w.training for w in smoothing.weights):
        warnings.warn(
            f"{tracer} of a model in training mode: it has the training forward of "
            f"method={smoothing.settings.method!r}, not the rounded weights; call eval() first",
            stacklevel=3,
        )
