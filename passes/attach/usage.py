"""How a graph uses each weight: the ops that first meet data, the dimension they contract, the groups.

Formats block a weight along its contraction dimension, and a forward at rounded weights needs that dimension before
any gradient exists. So the graph is run once on fake tensors while every tensor that is only a rearranged weight is
followed: each of its dimensions remembers which dimension of the weight it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lotion_fx.private import OpOverload, TorchDispatchMode, tree_flatten

aten = torch.ops.aten

CONTRACTION, EMBEDDING, ELEMENTWISE, OTHER = "contraction", "embedding", "elementwise", "other"


@dataclass(frozen=True)
class Use:
    """One op that meets data with a weight.

    Args:
        kind: ``"contraction"``, ``"embedding"``, ``"elementwise"`` or ``"other"``.
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


Dims = tuple[frozenset[int], ...]  # for each dimension of a tensor, the weight's dimensions it holds


@dataclass(frozen=True)
class _Derived:
    weight: int
    dims: Dims
    numel: int


def weight_uses(gm: fx.GraphModule, inputs: Sequence[Any], weights: Sequence[int]) -> dict[int, list[Use]]:
    """Runs a graph of torch functions on fake inputs and reports every use of the weights.

    Args:
        gm: Dynamo's forward graph.
        inputs: one fake tensor or number per placeholder.
        weights: which of the placeholders are weights.

    Returns:
        For each index in ``weights``, its uses in graph order, without repeats.
    """
    tracker = _Tracker({index: inputs[index] for index in weights}, inputs)
    with torch.no_grad(), tracker:
        _Run(gm).run(*inputs)
    return {index: list(dict.fromkeys(tracker.uses[index])) for index in weights}


class _Run(fx.Interpreter):
    """An interpreter in which a number may stand for a 0-d tensor whose value is asked for."""

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return (
            args[0]
            if target == "item" and isinstance(args[0], (int, float))
            else super().call_method(target, args, kwargs)
        )


