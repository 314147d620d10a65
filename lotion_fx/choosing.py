"""Which format each parameter of a model gets: `transform`'s ``only``, and the presets for it."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lotion_fx import private
from lotion_fx.attributes import attribute_of
from lotion_fx.kernels.packed import cuts_bytes
from lotion_fx.numerics.formats import Format, register_format, resolve
from lotion_fx.state import Smoothing, Weight

Formats = Mapping[Any, "str | Format | EllipsisType | None"]

_SCRIPTED = "inside a ScriptModule, which no tracer of Python sees"
_ADAPTER = "an adapter, which stays in full precision"
_ADAPTER_NAME = re.compile(r"(^|\.)lora_(embedding_)?[ab](\.|$)", re.IGNORECASE)


@dataclass(eq=False)
class Place:
    """One parameter of a model, with all the names and modules that hold it."""

    parameter: Tensor
    names: list[str] = field(default_factory=list)
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)
    inside: list[nn.Module] = field(default_factory=list)
    is_scripted: bool = False


@dataclass(frozen=True)
class Kind:
    """A key of ``only`` that `preset` makes; unlike a user's own it may match nothing.

    Args:
        name: for the report.
        within: given the model, tells whether it matches a place.
        forces: whether it also takes what the default leaves out, if it has two dimensions or more.
    """

    name: str
    within: Callable[[nn.Module], Callable[[Place], bool]]
    forces: bool = False

    def __repr__(self) -> str:
        return self.name


def places_of(model: nn.Module) -> list[Place]:
    """Every parameter once, in order of first appearance."""
    places: dict[Tensor, Place] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for prefix, module in modules.items():
        for attribute, parameter in private.parameters_of(module).items():
            if parameter is None:
                continue
            place = places.setdefault(parameter, Place(parameter))
            place.names.append(f"{prefix}.{attribute}".removeprefix("."))
            place.is_scripted |= isinstance(module, torch.jit.ScriptModule)
            if not any(owner is module and name == attribute for owner, name in place.owners):
                place.owners.append((module, attribute))
            parts = prefix.split(".") if prefix else []
            place.inside += [modules[".".join(parts[:depth])] for depth in range(len(parts) + 1)]
    return list(places.values())


def weights_for(
    smoothing: Smoothing, model: nn.Module, fmt: Format, only: Formats, *, is_later: bool = False
) -> Iterator[Weight]:
    """One `Weight` per parameter, tied ones once, with the format that ``only`` and the default give it.

    Args:
        is_later: the model has changed since the keys were checked, and may have lost what one of them matched.

    Raises:
        ValueError: a key matches no parameter, a format is unknown, or one is asked for inside a ScriptModule.
        TypeError: ``only`` is no mapping, or a key or value is none of those that `transform` names.
    """
    default, places, chosen = known_format(fmt), places_of(model), _checked(only, fmt)
    matching: dict[Place, list[Any]] = {place: [] for place in places}
    for key in chosen:
        matches = _matcher(key, model)
        found = [place for place in places if matches(place)]
        if not found and not is_later and not isinstance(key, Kind):
            raise ValueError(_nothing_matches(key, model, places))
        for place in found:
            matching[place].append(key)
    for place, keys in matching.items():
        given: Format | None = default
        excluded, forced = "", False
        if keys:
            given, excluded = chosen[keys[-1]], f"excluded by only={{{_told(keys[-1])}: None}}"
            forced = given is not None and _forces(keys[-1], place.parameter)
        if place.parameter.dim() < 2 and not forced:
            given, excluded = None, "fewer than two dimensions" if given is not None else excluded
        if given is not None and not forced and _is_adapter(place):
            given, excluded = None, _ADAPTER
        if (given is not None or place.is_scripted) and (why := _impossible(place)):
            if forced and isinstance(keys[-1], str):
                raise ValueError(f"only: {keys[-1]!r} asks for {given} of {place.names[0]!r}, which is {why}")
            given, excluded, forced = None, why, False
        yield Weight.owned_by(
            place.owners,
            place.parameter,
            name=place.names[0],
            smoothing=smoothing,
            format=given,
            excluded=excluded if given is None else "",
            forced=forced,
        )


def _impossible(place: Place) -> str:
    """Why a parameter cannot be rounded at all; empty if it can."""
    if place.is_scripted:
        return _SCRIPTED
    if not isinstance(place.parameter, UninitializedParameter) and not place.parameter.numel():
        return "empty"
    for module, attribute in place.owners:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and attribute == "weight":
            if module.max_norm is not None:
                return f"of an {type(module).__name__} with max_norm, whose forward writes into it"
            if module.sparse:
                return f"of an {type(module).__name__} with sparse gradients, which no compiled graph makes"
    return ""


def _is_adapter(place: Place) -> bool:
    """Whether PEFT, or a LoRA of the user's own, has put a parameter beside a layer that it leaves alone."""
    for module, child in zip(place.inside, [*place.inside[1:], None], strict=True):
        is_one = isinstance(attribute_of(module, "adapter_layer_names"), (tuple, list))
        if is_one and child is not attribute_of(module, "base_layer", module):
            return True
    return any(_ADAPTER_NAME.search(name) for name in place.names)


