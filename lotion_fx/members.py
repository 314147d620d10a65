"""Which parameters are a transformed model's: those it had, and those that were put into it afterwards.

A new head for new classes, one more block, resized embeddings: whatever is registered in some module after `transform`
is taken in at the model's next call, or question, under the same ``fmt`` and ``only``. A parameter that is put in
another's place is the same weight still; of a weight that was tied, and is no more, each part is a new one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from lotion_fx import private
from lotion_fx.carried import carry
from lotion_fx.choosing import Formats, weights_for
from lotion_fx.numerics.formats import Format
from lotion_fx.state import Smoothing, Weight, registry

_handles: list[Any] = []


def watch() -> None:
    """Counts, once per process, what modules are given: a model is looked through only after something was."""
    if not _handles:
        for register in (register_module_parameter_registration_hook, register_module_module_registration_hook):
            _handles.append(register(_registered))


def _registered(module: nn.Module, name: str, value: Any) -> None:
    if not torch.compiler.is_dynamo_compiling():  # a graph would guard on the count, and be made anew in every call
        registry.changes += 1


def take_in(fmt: Format, only: Formats, smoothing: Smoothing, model: nn.Module) -> None:
    """Brings a model's weights up to what the model holds now.

    Args:
        fmt, only: as `transform` was given them.
        smoothing: the model's.
    """
    before = registry.of(smoothing)
    held = [_known(found) or found for found in weights_for(smoothing, model, fmt, only, is_later=True)]
    for weight in held:
        registry.add(weight)
    now = {id(tensor) for weight in held for tensor in weight.tensors()}
    for weight in before.difference(held):
        # One whose module was taken out of the model stays as it is, for it may be put back.
        if all(id(tensor) in now for tensor in weight.tensors()):
            registry.drop(weight)
    smoothing.weights[:] = [weight for weight in held if weight.smoothing is smoothing]
    carry(model, smoothing)


def _known(found: Weight) -> Weight | None:
    """The weight that was known where one is found, which may have got more owners since.

    None where one that it had holds something else now: what was tied tells nothing of its parts, such as its uses.
    """
    parameter, places = found.parameter(), _places(found)
    for module, attribute in places:
        known = registry.owned.get(module, {}).get(attribute)
        if known is None or known.shape != found.shape:
            continue
        if all(private.parameters_of(owner).get(name) is parameter for owner, name in _places(known)):
            for place in places:
                known.is_owned_by(*place)
            return known
    return None


def _places(weight: Weight) -> list[tuple[nn.Module, str]]:
    return [(module, attribute) for ref, attribute in weight.owners if (module := ref()) is not None]