class _Tracker(TorchDispatchMode):
    """Follows rearranged weights through the ATen ops of one run."""

    supports_higher_order_operators = True

    def __init__(self, weights: dict[int, Tensor], inputs: Sequence[Any]) -> None:
        super().__init__()
        self.shapes = {index: tuple(w.shape) for index, w in weights.items()}
        self.uses: dict[int, list[Use]] = {index: [] for index in weights}
        self.derived: dict[int, _Derived] = {
            id(w): _Derived(index, tuple(frozenset({d}) for d in range(w.dim())), math.prod(w.shape))
            for index, w in weights.items()
        }
        self.data = {id(x) for x in inputs if isinstance(x, Tensor) and not isinstance(x, torch.nn.Parameter)}
        self.data -= set(self.derived)
        self.alive: list[Any] = list(inputs)  # ids stay unique while the tensors live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(func, OpOverload):
            return out
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        results = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        self.alive += results
        meets_data = any(id(t) in self.data for t in tensors)
        for position, tensor in enumerate(args):
            if isinstance(tensor, Tensor) and id(tensor) in self.derived:
                self._follow(func, args, position, results, meets_data)
        for tensor in (t for a in args if isinstance(a, (list, tuple)) for t in a if isinstance(t, Tensor)):
            if id(tensor) in self.derived and func.overloadpacket not in _SHAPE_QUERIES:
                self._record(self.derived[id(tensor)], OTHER, func, None)
        if meets_data and not any(id(t) in self.derived for t in results):
            self.data |= {id(t) for t in results}
        return out

    def _follow(self, func: Any, args: Any, position: int, results: list[Tensor], meets_data: bool) -> None:
        source, packet = self.derived[id(args[position])], func.overloadpacket
        if packet in _CONTRACTIONS and position in (rule := _CONTRACTIONS[packet]):
            self._record(source, CONTRACTION, func, rule[position])
        elif packet is aten.convolution:
            self._convolution(source, func, args, position)
        elif packet is aten.embedding:
            self._record(source, EMBEDDING, func, -1)
        elif packet in _REARRANGE and position == 0:
            for result in results:
                dims = _REARRANGE[packet](source.dims, args, tuple(args[0].shape), tuple(result.shape))
                self.derived[id(result)] = _Derived(source.weight, dims, source.numel)
        elif not meets_data and results and results[0].shape == args[position].shape and packet in _SCALINGS:
            self.derived[id(results[0])] = source
        elif results and packet not in _SHAPE_QUERIES:
            kind = ELEMENTWISE if packet in _SCALINGS and meets_data else OTHER
            self._record(source, kind, func, -1 if kind == ELEMENTWISE else None)

    def _convolution(self, source: _Derived, func: Any, args: Any, position: int) -> None:
        if position != 1:
            return self._record(source, OTHER, func, None)
        transposed, groups, shape = args[6], args[8], self.shapes[source.weight]
        channels = source.dims[0 if transposed else 1]
        # A depthwise kernel contracts its window alone: one input channel a group is no dimension to block.
        axis = min(channels) if channels and shape[min(channels)] > 1 + transposed * (groups - 1) else len(shape) - 1
        self.uses[source.weight].append(Use(CONTRACTION, _name(func), axis, groups, shape[0] // groups))

    def _record(self, source: _Derived, kind: str, func: Any, contracted: int | None) -> None:
        shape = self.shapes[source.weight]
        held = source.dims[contracted] if contracted is not None and source.dims else frozenset()
        axis = next(iter(held)) if len(held) == 1 else None
        groups, rows = factor(shape, axis, batched=kind == CONTRACTION and len(source.dims) > 2)
        self.uses[source.weight].append(Use(kind, _name(func), axis, groups, rows))


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


def _name(func: Any) -> str:
    return str(func.overloadpacket).removeprefix("aten.").lstrip("_")


def _same(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    return dims


def _permute(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    return tuple(dims[d] for d in args[1])


def _transpose(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    swapped = list(dims)
    swapped[args[1]], swapped[args[2]] = swapped[args[2]], swapped[args[1]]
    return tuple(swapped)


def _unsqueeze(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    at = args[1] % len(new)
    return (*dims[:at], frozenset(), *dims[at:])


def _drop(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    return tuple(d for i, d in enumerate(dims) if i != args[1] % len(dims))


def _expand(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    return (*(frozenset[int]() for _ in range(len(new) - len(dims))), *dims)


def _index(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    """Advanced indexing of leading dimensions, as experts are gathered: the gathered dimensions hold what they did."""
    tail = dims[len(args[1]) :]
    return (*(frozenset[int]() for _ in range(len(new) - len(tail))), *tail)


def _reshape(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    """Matches dimensions of equal running product; a merged or split dimension holds all that went into it."""
    result: list[frozenset[int]] = []
    i = j = 0
    while j < len(new):
        a, b, held, start = 1, 1, frozenset[int](), j
        while True:
            if a <= b and i < len(old):
                a, held, i = a * old[i], held | dims[i], i + 1
            elif j < len(new):
                b, j = b * new[j], j + 1
            if (a == b and j > start) or (i >= len(old) and j >= len(new)):
                break
        result += [held] * (j - start)
    return tuple(result)


_REARRANGE = {
    **dict.fromkeys((aten.view, aten.reshape, aten._unsafe_view, aten._reshape_alias), _reshape),
    **dict.fromkeys((aten.permute,), _permute),
    **dict.fromkeys((aten.transpose,), _transpose),
    aten.t: lambda dims, args, old, new: tuple(reversed(dims)),
    aten.unsqueeze: _unsqueeze,
    **dict.fromkeys((aten.select, aten.unbind), _drop),
    aten.squeeze: _reshape,
    aten.expand: _expand,
    **dict.fromkeys((aten.index,), _index),
    **dict.fromkeys(
        {aten.slice, aten.split, aten.split_with_sizes, aten.index_select, aten.narrow, aten.chunk, aten._to_copy}
        | {aten.clone, aten.detach, aten.alias, aten.contiguous, aten.neg, aten.view_as, aten.lift_fresh},
        _same,
    ),
}  # fmt: skip
# Of these each new dimension holds the labelled ones whole, repeating none.
_ONE_TO_ONE = {aten.permute, aten.transpose, aten.t, aten.unsqueeze, aten.squeeze, aten.select, aten.slice, aten.narrow}
_REGROUPINGS = {aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.view_as, aten.reshape_as}


def rearranged(packet: Any, old: tuple[int, ...], args: Sequence[Any], new: tuple[int, ...]) -> Dims:
    """For each dimension after a rearranging op, the dimensions before that it is made of, none where one is repeated.

    Args:
        packet: the op; one that is not known to repeat nothing gives no dimension at all.
        old, new: the shapes before and after.
        args: the op's arguments after the tensor.
    """
    dims: Dims = tuple(frozenset({d}) for d in range(len(old)))
    if packet in _REGROUPINGS:
        return _reshape(dims, (None, *args), old, new)
    if packet in _ONE_TO_ONE:
        return _REARRANGE[packet](dims, (None, *args), old, new)
    if packet is aten.expand:
        stretched = _expand(dims, (None, *args), old, new)
        lead = len(new) - len(old)
        return tuple(held if i >= lead and old[i - lead] == new[i] else frozenset() for i, held in enumerate(stretched))
    return tuple(frozenset[int]() for _ in new)


_SCALINGS = {aten.mul, aten.div, aten.add, aten.sub, aten.neg}
_SHAPE_QUERIES = {aten.sym_size, aten.sym_numel, aten.sym_stride, torch.ops.prim.device}
# op -> {position of the operand: its contracted dimension}
_CONTRACTIONS: dict[Any, dict[int, int]] = {
    **{op: {0: -1, 1: -2} for op in (aten.mm, aten.bmm, aten._grouped_mm)},
    **{op: {1: -1, 2: -2} for op in (aten.addmm, aten.baddbmm)},
    **{op: {0: -1, 1: 0} for op in (aten.mv, aten.dot)},
}
