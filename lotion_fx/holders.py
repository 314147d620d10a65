"""Ways to a weight that stand-ins do not reach, and that are told of: each names the weight and the other way to it.

A graph is given what stands in a parameter's place, whatever holds the parameter. Python that runs outside of graphs
and takes it out of a list or a closure is not; nor is anybody who takes a view of its values that was made once.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from lotion_fx import private
from lotion_fx.attributes import tell
from lotion_fx.passes.attach.attach import LATENT
from lotion_fx.state import Smoothing, Weight, registry

_DEPTH = 4  # of lists in lists


def tell_of_holders(smoothing: Smoothing, model: nn.Module) -> None:
    """Says once which weight with a stand-in something else holds too, where Python runs the model's forward."""
    standing = [weight for weight in smoothing.weights if weight.standing is not None]
    if standing and "holders" not in smoothing.said:
        smoothing.said.add("holders")
        for weight, where, _ in _held_of(standing, model):
            warnings.warn(
                f"{weight.name!r} is held by {where} too: where Python takes it from there, outside of graphs, it is "
                "not rounded; read it as its module's attribute instead",
                stacklevel=2,
            )
            return


def tell_of_views(smoothing: Smoothing, model: nn.Module) -> None:
    """Says once which rounded weight the model holds a view of, which is never rounded."""
    if "views" in smoothing.said or (model.training and smoothing.tally.forward_mode == LATENT):
        return
    smoothing.said.add("views")
    for weight, where, tensor in _held_of(smoothing.weights, model):
        if not weight.is_now(tensor):
            warnings.warn(
                f"{weight.name!r}: {where} is a view of its values that was made once, which is not rounded; make it "
                "in forward(), of the parameter",
                stacklevel=2,
            )
            return


def tell_of_methods(module: nn.Module) -> None:
    """Says once whose method, called past the module itself, reads a weight of its own that nothing stands in for.

    Args:
        module: that such a method, if there is one on the stack, calls.
    """
    frame = inspect.currentframe()
    while frame is not None:
        code, names = frame.f_code, frame.f_locals
        caller, frame = names.get(code.co_varnames[0]) if code.co_argcount else None, frame.f_back
        owned = registry.owned.get(caller, {}) if isinstance(caller, nn.Module) and caller is not module else {}
        for weight in owned.values():
            read = weight.selected and weight.standing is None and weight.mode != LATENT
            if read and "methods" not in weight.smoothing.said:
                weight.smoothing.said.add("methods")
                warnings.warn(
                    f"a method of {type(caller).__name__} runs though the module itself was not called: there "
                    f"{weight.name!r} is not rounded, and only modules that the method calls are; call the module, "
                    "whose forward may choose the method",
                    stacklevel=2,
                )


def _held_of(weights: Iterable[Weight], model: nn.Module) -> Iterator[tuple[Weight, str, Tensor]]:
    """Rounded weights that a model holds otherwise too, or parts of them, each with where and what is held there."""
    places = {place: weight for weight in weights if weight.selected and (place := _place_of(weight)) is not None}
    for where, tensor in held_apart(model):
        weight = places.get(_place(tensor) or 0)
        # One that holds more is a flat buffer of many weights.
        if weight is not None and tensor.numel() <= math.prod(weight.shape) and tensor.is_floating_point():
            yield weight, where, tensor


def held_apart(model: nn.Module, kind: type[Any] = Tensor) -> Iterator[tuple[str, Any]]:
    """The tensors, or modules, that a model's modules hold otherwise than as parameters or modules; each with where."""
    for path, module in model.named_modules():
        for name, value in [*_put_into(module).items(), *private.buffers_of(module).items()]:
            try:
                found = list(_of_kind(kind, value, _DEPTH))
            except Exception as error:  # whatever a container of others may raise
                tell(module, name, error)
                continue
            for each in found:
                yield f"{path}.{name}".removeprefix("."), each


def _put_into(module: nn.Module) -> dict[str, Any]:
    """A module's attributes but for its parameters, buffers, modules and torch's own."""
    own = {*vars(nn.Module()), "_flat_weights"}
    return {name: value for name, value in vars(module).items() if name not in own}


def _of_kind(kind: type[Any], value: Any, depth: int) -> Iterator[Any]:
    if issubclass(type(value), kind):  # isinstance asks a proxy what it stands for
        yield value
    elif depth:
        for each in _inside(value):
            yield from _of_kind(kind, each, depth - 1)


def _inside(value: Any) -> Iterable[Any]:
    """What a container, a partial function or a closure holds, in memory: its own ways of reading may raise."""
    made = type(value)
    if issubclass(made, dict):
        return [each for each in dict.values(value)]
    for known in (list, tuple, set):
        if issubclass(made, known):
            return [each for each in known.__iter__(value)]
    if issubclass(made, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if made is FunctionType:
        return [*_cells(value), *(value.__defaults__ or ())]
    return []


def _cells(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # an empty one
            continue


def _place(tensor: Tensor | None) -> int | None:
    """Where a tensor's storage lies, None where it has none of its own."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor is None or tensor.is_meta or private.is_wrapped(tensor):
        return None
    return tensor.untyped_storage().data_ptr() or None


def _place_of(weight: Weight) -> int | None:
    """Where a weight's values lie, also while its model is exported and a fake stands for it."""
    return _place(weight.master) or _place(private.real_of(weight.master))
