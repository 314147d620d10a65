"""How a graph uses each weight: the ops that first meet data, the dimension they contract, the groups.

Formats block a weight along its contraction dimension, and a forward at rounded weights needs that dimension before
any gradient exists. So the graph is run once on fake tensors, while every value is followed that is made of weights
alone (`passes.attach.values`), op by op (`passes.attach.follow`). A weight is in if such a value meets a product.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from lotion_fx.passes.attach.call import (
    CONTRACTION,
    DEVIATION,
    ELEMENTWISE,
    EMBEDDING,
    INNER,
    INPUT,
    LOOKUP,
    OVERWRITTEN,
    PLACED,
    PRODUCT,
    PRODUCTS,
    SCALE,
    SUM,
    Call,
    Meeting,
    Operand,
)
from lotion_fx.passes.attach.follow import followed, is_unknown
from lotion_fx.passes.attach.strides import Box, written
from lotion_fx.passes.attach.values import CONSTANT, DATA, Part, Value, merged, whole
from lotion_fx.passes.registered import settle
from lotion_fx.private import OpOverload, TorchDispatchMode, arguments_of, source_of, taken_apart, tree_leaves
from lotion_fx.private_ranks import identity_of, storage_of

__all__ = ["CONTRACTION", "ELEMENTWISE", "EMBEDDING", "INNER", "PRODUCT", "SUM", "Use", "weight_uses", "why_not_of"]


@dataclass(frozen=True)
class Use:
    """One op that meets data with a weight.

    Args:
        kind: ``"contraction"``; ``"inner contraction"``, with parameters or constants alone; ``"product"``, of an op
            that sums over nobody knows what. Of these the weight is an operand. Of the others it is not: its rows are
            chosen (``"embedding"``, ``"lookup"``), it stands among activations (``"placed"``, ``"input"``), it is added
            to them (``"sum"``) or multiplies them (``"elementwise"``), or multiplies another weight (``"scale"``) or
            noise on it (``"deviation"``).
            ``"overwritten"``: a graph that has it in a product changes its values as well.
        op: the ATen op, ``"mm"``.
        axis: the weight's own dimension that is summed over; None where the op sums over none, or several.
        groups: leading groups of the weight that never mix: a convolution's groups, a stack's members.
        rows: rows in each group (see `passes.attach.probe.Layout`).
    """

    kind: str
    op: str
    axis: int | None
    groups: int
    rows: int

    @property
    def is_product(self) -> bool:
        """Whether the weight is an operand of a product."""
        return self.kind in PRODUCTS


_TOLD = {
    LOOKUP: "looked up by index",
    PLACED: "placed among activations",
    INPUT: "the input of a convolution",
    SUM: "added to activations",
    ELEMENTWISE: "a factor of activations, elementwise",
    SCALE: "a scale of another weight",
    DEVIATION: "the scale of noise on another weight",
}


_UNUSED = "reaches no contraction: unused"


def why_not_of(uses: Sequence[Use]) -> str:
    """Why a weight that is used so is left alone; empty where a product takes it."""
    kinds = {use.kind for use in uses}
    if OVERWRITTEN in kinds:
        return "its model's own forward writes into it, which would be lost in its rounded values"
    if EMBEDDING in kinds:
        return "embedding, tied to a contraction" if kinds & PRODUCTS else "embedding"
    if kinds & PRODUCTS:
        return ""
    return f"reaches no contraction: {_TOLD.get(uses[0].kind, 'used')} by {uses[0].op}" if uses else _UNUSED


def weight_uses(gm: fx.GraphModule, inputs: Sequence[Any], weights: Sequence[int]) -> dict[int, list[Use]]:
    """Runs a graph of torch functions on fake inputs and reports every use of the weights.

    Args:
        gm: Dynamo's forward graph.
        inputs: one fake tensor or number per placeholder.
        weights: which of the placeholders are weights.

    Returns:
        For each index in ``weights``, its uses without repeats: those that tell best along which dimension it is
        summed over first, else in graph order. Without the weights that only leave the graph, for Python, which runs
        next, to use them.
    """
    settle()
    tracker = _Tracker(gm, inputs, weights)
    with torch.no_grad(), tracker:
        outputs = _Run(gm).run(*inputs)
    uses = {index: tracker.uses_of(index) for index in weights}
    leaving = tracker.weights_in(outputs)
    return {index: found for index, found in uses.items() if found or index not in leaving}


class _Run(fx.Interpreter):
    """An interpreter in which a number may stand for a 0-d tensor whose value is asked for."""

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return (
            args[0]
            if target == "item" and isinstance(args[0], (int, float))
            else super().call_method(target, args, kwargs)
        )


class _Tracker(TorchDispatchMode):
    """Follows values through the ATen ops of one run."""

    supports_higher_order_operators = True

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], weights: Collection[int]) -> None:
        super().__init__()
        self.inside = False  # a region that is walked
        self.apart: list[Any] = []  # the ops that are being taken apart: not the graph's own
        self.met: dict[int, list[Meeting]] = {index: [] for index in weights}
        self.values: dict[int, Value] = {}
        self.storages: dict[int | None, int] = {}  # of the weights
        self.overwritten: dict[int, str] = {}
        self.alive: list[Any] = list(inputs)  # ids stay unique while the tensors live
        others = []
        for index, (node, x) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)):
            if index in self.met:
                self.values[identity_of(x)] = Value(parts={index: whole(x.shape)})
                self.storages[storage_of(x)] = index
            elif isinstance(x, Tensor) and not isinstance(x, torch.nn.Parameter):
                others.append((node, x))
        # Where nothing else comes in, the data are buffers: a model that holds all that it trains on.
        given = [(node, x) for node, x in others if not _is_buffer(node)] or others
        for _, x in given:
            self.values.setdefault(identity_of(x), DATA)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside and isinstance(func, OpOverload) and func.namespace == "aten":
            with self:  # where torch takes ops like `linear` apart by itself is passed by then
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if isinstance(func, OpOverload):
            self._op(func, args, kwargs, out)
        else:
            self._region(func, args, kwargs, out)
        return out

    def _op(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        schema = arguments_of(func)
        bound = [args[i] if i < len(args) else kwargs.get(a.name, a.default_value) for i, a in enumerate(schema)]
        written = [x for x, a in zip(bound, schema, strict=True) if a.alias_info is not None and a.alias_info.is_write]
        results = list({identity_of(t): t for t in tree_leaves((out, written)) if isinstance(t, Tensor)}.values())
        operands = [
            Operand(position, leaf, self.values.get(identity_of(leaf), CONSTANT))
            for position, argument in enumerate(bound)
            for leaf in (argument if isinstance(argument, (list, tuple)) else [argument])
            if isinstance(leaf, Tensor)
        ]
        if not results:
            return
        call = Call(func, bound, operands, [tuple(t.shape) for t in results], self._meet)
        if is_unknown(call):
            made = self._arranged(followed(call), self._taken_apart(call, args, kwargs))
        elif any(operand.value.parts for operand in operands) or not call.data:
            made = followed(call)
        else:
            made = [merged(operand.value for operand in operands)] * len(results)
        for tensor, value in zip(results, made, strict=True):
            self._becomes(tensor, value)
        for tensor in tree_leaves(written):
            self._seen_through(tensor)
            place = storage_of(tensor)
            if place is not None and (index := self.storages.get(place)) is not None:
                self.overwritten.setdefault(index, call.name)

    def _taken_apart(self, call: Call, args: Any, kwargs: Any) -> list[Tensor]:
        """What an op gives by the ops that the compiler would run for it, each followed; nothing if it keeps the op."""
        apart = taken_apart(call.out_of_place)
        if apart is None or call.packet in self.apart:
            return []
        self.apart.append(call.packet)
        try:
            with self:
                out = apart(*args, **kwargs)
        except Exception:  # not these arguments: as unknown as an op that nobody takes apart
            return []
        finally:
            self.apart.pop()
        return [t for t in tree_leaves(out) if isinstance(t, Tensor)]

    def _arranged(self, unknown: list[Value], same: Sequence[Tensor]) -> list[Value]:
        """Values of no known arrangement, in that of tensors of the same meaning."""
        if len(same) != len(unknown):
            return unknown
        parts = [self.values.get(identity_of(t), CONSTANT).parts for t in same]
        return [
            Value(
                value.data,
                {
                    weight: replace(part, dims=known[weight].dims if weight in known else None)
                    for weight, part in value.parts.items()
                },
            )
            for value, known in zip(unknown, parts, strict=True)
        ]

    def _becomes(self, tensor: Tensor, value: Value) -> None:
        self.alive.append(tensor)
        if not (tensor.is_floating_point() or tensor.is_complex()):
            value = Value(value.data and not value.noise)  # an index or a mask holds no weight
        if value.data:
            value = value.map(lambda part: part if part.scaled else None)
        self.values[identity_of(tensor)] = value

    def _seen_through(self, tensor: Any) -> None:
        """What is written into a view is in its base too."""
        base = getattr(tensor, "_base", None)
        if base is not None:
            held, view = self.values.get(identity_of(base), CONSTANT), self.values[identity_of(tensor)]
            alike = tensor.dtype == base.dtype  # else strides count other units
            view = view.map(lambda part: written(part, Box.of(tensor), Box.of(base)) if alike else _anywhere(part))
            self._becomes(base, merged([held, view]))

    def _meet(self, weight: int, meeting: Meeting) -> None:
        if not self.apart:
            self.met[weight].append(meeting)

    # ------------------------------------------------------------------------------------------- higher-order operators

    def _region(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Graphs inside of graphs: run where their inputs are known, else a product of nobody knows what."""
        bodies = [a for a in args if isinstance(a, fx.GraphModule)]
        rest = args[args.index(bodies[-1]) + 1 :] if bodies else ()
        given = [leaf for leaf in tree_leaves(rest) if isinstance(leaf, (Tensor, int, float, torch.SymInt))]
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        walks = func.name() in _WALKED and all(len(b.graph.find_nodes(op="placeholder")) == len(given) for b in bodies)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        values = [self.values.get(identity_of(t), CONSTANT) for t in tensors]
        made = [Value(any(value.data for value in values))] * len(results)
        if bodies and walks:
            made = self._walked(bodies, given, made)
        else:
            for weight, part in merged([value.map(_anywhere) for value in values]).parts.items():
                self._meet(weight, Meeting(PRODUCT, func.name(), part))
        for tensor, value in zip(results, made, strict=True):
            self._becomes(tensor, value)

    def _walked(self, bodies: Sequence[fx.GraphModule], given: Sequence[Any], results: list[Value]) -> list[Value]:
        """The results' values where any of the bodies may have run."""
        outer, self.inside = self.inside, True
        for body in bodies:
            with self:
                out = _Run(body).run(*given)
            found = [self.values.get(identity_of(t), CONSTANT) for t in tree_leaves(out) if isinstance(t, Tensor)]
            if len(found) == len(results):
                results = [merged([a, b.map(_anywhere)]) for a, b in zip(results, found, strict=True)]
        self.inside = outer
        return results

    # ---------------------------------------------------------------------------------------------------------- results

    def weights_in(self, outputs: Any) -> set[int]:
        """The weights that some of these hold."""
        found = (self.values.get(identity_of(x)) for x in tree_leaves(outputs) if isinstance(x, Tensor))
        return {index for value in found if value is not None for index in value.parts}

    def uses_of(self, index: int) -> list[Use]:
        """A weight's uses, those first that tell its axis best."""
        uses = list(dict.fromkeys(_use(meeting) for meeting in sorted(self.met[index], key=_rank)))
        if index in self.overwritten and any(use.is_product for use in uses):  # else the graph is an optimizer's step
            uses.append(Use(OVERWRITTEN, self.overwritten[index], None, 1, 1))
        return uses


