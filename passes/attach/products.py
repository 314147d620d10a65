"""What an op that sums over products makes of weights, with data or with parameters alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from lotion_fx.passes.attach.call import CONTRACTION, INNER, INPUT, PRODUCT, SCALE, SUM, Call, Meeting, Operand
from lotion_fx.passes.attach.values import CONSTANT, DATA, Part, Value, broadcast, lost, merged
from lotion_fx.passes.ops import CONTRACTED
from lotion_fx.private import arguments_of

aten = torch.ops.aten


def contraction(call: Call) -> Value:
    """Of two operands, each summed over the dimension that its row says; what else is given is added."""
    rule: Mapping[int, int] = CONTRACTED[call.packet]
    factors = [operand for operand in call.operands if operand.position in rule]
    for place, operand in enumerate(factors):
        data = any(other.value.data for other in factors if other is not operand)
        rank = len(operand.shape)
        summed = [rule[operand.position] % rank - rank]
        free = [dim for dim in (-1, -2) if dim not in summed and -dim <= rank]
        for_itself = data or place == 0 or _ends_in(operand.value, summed)
        call.contracts(operand, summed, free, data=data, own=for_itself)
    added = [operand for operand in call.operands if operand.position not in rule]
    if call.data:
        call.meets(SUM, added)
        return DATA
    if call.packet not in MATRIX:
        return merged([operand.value.map(_multiplied) for operand in call.operands])
    products = [_free(operand, place, len(call.shape)) for place, operand in enumerate(factors)]
    return merged([*products, *(broadcast(operand.value, operand.shape, call.shape) for operand in added)])


MATRIX = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot}


def _ends_in(value: Value, summed: Sequence[int]) -> bool:
    """Whether a weight [..., out, in] is summed over its last dimension, as a linear layer's is."""
    return any(len(part.shape) - 1 in part.held_at(summed) for part in value.parts.values())


def _free(operand: Operand, place: int, rank: int) -> Value:
    """What a product of parameters holds of one factor: rows of the first, columns of the second, any batch."""

    def change(part: Part) -> Part:
        if part.dims is None or len(operand.shape) > 3 or rank > 3:
            return replace(part, dims=None, multiplied=True)
        dims = [frozenset[int]() for _ in range(rank)]
        if rank == 3 and len(operand.shape) == 3:
            dims[0] = part.dims[0]
        if rank >= 2 or (rank == 1 and place == 0 and len(operand.shape) == 2):
            dims[-2 + place if rank >= 2 else 0] = part.dims[-2 + place]
        return replace(part, dims=tuple(dims), multiplied=True)

    return operand.value.map(change)


def convolution(call: Call) -> Value:
    """Of a kernel, which may be made of weights, with an input, which is no weight even where it is learned."""
    inputs, kernels, biases = call.at(0), call.at(1), call.at(2)
    transposed, groups = call.args[6], call.args[8]
    for kernel in kernels:
        rest = [*range(1, len(kernel.shape))]
        data = any(operand.value.data for operand in inputs)
        for weight, part in kernel.value.parts.items():
            if part.scaled and not (data and part.is_matrix(rest, [0])):
                continue
            held = part.held_at([0 if transposed else 1])
            shape, mine = part.shape, kernel.shape == part.shape
            # A depthwise kernel contracts its window alone: one input channel a group is no dimension to block.
            many = held and shape[min(held)] > (groups if transposed and mine else 1)
            summed = frozenset({min(held)}) if many else frozenset({len(shape) - 1} if part.dims else ())
            kind = CONTRACTION if data else INNER
            call.record(weight, Meeting(kind, call.name, part, summed, groups=groups if mine else 0))
    if call.data:
        call.meets(INPUT, inputs)
        call.meets(SUM, biases)
        return DATA
    return merged([operand.value.map(_multiplied) for operand in call.operands])


def _multiplied(part: Part) -> Part:
    return replace(part, dims=None, multiplied=True)


def attention(call: Call) -> Value:
    """Queries and keys are summed over features, values over positions; a bias of the scores is added."""
    if not call.data:
        return opaque(call)
    for operand in call.operands:
        name = arguments_of(call.func)[operand.position].name
        if name in ("query", "key", "value") or operand.position < 3:
            data = any(other.value.data for other in call.operands if other is not operand)
            call.contracts(
                operand, [-2 if operand.position == 2 else -1], [-1 if operand.position == 2 else -2], data=data
            )
        else:
            call.meets(SUM, [operand])
    return DATA


def weight_norm(call: Call) -> list[Value]:
    """Direction and gain: the first is the weight, the second a scale of it."""
    direction, gain = call.at(0), call.at(1)
    call.meets(SCALE, gain)
    return [merged([operand.value for operand in direction]), CONSTANT]


def opaque(call: Call) -> Value:
    """An op that nothing is known of."""
    if not call.data:
        return merged([operand.value.map(lost) for operand in call.operands])
    call.meets(PRODUCT, call.operands)
    return DATA


def transform(call: Call) -> Value:
    """A Fourier transform: of a weight times data, in spectra, it is the sum of a convolution."""
    if call.data:
        for operand in call.operands:
            for weight, part in operand.value.parts.items():
                rank = len(part.dims or ())
                summed = part.held_at(dim % rank for dim in call.args[1]) if rank else frozenset()
                call.record(weight, Meeting(PRODUCT, call.name, part, summed))
        return DATA
    return opaque(call)
