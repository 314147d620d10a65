"""T, the number of independent loss terms that a graph saw: how many of its output positions have a gradient.

It is counted at the heads, the contractions nearest the loss: the first that the backward pass reaches from each
tangent. A position whose label is ignored, or whose head is in no loss, has a gradient of exact zeros there and is not
counted; of several heads in the loss the one with most positions tells T.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from functools import reduce

import torch
from torch import fx

from lotion_fx.passes.curvature.contraction import Contraction, after, emit, square
from lotion_fx.passes.curvature.joint import JointGraph, Uses, numel, operands, root
from lotion_fx.passes.curvature.path import Path
from lotion_fx.passes.ops import ADDING, MATRIX_PRODUCTS, contraction_at, makes_gradients

aten = torch.ops.aten


def loss_count(joint: JointGraph, uses: Sequence[Uses], ends: Sequence[Path]) -> fx.Node | None:
    """Emits what a probe's header has of the loss, float32 [norms, energies, T], or [T] where the others are 0.

    None where no gradient in the graph has positions.

    Args:
        joint: the graph.
        uses: how each smoothed weight is used in it.
        ends: where the paths of the weights' gradients end.
    """
    made = {_op(end.node) for end in ends}
    outermost, behind, covered = _heads(joint, made)
    bare = [end for end in ends if not end.contraction and _gradient(joint, end.node) not in covered]
    nearest = [
        _joined(_larger, [_at_head(joint, uses, node, node in made) for node in outermost]),
        _joined(_larger, [_at_end(joint, end) for end in bare]),
    ]
    others = [_if_any(tangents, _at_head(joint, uses, node, node in made)) for node, tangents in behind.items()]
    return _joined(_larger, _present([_joined(_first, _present(nearest)), *others]))


def _heads(
    joint: JointGraph, made: Collection[fx.Node]
) -> tuple[list[fx.Node], dict[fx.Node, list[fx.Node]], set[fx.Node]]:
    """The first contractions that the backward pass reaches from the tangents.

    Args:
        joint: the graph.
        made: nodes that make a smoothed weight's gradient, where a product may be a contraction of one position.

    Returns:
        Those behind no other contraction; those behind one, as of an output that the model also computes with, each
        with the tangents that reach it first; and all that is behind a contraction.
    """
    outermost: dict[int, fx.Node] = {}
    behind: dict[fx.Node, list[fx.Node]] = {}
    covered: set[fx.Node] = set()
    claimed: set[fx.Node] = set()
    tangents: dict[fx.Node, frozenset[fx.Node]] = {}  # what each node has come from with no contraction between
    for node in joint.graph.nodes:
        if node not in joint.backward:
            continue
        sources = [n for n in node.all_input_nodes if n in joint.backward]
        tangents[node] = frozenset[fx.Node]().union(*(tangents[n] for n in sources)) if sources else frozenset({node})
        contraction = contraction_at(node) if makes_gradients(node) or node in made else None
        if contraction is None:
            if any(n in covered for n in sources):
                covered.add(node)
            continue
        gradients = [operand for operand in contraction.operands if operand in joint.backward]
        if len(gradients) == 1:
            reached = tangents[gradients[0]]
            if gradients[0] not in covered:
                outermost.setdefault(joint.number(gradients[0]), node)
            elif new := sorted(reached - claimed):
                behind[node] = new
            claimed |= reached
        covered.add(node)
        tangents[node] = frozenset()
    return list(outermost.values()), behind, covered


def _at_head(joint: JointGraph, uses: Sequence[Uses], node: fx.Node, is_end: bool) -> fx.Node:
    """T at a contraction, whose gradient operand has positions and features."""
    contraction = contraction_at(node)
    assert contraction is not None
    gradient = next(operand for operand in contraction.operands if operand in joint.backward)
    with joint.graph.inserting_before(node):
        return _count(joint, gradient, _features(joint, uses, node, contraction, is_end))


def _at_end(joint: JointGraph, end: Path) -> fx.Node:
    """T at the gradient of an embedding's or an elementwise op's output.

    Its last dimension is features, unless it only enters broadcast, as the scalar output of a decomposed matrix-vector
    product does.
    """
    gradient = _gradient(joint, end.node)
    is_broadcast = gradient.meta["val"].dim() < end.node.meta["val"].dim()
    with joint.graph.inserting_before(after(gradient)):
        return _count(joint, gradient, [] if is_broadcast else [-1])


def _if_any(tangents: Sequence[fx.Node], count: fx.Node) -> fx.Node:
    """A count at a head that other gradients reach too: 0 where all its own tangents are."""
    graph = count.graph
    with graph.inserting_before(after(count)):
        found = [emit(graph, aten.any.default, emit(graph, aten.ne.Scalar, tangent, 0)) for tangent in tangents]
        own = reduce(lambda one, other: emit(graph, aten.bitwise_or.Tensor, one, other), found)
        return emit(graph, aten.mul.Tensor, count, own)


def _terms(told: fx.Node) -> fx.Node:
    """T of what a head tells."""
    return emit(told.graph, aten.select.int, told, 0, -1)


def _joined(rule: Callable[[fx.Node, fx.Node], fx.Node], counts: Sequence[fx.Node]) -> fx.Node | None:
    """Counts made one by a rule for two, emitted behind the later; None of none."""

    def both(one: fx.Node, other: fx.Node) -> fx.Node:
        with one.graph.inserting_before(after(max(one, other))):
            return rule(one, other)

    return reduce(both, counts) if counts else None


def _larger(one: fx.Node, other: fx.Node) -> fx.Node:
    is_larger = emit(one.graph, aten.gt.Tensor, _terms(other), _terms(one))
    return emit(one.graph, aten.where.self, is_larger, other, one)


def _present(counts: Sequence[fx.Node | None]) -> list[fx.Node]:
    return [count for count in counts if count is not None]


def _first(one: fx.Node, other: fx.Node) -> fx.Node:
    """The first, unless its T is 0."""
    return emit(one.graph, aten.where.self, emit(one.graph, aten.gt.Scalar, _terms(one), 0), one, other)


def _count(joint: JointGraph, gradient: fx.Node, features: Sequence[int]) -> fx.Node:
    """Over positions the gradient's norms, their squares, and the number of those where any feature's is not zero.

    The number alone where the model makes no loss itself: then its outputs' gradients tell more.
    """
    graph = gradient.graph
    nonzero = emit(graph, aten.ne.Scalar, gradient, 0)
    for dim in features:
        nonzero = emit(graph, aten.any.dim, nonzero, dim, True)
    count = emit(graph, aten.reshape.default, emit(graph, aten.sum.default, nonzero, dtype=torch.float32), [1])
    if not joint.has_loss:
        return count
    is_complex = gradient.meta["val"].is_complex()
    squares = square(emit(graph, aten.abs.default, gradient) if is_complex else gradient)
    for dim in features:
        squares = emit(graph, aten.sum.dim_IntList, squares, [dim], True)
    sums = [emit(graph, aten.sum.default, x) for x in (emit(graph, aten.sqrt.default, squares), squares)]
    return emit(graph, aten.cat.default, [*(emit(graph, aten.reshape.default, x, [1]) for x in sums), count])


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
    """Whether the gradient's partner is the weight of the forward contraction, and not its input."""
    for node in joint.graph.nodes:
        if node in joint.backward or node.target not in MATRIX_PRODUCTS or numel(node) != numel(gradient):
            continue
        first, second = operands(node)[-2:] if node.target in ADDING else operands(node)[:2]
        if joint.number(partner) in (joint.number(first), joint.number(second)):
            weight = first if _is_weight_first(uses, first, second) else second
            return joint.number(partner) == joint.number(weight)
    return True


def _is_weight_first(uses: Sequence[Uses], first: fx.Node, second: fx.Node) -> bool:
    """Whether a product's first operand is the weight. The second is by convention, as of a frozen or tied head.

    What holds a smoothed weight is known. What a function of one may be is that weight, as its normalized form, or the
    activations behind a layer that is nonlinear in it, which then meet another weight.
    """
    if any(second in use.chain for use in uses):
        return False
    if any(first in use.chain for use in uses):
        return True
    return root(second).op != "placeholder" and any(first in use.shadow for use in uses)


def _op(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0] if node.target is operator.getitem else node


def _gradient(joint: JointGraph, node: fx.Node) -> fx.Node:
    """The output's gradient in the gradient of a weight's copies, which may already be multiplied by the input."""
    if node.target is not aten.mul.Tensor:
        return node
    return next(operand for operand in node.all_input_nodes if operand in joint.backward)
