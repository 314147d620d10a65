"""What an elementwise op makes of weights: scales of one another, factors of data that may yet be used as matrices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from lotion_fx.passes.attach.call import CONTRACTION, DEVIATION, ELEMENTWISE, PLACED, SCALE, SUM, Call, Meeting, Operand
from lotion_fx.passes.attach.products import opaque
from lotion_fx.passes.attach.values import DATA, Part, Value, aligned, broadcast, merged, scaled
from lotion_fx.passes.dims import Dims

aten = torch.ops.aten

_SCALINGS = {aten.mul, aten.div, aten.true_divide, aten.multiply}
_SUMS = {aten.add, aten.sub, aten.rsub}
_LINEAR = _SCALINGS | _SUMS | {aten.where, aten.masked_fill}


def elementwise(call: Call) -> Value:
    """Dimensions stay where they are."""
    call = _beside_noise(call)
    if call.data:
        return _with_data(call)
    _leave_scales(call)
    values = [broadcast(operand.value, operand.shape, call.shape) for operand in call.operands]
    if call.packet in _SCALINGS | _SUMS:
        values = [_without(value, _scales(call, operand)) for value, operand in zip(values, call.operands, strict=True)]
    made = merged(values)
    if call.packet in _SCALINGS and any(operand.value.noise for operand in call.operands):
        made = made.map(lambda part: replace(part, deviation=True))
    return made if call.packet in _LINEAR else made.map(lambda part: None if part.multiplied else part)


def _beside_noise(call: Call) -> Call:
    """The call with noise as a constant, where it is all the data in it and no larger than a weight that it meets."""
    drawn = all(operand.value.noise for operand in call.operands if operand.value.data)
    if not drawn or not any(o.value.parts and o.shape == call.shape for o in call.operands):
        return call
    return replace(call, operands=[o._replace(value=replace(o.value, data=False)) for o in call.operands])


def _without(value: Value, left_out: Iterable[int]) -> Value:
    left = set(left_out)
    return Value(value.data, {weight: part for weight, part in value.parts.items() if weight not in left})


def _scales(call: Call, operand: Operand) -> list[int]:
    """The weights of an operand that are mere scales or offsets of another operand: broadcast over it, no matrices.

    Or they scale the noise on it.
    """
    if call.packet in _SUMS and (found := _deviations(call, operand)):
        return found
    if operand.tensor.numel() == torch.Size(call.shape).numel():
        return []
    covering = [o for o in call.operands if o is not operand and o.tensor.numel() == torch.Size(call.shape).numel()]
    others = set[int]().union(*(other.value.parts for other in covering))
    return [
        weight
        for weight, part in operand.value.parts.items()
        if covering
        and (weight in others or len(part.long(range(len(part.shape)))) < 2 or (others and call.packet in _SCALINGS))
    ]


def _deviations(call: Call, operand: Operand) -> list[int]:
    others = [part for other in call.operands if other is not operand for part in other.value.parts.values()]
    if all(part.deviation for part in others):
        return []
    return [weight for weight, part in operand.value.parts.items() if part.deviation]


def _leave_scales(call: Call) -> None:
    if call.packet not in _SCALINGS | _SUMS:
        return
    held = set[int]().union(*(o.value.parts for o in call.operands if not _scales(call, o)))
    for operand in call.operands:
        for weight in _scales(call, operand):
            if weight not in held:
                part = operand.value.parts[weight]
                kind = SCALE if call.packet in _SCALINGS else DEVIATION if part.deviation else SUM
                call.record(weight, Meeting(kind, call.name, part))


def _with_data(call: Call) -> Value:
    """A weight in a product with data goes on, scaled; in a sum with it, or in anything else, it ends."""
    kept = []
    for operand in call.operands:
        data = [other for other in call.operands if other.value.data and other is not operand]
        goes_on, kind = _role(call, operand, data)
        call.meets(kind, [operand])
        if goes_on:
            parts = {weight: _scaled(part, call, operand, data) for weight, part in operand.value.parts.items()}
            kept.append(Value(True, {weight: part for weight, part in parts.items() if part is not None}))
    return Value(True, merged(kept).parts)


def _scaled(part: Part, call: Call, operand: Operand, data: Sequence[Operand]) -> Part | None:
    if part.scaled:
        return aligned(part, operand.shape, call.shape)
    by = [other.shape for other in data]
    return scaled(part, operand.shape, by, call.shape, mixes=operand.tensor.is_complex()) if by else None


def _role(call: Call, operand: Operand, data: Sequence[Operand]) -> tuple[bool, str]:
    """Whether an operand's weights go on through an elementwise op with data, and the kind of the meeting."""
    packet, beside = call.packet, [o for o in data if o.position > 0 or call.packet is not aten.where]
    if packet in _SUMS:
        return operand.value.data, SUM
    if packet is aten.where:
        return not beside, PLACED if beside else ELEMENTWISE
    if packet is aten.masked_fill:
        return operand.position == 0, ELEMENTWISE
    if packet in _SCALINGS:
        return packet in (aten.mul, aten.multiply) or operand.position == 0, ELEMENTWISE
    return False, ELEMENTWISE


def normalization(call: Call) -> Value | list[Value]:
    """Its weights are scales and offsets."""
    if not call.data:
        return opaque(call)
    call.meets(ELEMENTWISE, call.operands)
    return DATA


def reduction(call: Call) -> Value:
    """A sum over dimensions. Of a weight times data that does not vary with the others, it is a product by hand."""
    (operand,) = call.at(0)
    rank = len(operand.shape)
    given = call.args[1] if len(call.args) > 1 and isinstance(call.args[1], (list, tuple)) else None
    summed = [dim % rank for dim in given] if given else [*range(rank)]
    if call.data:
        for weight, part in operand.value.parts.items():
            free = [dim for dim in range(rank) if dim not in summed]
            if part.outer and part.dims is not None and part.is_matrix(summed, free):
                held = part.long(part.held_at(summed))
                call.record(weight, Meeting(CONTRACTION, call.name, part, held, free=part.held_at(free)))
        return DATA

    def change(part: Part) -> Part | None:
        if part.dims is None:
            return part
        keeps = len(call.shape) == rank
        dims: Dims = tuple(
            frozenset() if i in summed else d for i, d in enumerate(part.dims) if keeps or i not in summed
        )
        return replace(part, dims=dims)

    return operand.value.map(change)
