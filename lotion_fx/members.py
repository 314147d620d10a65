"""Which parameters are a transformed model's: those it had, and those that were put into it afterwards.

A new head for new classes, one more block, resized embeddings: whatever is registered in some module after `transform`
is taken in at the model's next call, or question, under the same ``fmt`` and ``only``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from lotion_fx.carried import carry
from lotion_fx.choosing import Formats, weights_for
from lotion_fx.numerics.formats import Format
from lotion_fx.state import Smoothing, registry

_handles: list[Any] = []


def watch() -> None:
    """Counts, once per process, what modules are given: a model is looked through only after something was."""
    if not _handles:
        for register in (register_module_parameter_registration_hook, register_module_module_registration_hook):
            _handles.append(register(_registered))


def _registered(module: nn.Module, name: str, value: Any) -> None:
    if not torch.compiler.is_dynamo_compiling():  # a graph that counted would be another one in each call
        registry.changes += 1


def take_in(fmt: Format, only: Formats, smoothing: Smoothing, model: nn.Module) -> None:
    """Brings a model's weights up to what the model holds now.

    Args:
        fmt, only: as `transform` was given them.
        smoothing: the model's.
    """
    known = {weight for module in model.modules() for weight in registry.owned.get(module, {}).values()}
    held = {id(tensor): weight for weight in known for tensor in weight.tensors()}
    current = [weight for weight in smoothing.weights if weight in known and weight.fits()]
    added = []
    for weight in weights_for(smoothing, model, fmt, only, is_later=True):
        parameter = weight.parameter()
        before = held.get(id(parameter))
        if before is None or not before.fits():
            added.append(weight)
            continue
        for ref, attribute in weight.owners:  # one more than before where it was tied meanwhile
            if (module := ref()) is not None:
                before.is_owned_by(module, attribute)
        registry.add(before)
    if added or len(current) < len(smoothing.weights):
        smoothing.weights[:] = [*current, *added]
        for weight in added:
            registry.add(weight)
        carry(model, smoothing)
