"""Contractions that are nobody's but a library's or a user's own: `register_contraction`.

An op is registered by its name, so that it may be before the library that makes it is loaded.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lotion_fx.passes import ops
from lotion_fx.passes.curvature.contraction import (
    Contraction,
    Rule,
    bound,
    emit,
    grouped_rows,
    square_operand,
    to_float,
)
from lotion_fx.private import arguments_of, results_of


@dataclass(frozen=True)
class _Registered:
    """One op: the dimension that each of its two operands, by name or position, is summed over; see below."""

    name: str
    contracted: tuple[tuple[str | int, int], ...]
    output: int | None
    squares: Rule | None = None


_registered: dict[str, _Registered] = {}
_waiting: set[str] = set()


def register_contraction(op: Any, contracted: Mapping[str | int, int], *, output: int | None = None) -> None:
    """Teaches the compiler an op of your own that sums products of two of its arguments, as a matrix product does.

    Without it a weight that the op takes is quantized too, in blocks along its last dimension, and takes the Fisher
    form. With it blocks run along the dimension that is summed over. The curvature is analytic where the op that makes
    the weight's gradient is known: one of PyTorch's own (a backward pass written with ``@``), this very op, or one that
    is registered in turn. Such an op is then run once more on squared operands.

        register_contraction("lib::linear", {"x": -1, "weight": -1})                  # y = x @ weight.T
        register_contraction("lib::linear_backward", {"grad": 0, "x": 0}, output=1)   # its second result

    Args:
        op: what `torch.library.custom_op` returned, ``torch.ops.lib.name``, or the name ``"lib::name"``, which may be
            defined later. The op must be linear in each of the two operands; its other arguments may be anything that
            does not depend on them (offsets, an index), or be added.
        contracted: the two operands, by their names in the op's schema or by position, each with the dimension of it
            that is summed over.
        output: of an op with several results, which one is the sum.

    Raises:
        ValueError, TypeError: ``op`` is no operator, or ``contracted`` does not name two of its arguments.
    """
    name = _name_of(op)
    if not isinstance(contracted, Mapping) or len(contracted) != 2:
        raise ValueError(
            f"contracted={contracted!r}: expected the two operands, each with the dimension that is summed over, such "
            "as {'x': -1, 'weight': -1}"
        )
    for operand, dim in contracted.items():
        if isinstance(dim, bool) or not isinstance(dim, int) or not isinstance(operand, (str, int)):
            raise ValueError(
                f"contracted={contracted!r}: expected an operand and one dimension, got {operand!r}: {dim!r}"
            )
    if output is not None and (isinstance(output, bool) or not isinstance(output, int) or output < 0):
        raise ValueError(f"output={output!r}: expected the place of one of the op's results, 0 or more, or None")
    _add(_Registered(name, tuple(contracted.items()), output))


def _add(entry: _Registered) -> None:
    if _found(entry.name) is None:
        _waiting.add(entry.name)
    else:
        _settle(entry)
        _waiting.discard(entry.name)
    _registered[entry.name] = entry


def settle() -> None:
    """Fills the tables of ops with what was registered and exists by now."""
    for name in sorted(name for name in _waiting if _found(name) is not None):
        _settle(_registered[name])
        _waiting.discard(name)


def registered_contractions() -> list[str]:
    """What was registered, for the compile caches' key."""
    return sorted(repr((entry.name, entry.contracted, entry.output)) for entry in _registered.values())


def _name_of(op: Any) -> str:
    """``"lib::name"``; of an op's object, its text says so."""
    text = op if isinstance(op, str) else str(op)
    match = re.fullmatch(r"<CustomOpDef\(([\w.]+::\w+)\)>|(\w+::\w+)|(\w+)\.(\w+)(\.\w+)?", text)
    if match is None or (isinstance(op, str) and not match[2]):
        raise TypeError(
            f"op={op!r}: expected a torch operator: a torch.library.custom_op, torch.ops.lib.name or 'lib::name'"
        )
    return match[1] or match[2] or f"{match[3]}::{match[4]}"


def _found(name: str) -> Any:
    namespace, _, op = name.partition("::")
    return getattr(getattr(torch.ops, namespace), op, None)


def _settle(entry: _Registered) -> None:
    packet = _found(entry.name)
    target = packet.default
    places = _places(entry, target)
    returns = results_of(target)
    if (entry.output or 0) >= returns or (entry.output is None and returns > 1):
        raise ValueError(
            f"output={entry.output!r}: {entry.name} has {returns} results; expected the place of that which is the sum"
        )
    rule = entry.squares or _rule(places, entry.output)
    summed = places if entry.output is None else {}  # only one that makes gradients has several results
    ops.add(ops.Op(packet, forward=ops.Forward.CONTRACTION, contracted=summed, squares=rule), entry.output)


def _places(entry: _Registered, target: Any) -> dict[int, int]:
    names = [argument.name for argument in arguments_of(target)]
    places = {}
    for operand, dim in entry.contracted:
        place = operand if isinstance(operand, int) else names.index(operand) if operand in names else -1
        if not 0 <= place < len(names):
            raise ValueError(f"contracted: {entry.name} has no argument {operand!r}; it has {', '.join(names)}")
        places[place] = dim
    if len(places) != 2:
        raise ValueError(f"contracted: {dict(entry.contracted)!r} names one argument of {entry.name} twice")
    return places


def _rule(places: Mapping[int, int], output: int | None) -> Rule:
    """The op itself, on squared operands."""

    def rule(node: fx.Node) -> Contraction:
        args, graph = bound(node), node.graph

        def full() -> fx.Node:
            squared = {place: square_operand(args[place]) for place in places}
            half = any(args[place].meta["val"].dtype == torch.float16 for place in places)
            given = [squared.get(i, _in_float(arg) if half else arg) for i, arg in enumerate(args)]
            made = emit(graph, node.target, *given)
            return made if output is None else emit(graph, operator.getitem, made, output)

        first, second = (args[place] for place in places)
        positions = () if output is None else tuple((dim,) for dim in places.values())
        return Contraction((first, second), full, positions=positions)

    return rule


def _in_float(argument: Any) -> Any:
    is_half = isinstance(argument, fx.Node) and argument.meta["val"].dtype == torch.float16
    return to_float(argument) if is_half else argument


_add(_Registered("transformers::grouped_mm_fallback", (("input", -1), ("weight", -2)), None))
_add(_Registered("transformers::grouped_mm_fallback_backward", (("input", 0), ("grad_output", 0)), 1, grouped_rows))