_WALKED = {"cond", "while_loop", "invoke_subgraph", "wrap", "wrap_with_set_grad_enabled", "wrap_with_autocast"}


def _is_buffer(node: fx.Node) -> bool:
    """Whether a graph's input is a module's own tensor that is no parameter."""
    source = source_of(node)
    return source is not None and "_buffers[" in str(source.name)


def _anywhere(part: Part) -> Part:
    return Part(part.shape, None, part.multiplied, part.scaled)


def _rank(meeting: Meeting) -> int:
    """How well a use tells the dimension that a weight is summed over.

    That of the weight itself with data; its own product with parameters, if it is as in a linear layer; that of what
    such a product made with data, as of B @ A for A; any other with parameters.
    """
    if meeting.kind == INNER:
        return 1 if meeting.own and not meeting.part.multiplied and _is_last(meeting) else 3
    return 2 if meeting.part.multiplied else 0


def _is_last(meeting: Meeting) -> bool:
    return len(meeting.part.shape) - 1 in meeting.summed


def _use(meeting: Meeting) -> Use:
    part, shape = meeting.part, meeting.part.shape
    held = part.long(meeting.summed) or meeting.summed
    axis = _axis(held, meeting.free if meeting.kind == CONTRACTION else None)  # a norm by parts fixes none
    if meeting.groups:
        return Use(meeting.kind, meeting.op, axis, meeting.groups, shape[0] // meeting.groups)
    if meeting.kind in (EMBEDDING, ELEMENTWISE) and shape:
        axis = len(shape) - 1
    if len(held) > 1 and axis is not None:
        return Use(meeting.kind, meeting.op, axis, 1, _rows(shape, held))
    return Use(meeting.kind, meeting.op, axis, *factor(shape, axis, batched=meeting.stacked))


def _rows(shape: tuple[int, ...], summed: frozenset[int]) -> int:
    """Rows where several dimensions are summed over: all of these, or all others, where they stand side by side."""
    last = len(shape) - len(summed)
    if summed == set(range(len(summed))):
        return math.prod(shape[: len(summed)])
    return math.prod(shape[:last]) if min(summed) == last else shape[0]


def _axis(summed: frozenset[int], free: frozenset[int] | None) -> int | None:
    """The one dimension that is summed over; of several, as heads and features are, the last that does not stay too."""
    if len(summed) == 1:
        return next(iter(summed))
    return max(summed - free, default=None) if free is not None else None


def factor(shape: tuple[int, ...], axis: int | None, *, batched: bool = False) -> tuple[int, int]:
    """(groups, rows) in which a weight is factored, see `passes.attach.probe.Layout`.

    Args:
        shape: the weight's shape.
        axis: its contraction dimension, if one is known.
        batched: the contraction keeps leading dimensions apart (bmm over a stack).
    """
    if batched and len(shape) > 2 and axis is not None and axis >= len(shape) - 2:
        return math.prod(shape[:-2]), shape[-2]
    if axis is not None and axis == len(shape) - 1:
        return 1, math.prod(shape[:-1])
    return 1, shape[0] if shape else 1
