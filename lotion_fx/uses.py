"""How weights are used that no compiled graph has shown: learned from a graph that is traced for that."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor

from lotion_fx import private
from lotion_fx.announcing import LOG
from lotion_fx.loss_graph import forward_graph, grad_mode_kept
from lotion_fx.passes.attach.usage import weight_uses
from lotion_fx.private import tree_flatten, tree_unflatten
from lotion_fx.state import Smoothing, Weight

_HARMLESS = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def learn_uses(
    gm: fx.GraphModule, parameters: Sequence[str], inputs: Sequence[Any], names: Mapping[Weight, str]
) -> None:
    """Weights whose uses nothing has told yet learn them from a graph.

    Args:
        parameters: the names of its first inputs.
        inputs: all of them.
    """
    at = {name: index for index, name in enumerate(parameters)}
    new = {at[name]: weight for weight, name in names.items() if weight.uses is None and name in at}
    with private.faked(inputs) as fakes:
        for index, uses in weight_uses(gm, fakes, list(new)).items():
            if uses:  # a thread of the forward's own is not traced
                new[index].learn(uses)


def learn_in_python(smoothing: Smoothing, model: nn.Module, args: Any, kwargs: Any) -> None:
    """After a call of a model part of which Python ran: what its products sum over there, if no graph has told.

    The model is run once more, in ``eval()``, by a tracer. Where that fails blocks lie as assumed, and the report says
    so.

    Args:
        args, kwargs: of the call.
    """
    unknown = [weight for weight in smoothing.weights if weight.selected and not weight.is_known_operand]
    if not unknown or "traced" in smoothing.said or not smoothing.tally.has_breaks:
        return
    smoothing.said.add("traced")
    if any(isinstance(parameter, DTensor) or parameter.is_meta for parameter in model.parameters()):
        return
    leaves, spec = tree_flatten((args, kwargs))
    if not all(leaf is None or isinstance(leaf, _HARMLESS) for leaf in leaves):  # a cache is not to be filled twice
        return
    given = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    places = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {weight: places[id(weight.master)] for weight in unknown if id(weight.master) in places}
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        with torch.random.fork_rng(list(devices)), grad_mode_kept(), attributes_kept(model):
            gm, parameters, inputs = forward_graph(model, *tree_unflatten(given, spec))
            learn_uses(gm, list(parameters), inputs, names)
    except Exception as error:  # whatever a tracer and the user's own forward may raise
        LOG.info("how %s are used was not to be traced: %s", ", ".join(map(repr, names.values())), error)


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Inside, what modules put into attributes of theirs, or into lists and dictionaries there, is gone at the end."""
    before = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, contents in before:
            vars(module).clear()
            vars(module).update(attributes)
            for held, content in contents:
                held.clear()
                held.extend(content) if isinstance(held, list) else held.update(content)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """The lists, dictionaries and sets among a module's attributes, each with a copy."""
    return [(value, copy.copy(value)) for value in vars(module).values() if type(value) in (list, dict, set)]
