"""Where weights go through one op, and where they meet data.

A rule takes a `Call` and gives the value of its results; where the op meets data with a weight, it says how by
``call.meets``. An op without a rule of its own is a rearrangement, elementwise, or opaque: what an opaque op makes of
weights alone still holds them, arranged as the compiler's own ops in its place tell, if there are such, and where one
takes data with a weight, it is a product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lotion_fx.passes.attach.call import EMBEDDING, LOOKUP, PLACED, Call
from lotion_fx.passes.attach.elementwise import elementwise, normalization, reduction
from lotion_fx.passes.attach.placement import INDEXED, placement
from lotion_fx.passes.attach.products import attention, contraction, convolution, opaque, transform, weight_norm
from lotion_fx.passes.attach.strides import Box, seen
from lotion_fx.passes.attach.values import CONSTANT, DATA, NOISE, Part, Value, lost, merged, placed
from lotion_fx.passes.ops import CONTRACTED, REARRANGED

aten = torch.ops.aten

Rule = Callable[[Call], "Value | list[Value]"]


def followed(call: Call) -> list[Value]:
    """The value of each result."""
    made = _rule(call)(call)
    return made if isinstance(made, list) else [made] * len(call.shapes)


def is_unknown(call: Call) -> bool:
    """Whether no rule tells where an op puts the weights that it is given, no data being among its operands."""
    held = any(part.dims is not None for operand in call.operands for part in operand.value.parts.values())
    return held and not call.data and _rule(call) in (opaque, normalization)


def _rule(call: Call) -> Rule:
    packet, name = call.packet, call.name
    if packet in RULES:
        return RULES[packet]
    if packet in CONTRACTED:
        return contraction
    if packet in REARRANGED:
        return rearrangement
    if "dot_product" in name or name.endswith("attention_forward"):
        return attention
    if name.endswith("_like") or name.startswith("new_"):
        return _random if name.startswith("rand") else _constant
    if name.endswith("norm") or "batch_norm" in name:
        return normalization
    if torch.Tag.pointwise in call.func.tags:
        return elementwise
    return transform if name.startswith("fft_") else opaque


def _constant(call: Call) -> Value:
    return CONSTANT


def _random(call: Call) -> Value:
    return DATA if call.data else NOISE


def rearrangement(call: Call) -> Value:
    """Of the first argument; what else is given says how."""
    dims, first = REARRANGED[call.packet], call.at(0)
    made = [placed(first[0].value, dims, call.args, first[0].shape, shape) for shape in call.shapes[:1] if first]
    return made[0] if made else CONSTANT


def rearrangements(call: Call) -> list[Value]:
    """Likewise, several results."""
    (first,) = call.at(0)
    dims = REARRANGED[call.packet]
    return [placed(first.value, dims, call.args, first.shape, shape) for shape in call.shapes]


# ----------------------------------------------------------------------------------------------- lookups, joins, places


def embedding(call: Call) -> Value:
    """Rows of a table."""
    tables = [operand for operand in call.operands if operand.tensor.is_floating_point()]
    call.meets(EMBEDDING, tables)
    return DATA if call.data else CONSTANT


def gather(call: Call) -> Value:
    """Members of a stack, or entries of a table, by an index: it is a lookup unless they are then used as matrices."""
    first, *indices = call.operands
    if first.position != 0 or not isinstance(call.args[0], Tensor):
        return opaque(call)
    by_data = any(operand.value.data for operand in indices)
    if by_data:
        call.meets(LOOKUP, [first])
    dims = REARRANGED.get(call.packet)
    if dims is None or (call.data and call.packet is aten.gather):  # each entry by an index of its own: no matrices
        return DATA if call.data else first.value.map(lost)
    made = placed(first.value, dims, call.args, first.shape, call.shape)
    made = made.map(lambda part: _gathered(part, call) if by_data else part)
    return Value(call.data, made.parts)


def _gathered(part: Part, call: Call) -> Part:
    """A part whose chosen dimension is now the data's."""
    first = call.args[1]
    places = [first] if isinstance(first, int) else [place for place, at in enumerate(first) if at is not None]
    if part.dims is None or len(places) != 1:
        return replace(part, scaled=True)
    chosen = places[0] % len(part.dims)
    dims = tuple(frozenset[int]() if place == chosen else d for place, d in enumerate(part.dims))
    return replace(part, scaled=True, dims=dims)


def sampled(call: Call) -> Value:
    """Entries of a table, chosen or interpolated at places that are data."""
    if not call.data:
        return opaque(call)
    call.meets(LOOKUP, call.operands)
    return DATA


def join(call: Call) -> Value:
    """Of weights alone they stand side by side; beside data a weight is itself some of the activations."""
    if call.data:
        call.meets(PLACED, call.operands)
        return DATA
    stacks = call.packet is aten.stack
    at = call.args[1] % len(call.shape)

    def change(part: Part) -> Part:
        if part.dims is None or not stacks:
            return part
        return replace(part, dims=(*part.dims[:at], frozenset(), *part.dims[at:]))

    return merged([operand.value.map(change) for operand in call.operands])


def pair(call: Call) -> Value:
    """Two real tensors as one, elementwise."""
    return opaque(call) if call.data else elementwise(call)


def strided(call: Call) -> Value:
    """Elements by their places in memory."""
    if call.data:
        return opaque(call)
    (first,) = call.at(0)
    base = Box.of(first.tensor)
    view = Box(call.shape, tuple(call.args[2]), base.offset if call.args[3] is None else call.args[3])
    return first.value.map(lambda part: seen(part, view, base))


RULES: dict[Any, Rule] = {
    aten.convolution: convolution,
    aten._weight_norm_interface: weight_norm,
    aten.embedding: embedding,
    aten._embedding_bag: embedding,
    aten._embedding_bag_forward_only: embedding,
    aten.embedding_renorm: embedding,
    aten.cat: join,
    aten.stack: join,
    aten._prelu_kernel: elementwise,
    aten.complex: pair,
    aten.as_strided: strided,
    aten.randn: _random,
    aten.rand: _random,
    aten.normal: _random,
    aten.uniform: _random,
    aten.bernoulli: lambda call: Value(call.at(0)[0].value.data) if call.at(0) else CONSTANT,
    aten.fill: _constant,
    aten.zero: _constant,
    **dict.fromkeys((aten.unbind, aten.split, aten.split_with_sizes, aten.chunk), rearrangements),
    **dict.fromkeys((aten.sum, aten.mean), reduction),
    **dict.fromkeys((aten.index, aten._unsafe_index, aten.index_select, aten.gather, aten.take), gather),
    **dict.fromkeys((aten.grid_sampler_2d, aten.grid_sampler_3d, aten.masked_select), sampled),
    **dict.fromkeys((*INDEXED, aten.index_copy, aten.index_add, aten.copy), placement),
    **dict.fromkeys((aten.scatter, aten.scatter_add, aten.slice_scatter, aten.select_scatter), placement),
    **dict.fromkeys((aten.masked_scatter, aten.diagonal_scatter, aten.scatter_reduce), placement),
}  # fmt: skip
