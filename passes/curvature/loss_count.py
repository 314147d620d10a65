"""T, the number of independent loss terms that a graph saw: how many of its output positions have a gradient.

It is counted at the contraction nearest the loss, the first of the backward pass. A position whose label is ignored has
a gradient of exact zeros there, and is not counted.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from lotion_fx.passes.curvature.contraction import Contraction, after, emit
from lotion_fx.passes.curvature.joint import JointGraph, Uses, numel, operands
from lotion_fx.passes.curvature.path import Path
from lotion_fx.passes.ops import ADDING, MATRIX_PRODUCTS, contraction_at, makes_gradients

aten = torch.ops.aten


def loss_count(joint: JointGraph, uses: Sequence[Uses], ends: Sequence[Path]) -> fx.Node | None:
    """Emits T, a float32 scalar; None where no gradient in the graph has positions.

    Args:
        joint: the graph.
        uses: how each smoothed weight is used in it.
        ends: where the paths of the weights' gradients end.
    """
    found = {_op(end.node): end for end in ends}
    for node in joint.graph.nodes:
        contraction = contraction_at(node) if makes_gradients(node) or node in found else None
        if contraction is None:
            continue
        gradients = [operand for operand in contraction.operands if operand in joint.backward]
        if len(gradients) == 1:
            with joint.graph.inserting_before(node):
                return _count(gradients[0], _features(joint, uses, node, contraction, node in found))
    if not ends:
        return None
    # No contraction at all: the gradient of an embedding's or an elementwise op's output, whose last dimension is
    # features, unless it only enters broadcast, as the scalar output of a decomposed matrix-vector product does.
    gradient = _gradient(joint, ends[0].node)
    is_broadcast = gradient.meta["val"].dim() < ends[0].node.meta["val"].dim()
    with joint.graph.inserting_before(after(gradient)):
        return _count(gradient, [] if is_broadcast else [-1])


def _count(gradient: fx.Node, features: Sequence[int]) -> fx.Node:
    """Number of positions at which any feature's gradient is not zero."""
    graph = gradient.graph
    nonzero = emit(graph, aten.ne.Scalar, gradient, 0)
    for dim in features:
        nonzero = emit(graph, aten.any.dim, nonzero, dim, True)
    return emit(graph, aten.sum.default, nonzero, dtype=torch.float32)


def _features(
    joint: JointGraph, uses: Sequence[Uses], node: fx.Node, contraction: Contraction, is_end: bool
) -> list[int]:
    """The dimensions of the contraction's gradient operand that are features; the others are positions.

    The gradient of an input contracts over features, that of a weight over positions.
    """
    pair = contraction.operands
    place = 0 if pair[0] in joint.backward else 1
    if contraction.positions:
        rank = pair[place].meta["val"].dim()
        positions = {dim % rank for dim in contraction.positions[place]}
        return [dim for dim in range(rank) if dim not in positions]
    if node.target is aten.convolution_backward.default:
        return [1]
    if node.target is aten.mul.Tensor:
        return [-2, -1]
    if node.target is aten.mv.default:
        return [-1] if place == 0 else []
    contracted = -1 if place == 0 else -2
    of_input = not is_end and _meets_weight(joint, uses, pair[place], pair[1 - place])
    return [contracted if of_input else -3 - contracted]


def _meets_weight(joint: JointGraph, uses: Sequence[Uses], gradient: fx.Node, partner: fx.Node) -> bool:
    """Whether the gradient's partner is the weight of the forward contraction, and not its input.

    A smoothed weight is known. Where neither operand is one (a frozen or tied head), the second is the weight, as it
    is by convention in a matrix product.
    """
    for node in joint.graph.nodes:
        if node in joint.backward or node.target not in MATRIX_PRODUCTS or numel(node) != numel(gradient):
            continue
        first, second = operands(node)[-2:] if node.target in ADDING else operands(node)[:2]
        if joint.number(partner) in (joint.number(first), joint.number(second)):
            weight = first if any(first in use.shadow | use.chain for use in uses) else second
            return joint.number(partner) == joint.number(weight)
    return True


def _op(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0] if node.target is operator.getitem else node


def _gradient(joint: JointGraph, node: fx.Node) -> fx.Node:
    """The output's gradient in the gradient of a weight's copies, which may already be multiplied by the input."""
    if node.target is not aten.mul.Tensor:
        return node
    return next(operand for operand in node.all_input_nodes if operand in joint.backward)
