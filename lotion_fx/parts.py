"""Parts of a model that are called from outside of the model's own call, and are compiled as it is.

A Lightning module's ``training_step`` calls ``self.net(x)``, a trainer calls a language model's trunk and applies the
head by itself, PEFT calls ``model.forward``: the model's compiled call never runs. So each part knows whether it is
called within it, and where it is not, what runs is a compiled call of that part. Parts are the modules down to the
members of lists: below them a model is the same again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lotion_fx import private
from lotion_fx.calls import CompiledCalls, outermost
from lotion_fx.holders import tell_of_methods
from lotion_fx.sampling import sample_first
from lotion_fx.state import Smoothing, registry

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def compile_parts(model: nn.Module, smoothing: Smoothing, backend: Callable[..., Any], **options: Any) -> None:
    """Makes the parts of a model, that is compiled as a whole, calls of their own where they are not called by it."""
    for part in _below(model):
        if _selected(part) and not private.replaced_call(part, private.plain_call(part)):
            private.replace_call(part, _call(part, smoothing, CompiledCalls(model, backend, **options)))


def _below(module: nn.Module) -> Iterator[nn.Module]:
    is_list = isinstance(module, _LISTS)
    for child in module.children():
        if type(child) not in (nn.ModuleList, nn.ModuleDict):  # which cannot be called
            yield child
        if not is_list:
            yield from _below(child)


def _selected(part: nn.Module) -> bool:
    """Whether a part holds weights that are quantized, as far as modules tell."""
    return any(weight.selected for module in part.modules() for weight in registry.owned.get(module, {}).values())


def _call(part: nn.Module, smoothing: Smoothing, compiled_call: CompiledCalls) -> Callable[..., Any]:
    """What calling a part runs."""
    made: list[Callable[..., Any]] = []  # not before the first such call: most parts have none

    def forward(*args: Any, **kwargs: Any) -> Any:
        within = torch.compiler.is_compiling() or smoothing.is_running
        # A part may outlive the model, as when PEFT merges and unloads.
        if within or private.tracer() or private.is_traced_by_fx() or smoothing.model() is None:
            return private.plain_call(part)(*args, **kwargs)
        if not made:
            tell_of_methods(part)
            made.append(_compiled(part, smoothing, compiled_call))
        return made[0](*args, **kwargs)

    return forward


def _compiled(part: nn.Module, smoothing: Smoothing, compiled_call: CompiledCalls) -> Callable[..., Any]:
    model, call = smoothing.model(), compiled_call(part)
    assert model is not None  # it holds the part
    run = outermost(call, model, smoothing)
    held = {weight for module in part.modules() for weight in registry.owned.get(module, {}).values()}
    if smoothing.settings.samples_labels and all(w in held for w in smoothing.weights if w.selected):
        return sample_first(call, run, part, smoothing)
    return run
