"""Copies of what a model is given: forwards may write into it, and a pass that nobody asked for must leave no trace.

Containers that torch takes apart are rebuilt by torch; all other objects, such as a tokenizer's batch, a dataclass or a
cache of keys and values, as `pickle` would in another process, but for what has to stay itself.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lotion_fx.private import tree_flatten, tree_unflatten

_STAYS = (Tensor, nn.Module, type, FunctionType, BuiltinFunctionType, ModuleType)
_PLAIN = (*_STAYS, type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def copied(given: Any) -> Any:
    """The same, in containers, objects and tensors of their own; a tensor that comes twice is one tensor still.

    Parameters stay themselves: what is known of a weight is known by it. So do modules and functions.
    """
    taken = Given(given)
    known = {id(x): _copy(x) for x in taken.tensors if not isinstance(x, nn.Parameter)}
    return taken.filled([known.get(id(x), x) for x in taken.tensors])


class Given:
    """What a model is given, taken apart.

    Args:
        given: anything.

    Attributes:
        tensors: all that are in it, wherever they lie, each as often as it comes.
    """

    def __init__(self, given: Any) -> None:
        self._leaves, self._spec = tree_flatten(given)
        places = [i for i, leaf in enumerate(self._leaves) if not isinstance(leaf, _PLAIN)]
        self._places, self._objects = places, _Objects([self._leaves[i] for i in places])
        if places and not self._objects.can_be_made():
            self._places = [i for i in places if _Objects([self._leaves[i]]).can_be_made()]
            self._objects = _Objects([self._leaves[i] for i in self._places])
        self.tensors: list[Tensor] = [x for x in (*self._leaves, *self._objects.inside) if isinstance(x, Tensor)]

    def filled(self, tensors: Sequence[Any]) -> Any:
        """The same with others for its tensors, in containers and objects of its own."""
        values = iter(tensors)
        leaves = [next(values) if isinstance(x, Tensor) else x for x in self._leaves]
        inside = [next(values) if isinstance(x, Tensor) else x for x in self._objects.inside]
        for i, made in zip(self._places, self._objects.made(inside), strict=True):
            leaves[i] = made
        return tree_unflatten(leaves, self._spec)


class _Objects:
    """Objects, pickled.

    Args:
        objects: any; one that two of them hold is one still.

    Attributes:
        inside: what in them is not pickled, each as often as it comes; nothing if they cannot be pickled.
    """

    def __init__(self, objects: list[Any]) -> None:
        file = io.BytesIO()
        pickler = _Pickler(file)
        try:
            pickler.dump(objects)
        except Exception:  # whatever an object's own code may raise
            self._pickled, self.inside = b"", []
        else:
            self._pickled, self.inside = file.getvalue(), pickler.inside

    def can_be_made(self) -> bool:
        try:
            self.made(self.inside)
        except Exception:  # likewise
            return False
        return True

    def made(self, inside: Sequence[Any]) -> list[Any]:
        """Made anew, with other things inside."""
        unpickler = _Unpickler(io.BytesIO(self._pickled), inside)
        made: list[Any] = unpickler.load()
        return made


class _Itself(NamedTuple):
    """What cannot be made anew, a lock for one."""

    value: Any


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=4)
        self.inside: list[Any] = []

    def persistent_id(self, x: Any) -> int | None:
        """The place of what is not pickled: tensors, and what is known by itself."""
        if not isinstance(x, (*_STAYS, _Itself)):
            return None
        self.inside.append(x.value if isinstance(x, _Itself) else x)
        return len(self.inside) - 1

    def reducer_override(self, x: Any) -> Any:
        """As `pickle` would, but what cannot be made anew, or need not be, stays itself."""
        if isinstance(x, _STAYS) or type(x) in copyreg.dispatch_table:
            return NotImplemented
        itself = (_value, (_Itself(x),))
        try:
            made = x.__reduce_ex__(4)
        except Exception:  # whatever an object's own code may raise
            return itself
        if isinstance(made, str):  # the name of a constant
            return itself
        function, args, *contents = (*made, None, None, None)[:5]
        if getattr(function, "__name__", "") == "__newobj__" and len(args) == 1 and contents == [None, None, None]:
            return itself  # such an object says what it says by being itself, as one that stands for "not given"
        if len(made) < 6 and contents[0] is not None and not hasattr(type(x), "__setstate__"):
            return (function, args, *contents, _set_state)
        return made


def _value(x: Any) -> Any:
    return x


def _set_state(x: Any, state: Any) -> None:
    """As `pickle` does, but without a question to the object: its ``__getattr__`` may need the state to answer."""
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    if attributes:
        object.__getattribute__(x, "__dict__").update(attributes)
    for name, value in (slots or {}).items():
        object.__setattr__(x, name, value)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, inside: Sequence[Any]) -> None:
        super().__init__(file)
        self.inside = inside

    def persistent_load(self, place: int) -> Any:
        return self.inside[place]


def _copy(x: Tensor) -> Tensor:
    """With the same strides and attributes, such as marks of dynamic sizes, or graphs would be compiled for it anew."""
    copy = x.clone()
    if x.layout is torch.strided and x.numel() and copy.stride() != x.stride():  # a slice, or expanded
        span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        copy = x.as_strided((span,), (1,)).clone().as_strided(x.shape, x.stride(), 0)
    for name, value in vars(x).items():
        vars(copy).setdefault(name, value)
    return copy
