"""Values put into places of another tensor: along which of its dimensions each of theirs lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lotion_fx.passes.attach.call import PLACED, Call, Operand
from lotion_fx.passes.attach.values import DATA, Part, Value, broadcast, lost, merged
from lotion_fx.passes.dims import Dims

aten = torch.ops.aten

INDEXED = {aten.index_put, aten._unsafe_index_put}
_IN_ORDER = {aten.index_copy, aten.index_add, aten.slice_scatter}
_IN_ORDER |= {aten.scatter, aten.scatter_add, aten.scatter_reduce}


def placement(call: Call) -> Value:
    """Of weights and constants they stand in their places; beside data a weight is itself some of the activations."""
    if call.data:
        call.meets(PLACED, call.operands)
        return DATA
    return merged(_in_place(call, operand) for operand in call.operands)


def _in_place(call: Call, operand: Operand) -> Value:
    """What one operand gives the result; the first is what is written into."""
    if call.packet is aten.copy and len(operand.shape) <= len(call.shape):
        return broadcast(operand.value, operand.shape, call.shape)
    ways = _ways(call, operand)
    missing = 0 if ways is None else len(ways) - len(operand.shape)
    if ways is None or missing < 0:
        return operand.value.map(lost)

    def change(part: Part) -> Part:
        if part.dims is None:
            return part
        held: Dims = (*[frozenset[int]()] * missing, *part.dims)
        lying = ([held[place] for place, way in enumerate(ways) if d in way] for d in range(len(call.shape)))
        return replace(part, dims=tuple(frozenset[int]().union(*each) for each in lying))

    return operand.value.map(change)


def _ways(call: Call, operand: Operand) -> Dims | None:
    """For each dimension of what values are put into, the result's that it lies along; None where nothing tells."""
    order = tuple(frozenset({d}) for d in range(len(call.shape)))
    if operand.position > 0 and call.packet in INDEXED:
        return _indexed(call.args[1], order)
    if operand.position == 0 or operand.shape == call.shape:
        return order
    if call.packet in _IN_ORDER:
        return order if len(operand.shape) == len(order) else None
    if call.packet is aten.select_scatter:
        at = call.args[2] % len(order)
        return (*order[:at], *order[at + 1 :])
    if call.packet is aten.diagonal_scatter:
        pair = {d % len(order) for d in call.args[3:5]}
        return (*(way for way in order if not way & pair), frozenset(pair))
    return None


def _indexed(indices: Sequence[Tensor | None], order: Dims) -> Dims:
    """Of ``x[indices]``: indices side by side give way to their own dimensions, in place, else first of all."""
    moved: list[tuple[frozenset[int], tuple[int, ...]]] = []  # what each index chooses from, and its own shape
    d = 0
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        taken = index.dim() if index is not None and is_mask else 1
        if index is not None:
            moved.append((frozenset(range(d, d + taken)), (2,) if is_mask else tuple(index.shape)))
        d += taken
    chosen = frozenset[int]().union(*(each for each, _ in moved))
    if not chosen:
        return order
    rank = max(len(shape) for _, shape in moved)
    own = tuple(
        frozenset[int]().union(*(each for each, shape in moved if len(shape) >= back and shape[-back] != 1))
        for back in range(rank, 0, -1)
    )
    together = max(chosen) - min(chosen) + 1 == len(chosen)
    first = min(chosen) if together else 0
    rest = [way for way in order if not way & chosen]
    return (*rest[:first], *own, *rest[first:])