def known_format(fmt: str | Format) -> Format:
    """A format that its own name resolves to: graphs hold formats by name."""
    found = resolve(fmt)
    if cut := cuts_bytes(found):
        warnings.warn(f"fmt={found.name!r}: it trains, but `quantize` and `export` refuse it: {cut}", stacklevel=4)
    try:
        if resolve(found.name) == found:
            return found
    except ValueError:
        pass
    return register_format(found.name, found)


# ---------------------------------------------------------------------------------------------------------------- keys


def _checked(only: Any, fmt: Format) -> dict[Any, Format | None]:
    """The keys in their order, each with its format."""
    if not isinstance(only, Mapping):
        raise TypeError(
            f"only={only!r}: expected a mapping of parameter names to formats or None, such as {{'*.router.*': None}}; "
            "one format for all is fmt"
        )
    chosen: dict[Any, Format | None] = {}
    for key, value in only.items():
        is_class = isinstance(key, type) and issubclass(key, nn.Module)
        if not (is_class or isinstance(key, (str, Kind)) or (callable(key) and not isinstance(key, (type, nn.Module)))):
            raise TypeError(
                f"only: the key {key!r} is {_article(key)}; expected a glob of parameter names, a class of modules, or "
                "a function of (name, parameter)"
            )
        if value is not None and value is not ... and not isinstance(value, (str, Format)):
            raise TypeError(f"only: {_told(key)} has {value!r}; expected a format, None, or ... for fmt itself")
        try:
            chosen[key] = None if value is None else known_format(fmt if value is ... else value)
        except ValueError as error:
            raise ValueError(f"only: {_told(key)}: {error}") from None
    return chosen


def _article(key: Any) -> str:
    return f"the class {key.__name__}" if isinstance(key, type) else f"of type {type(key).__name__}"


def _told(key: Any) -> str:
    return repr(key) if isinstance(key, (str, Kind)) else getattr(key, "__name__", repr(key))


def _matcher(key: Any, model: nn.Module) -> Callable[[Place], bool]:
    if isinstance(key, Kind):
        return key.within(model)
    if isinstance(key, str):
        return lambda place: any(fnmatch.fnmatchcase(name, key) for name in place.names)
    if isinstance(key, type):
        return lambda place: any(isinstance(module, key) for module in place.inside)
    return lambda place: any(_asked(key, name, place.parameter) for name in place.names)


def _asked(predicate: Callable[[str, Tensor], Any], name: str, parameter: Tensor) -> bool:
    try:
        inspect.signature(predicate).bind(name, parameter)
    except ValueError:  # a builtin that tells no signature
        pass
    except TypeError as error:
        raise TypeError(f"only: {_told(predicate)} is to be called with (name, parameter): {error}") from None
    answer = predicate(name, parameter)
    if not isinstance(answer, bool):
        raise TypeError(f"only: {_told(predicate)}({name!r}, parameter) is {answer!r}; expected True or False")
    return answer


def _forces(key: Any, parameter: Tensor) -> bool:
    """Whether a key with a format also takes what the default leaves out."""
    if isinstance(key, str):
        return key != "*"
    if isinstance(key, (Kind, type)):
        return parameter.dim() >= 2 and getattr(key, "forces", True)
    return True


def _nothing_matches(key: Any, model: nn.Module, places: Iterable[Place]) -> str:
    if isinstance(key, type):
        held = sorted({type(owner).__name__ for place in places for owner, _ in place.owners})
        return f"only: no module is a {key.__name__} with parameters{near(key.__name__, held)}"
    if not isinstance(key, str):
        return f"only: {_told(key)} is True for no parameter; expected one at least"
    names = [name for place in places for name in place.names]
    modules = [name for name, _ in model.named_modules() if name]
    inside = f"{key.rstrip('.')}.*"
    if fnmatch.filter(modules, key.rstrip(".")) and fnmatch.filter(names, inside):
        return f"only: {key!r} names a module, and keys are matched with parameters' names; did you mean {inside!r}?"
    hint = near(key.strip("*."), [*names, *modules])
    return f"only: the glob {key!r} matches no parameter{hint}"


def near(value: Any, known: Iterable[str]) -> str:
    """What was perhaps meant, as the end of a message."""
    matches = difflib.get_close_matches(str(value), list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""
