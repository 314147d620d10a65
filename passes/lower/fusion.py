"""Fuse: the sums and vectors that `passes.curvature` emits, in the forms that cost a GPU next to nothing.

The pass emits plain sums of squares, ``a[p] = sum_n g[n, p]^2`` and ``b[q] = sum_n x[n, q]^2``, and joins them to a
vector for each weight. Emitted so, each is a kernel or two of its own that reads its operand once more. Inductor makes
a sum part of a kernel that has the operand at hand anyway, if the loops of both agree, which decides the form:

    made by pointwise ops     [B, K, T/K, C] -> [B, K, C] in the kernel that makes it, which is written in that shape
    other gradients           [B, T, C] -> [B, C] in a loop that reads it, if there are enough results without a cut
    input of the backward     [B, T, C] -> [C] with the row reductions that read it too (`config.mix_order_reduction`)
    what is left              [S, B, K, T/K, C] -> [S, B, K, C], those of one shape by one kernel

where the view [N, C] that the contraction has of its operand is left for the shape in which that was made. The partial
sums of all weights, their counts of terms and their headers are put together by one kernel: vectors that are sums over
as many rows, and padded to one length, are one loop to Inductor. `benchmarks/emitted.py` counts what comes of it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, fx

from lotion_fx.kernels.targets import TARGETS
from lotion_fx.passes.curvature.contraction import after, arguments, emit, filled, square
from lotion_fx.passes.curvature.joint import JointGraph
from lotion_fx.passes.ops import ALIASES, CASTS, FILLS, PERMUTES, RESHAPES
from lotion_fx.private import OpOverload

if TYPE_CHECKING:
    from lotion_fx.passes.pipeline import JointState

aten, prims = torch.ops.aten, torch.ops.prims

# With fewer results a multiprocessor Inductor splits a reduction, into two kernels that nothing is fused with.
RESULTS = 64 * max(target.multiprocessors for target in TARGETS.values())
# Positions under a partial sum at least, lest the partial sums are traffic themselves.
POSITIONS = 64
# Counts of terms at least: with fewer bytes in common Inductor fuses nothing (`config.score_fusion_memory_threshold`).
COUNTS = 4
# Operands in one kernel at most: of more, Inductor makes copies (`config.max_complex_pointwise_cat_inputs`).
STACKED = 8

_MOVES = PERMUTES | RESHAPES | ALIASES | {aten.expand.default, aten.cat.default}
_MOVES |= {aten.select_backward.default, aten.slice_backward.default, aten.select_scatter.default}
_ROW_REDUCTIONS = {aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.var_mean.correction}


class Operand(NamedTuple):
    """A contraction's operand in the shape in which it was made.

    Args:
        node: a tensor.
        positions: how many of its dimensions, the first ones, are positions; the others are features.
        matrix: the view [N, C] of it that the contraction has.
    """

    node: fx.Node
    positions: int
    matrix: fx.Node

    @property
    def lengths(self) -> list[int]:
        """Of the dimensions that are positions."""
        return list(self.node.meta["val"].shape[: self.positions])

    @property
    def features(self) -> int:
        return math.prod(self.node.meta["val"].shape[self.positions :])

    @property
    def given(self) -> bool:
        """Whether it is, or is cast from, an input of the graph."""
        return _uncast(self.node).op == "placeholder"

    def as_read(self) -> Operand:
        """Itself, or the matrix where that is what an input of the graph is cast as."""
        cast_as_matrix = self.given and self.node.target in CASTS
        return Operand(self.matrix, 1, self.matrix) if cast_as_matrix else self


def on_gpu(node: fx.Node) -> bool:
    """Whether a node's value is on a device whose kernels these forms are for."""
    return node.meta["val"].device.type != "cpu"


def fuse_vectors(state: JointState) -> JointState:
    """`fuse`, as a pass."""
    vectors = [found.vector for found in state.resolutions if found.vector.users and found.kind != "full"]
    if not vectors or not on_gpu(vectors[0]):
        return state
    fuse(state.graph, vectors)
    state.graph.eliminate_dead_code()
    state.graph.lint()
    return replace(state, fired={**state.fired, "fuse vectors": len(vectors)})


def fuse(graph: fx.Graph, vectors: Sequence[fx.Node]) -> None:
    """Rewrites emitted vectors, and the sums in them, of a joint graph on a GPU.

    Args:
        graph: the joint graph, in place.
        vectors: probe vectors that `passes.curvature` put together, none with a full payload.
    """
    parts = {vector: _parts(vector) for vector in vectors}
    emitted = dict.fromkeys(part for each in parts.values() for part in each)
    partial = _partial_sums(JointGraph(graph), [part for part in emitted if _summed_by(part)])
    partial |= {part: terms for part in emitted if (terms := _partial_terms(part))}
    widths, rows = _widths(vectors), max((node.meta["val"].shape[0] for node in partial.values()), default=1)
    for vector, each in parts.items():
        # A sum that shares its kernel may be made after the vector's own place.
        with graph.inserting_before(after(max(vector, *(partial.get(part, part) for part in each)))):
            vector.replace_all_uses_with(_joined(vector, each, partial, rows, widths[vector]))


# ------------------------------------------------------------------ what was emitted
def _parts(vector: fx.Node) -> list[fx.Node]:
    """What a vector joins, the views that join it left off."""
    pieces: Any = vector.args[0]
    return [_seen_through(piece) for piece in pieces]


def _seen_through(node: fx.Node) -> fx.Node:
    while node.target in RESHAPES | {aten.expand.default}:
        behind = node.all_input_nodes[0]
        if behind.meta["val"].numel() != node.meta["val"].numel():
            break
        node = behind
    return node


def _summed_by(node: fx.Node) -> Operand | None:
    """The operand whose squares a node sums over positions, if it is such a node."""
    if node.target is not aten.sum.dim_IntList or len(arguments(node)) != 2 or len(arguments(node)[1]) != 1:
        return None
    squared, (dim,) = arguments(node)
    if squared.target is not aten.mul.Tensor or squared.args[0] is not squared.args[1]:
        return None
    matrix = squared.args[0]
    return _operand(_uncast(matrix), dim)


def _uncast(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0] if node.target in CASTS else node


def _operand(matrix: fx.Node, dim: int) -> Operand | None:
    """The operand that a matrix with positions along ``dim`` is a view of; None where it is no such view."""
    while matrix.target in PERMUTES:
        matrix, dim = matrix.all_input_nodes[0], 1 - dim
    shape = matrix.meta["val"].shape
    if len(shape) != 2 or dim != 0 or not all(isinstance(length, int) for length in shape):
        return None
    node, positions = matrix, 1
    while node.target in RESHAPES and (count := _leading(node.all_input_nodes[0], shape[0])):
        node, positions = node.all_input_nodes[0], count
    return Operand(node, positions, matrix)


def _leading(node: fx.Node, numel: int) -> int:
    """How many of a tensor's first dimensions have so many elements, 0 if none have."""
    shape = node.meta["val"].shape
    return next((i for i in range(len(shape), 0, -1) if math.prod(shape[:i]) == numel and shape[i - 1] != 1), 0)


def _made_by_pointwise(node: fx.Node) -> bool:
    """Whether a tensor is made in a loop over its elements, none of which needs a reduction of its row."""
    pending, seen, made = [node], set[fx.Node](), False
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        made_of = node.all_input_nodes[0] if node.target is operator.getitem else node
        if made_of.target in _ROW_REDUCTIONS:
            return False
        made |= _pointwise(node)
        if _pointwise(node) or node.target in _MOVES:
            pending += node.all_input_nodes
    return made


def _pointwise(node: fx.Node) -> bool:
    if node.target is aten.clone.default:
        return True
    return isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags


# ------------------------------------------------------------------ partial sums
def _partial_sums(joint: JointGraph, sums: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For each sum [C] the partial sums [K, C] that take its place."""
    partial: dict[fx.Node, fx.Node] = {}
    left: dict[Any, dict[fx.Node, Operand]] = {}  # sums that nothing takes along, by what their operands are like
    # Sums come after the matrix product, which makes Inductor realize its operand: else they would make it once more.
    end = next(node for node in joint.graph.nodes if node in joint.backward and node.op != "placeholder")
    for node in sums:
        operand = _summed_by(node)
        assert operand is not None
        # What checkpointing recomputes is made in the backward pass, though it depends on no gradient.
        forward = operand.node not in joint.backward and operand.node < end
        if operand.node.op == "placeholder" and not forward and _reduced_both_ways(operand.matrix):
            with joint.graph.inserting_before(after(operand.matrix)):
                (partial[node],) = _sums([operand], range(1, operand.positions + 1))
        elif cut := _rides(operand, forward):
            operand = _made_in_parts(operand, cut) if cut > 1 else operand
            with joint.graph.inserting_before(end if forward else node):
                (partial[node],) = _sums([operand], [operand.positions])
            if forward:
                _leave_forward(partial[node], operand.node)
        else:
            # What is recomputed waits for no other, lest checkpointing spare less.
            recomputed = operand.node not in joint.backward and (not forward or "recompute" in operand.node.meta)
            value = operand.matrix.meta["val"]
            left.setdefault((*value.shape, value.dtype, node if recomputed else None), {})[node] = operand
    for alike in left.values():
        for start in range(0, len(alike), STACKED):
            some = dict(list(alike.items())[start : start + STACKED])
            with joint.graph.inserting_before(max(some)):
                partial |= zip(some, _together(list(some.values())), strict=True)
    return partial


def _rides(operand: Operand, forward: bool) -> int:
    """Into how many parts to cut the last dimension of positions of a sum that a loop takes along, 0 if none does."""
    cut = 0 if operand.given else _cut(operand.lengths, RESULTS / operand.features)
    if _made_by_pointwise(operand.node):
        return cut if cut == 1 or _pointwise(operand.node) else 0
    return 1 if cut == 1 and not forward else 0


def _cut(lengths: Sequence[int], least: float) -> int:
    """Into how many parts to cut the last of some lengths for so many sums over it at least; 0 where no cut does."""
    *others, last = lengths
    cuts = (cut for cut in range(1, last // POSITIONS + 1) if last % cut == 0 and math.prod(others) * cut >= least)
    return next(cuts, 0)


def _in_parts(shape: Sequence[int], positions: int, cut: int) -> list[int]:
    """A shape with the last dimension of positions in parts."""
    return [*shape[: positions - 1], cut, shape[positions - 1] // cut, *shape[positions:]]


def _made_in_parts(operand: Operand, cut: int) -> Operand:
    """The operand as its last op makes it in a shape with the last dimension of positions in parts."""
    made, shape = operand.node, list(operand.node.meta["val"].shape)
    parts = _in_parts(shape, operand.positions, cut)

    def emit_alike(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = emit(made.graph, op, *args, **kwargs)
        node.meta = made.meta | {"val": node.meta["val"]}
        return node

    def in_parts(argument: fx.Node) -> fx.Node:
        value = argument.meta["val"]
        if not isinstance(value, Tensor) or value.dim() == 0:
            return argument
        return emit_alike(aten.reshape.default, emit_alike(aten.expand.default, argument, shape), parts)

    with made.graph.inserting_before(after(made)):
        args, kwargs = cast(Any, fx.node.map_arg((made.args, made.kwargs), in_parts))
        node = emit_alike(made.target, *args, **kwargs)
        whole = emit_alike(aten.reshape.default, node, shape)
    made.replace_all_uses_with(whole)
    return Operand(node, operand.positions + 1, operand.matrix)


def _together(operands: Sequence[Operand]) -> list[fx.Node]:
    """Sums [K, C] of operands of one matrix shape and dtype by one kernel."""
    lengths = max((operand.lengths for operand in operands), key=len)
    features = operands[0].features
    # Inductor may not inline what it concatenates: no view of that, then, but one of each operand.
    if cut := _cut(lengths, RESULTS / features / len(operands)):
        lengths = _in_parts(lengths, len(lengths), cut)
    views = [emit(each.node.graph, aten.reshape.default, each.matrix, [*lengths, features]) for each in operands]
    dims = [len(lengths)] if cut else range(1, len(lengths) + 1)
    return _sums([Operand(view, len(lengths), view) for view in views], dims)


def _sums(operands: Sequence[Operand], dims: Sequence[int]) -> list[fx.Node]:
    """Sums of squares [K, C] over some dimensions, of which 1 is the first, of operands of one shape."""
    graph = operands[0].node.graph
    stack = [emit(graph, aten.unsqueeze.default, operand.node, 0) for operand in operands]
    squared = square(stack[0] if len(stack) == 1 else emit(graph, aten.cat.default, stack))
    summed = emit(graph, aten.sum.dim_IntList, squared, list(dims))
    each = [emit(graph, aten.select.int, summed, 0, index) for index in range(len(operands))]
    return [emit(graph, aten.reshape.default, one, [-1, operands[0].features]) for one in each]


def _leave_forward(node: fx.Node, operand: fx.Node) -> None:
    """Takes the mark of the backward pass from what was made of an operand."""
    while node is not operand:
        del node.meta["partitioner_tag"]
        node = node.all_input_nodes[0]


def _reduced_both_ways(matrix: fx.Node) -> bool:
    """Whether Inductor sums over columns where it sums over rows, by its `MixOrderReduction.can_fuse`."""
    rows, columns = matrix.meta["val"].shape
    return rows >= max(4096, 2 * columns) and rows * columns >= 5 * 2**20


def _partial_terms(node: fx.Node) -> fx.Node | None:
    """The count of terms as partial counts [K, 1], if it is the number of rows of a matrix with an element not 0."""
    if node.target is not aten.sum.default or arguments(node)[0].target is not aten.any.dim:
        return None
    nonzero, features, _ = arguments(arguments(node)[0])
    matrix = arguments(nonzero)[0]
    operand = _operand(matrix, 1 - features % 2) if matrix.meta["val"].dim() == 2 else None
    if operand is None:
        return None
    graph, lengths = node.graph, operand.lengths
    with graph.inserting_before(node):
        shaped = operand.as_read()
        nonzero = emit(graph, aten.ne.Scalar, shaped.node, 0)
        by_row = emit(graph, aten.reshape.default, nonzero, [*shaped.lengths, shaped.features])
        counted = emit(graph, aten.any.dim, by_row, shaped.positions)
        lengths = _in_parts(lengths, len(lengths), _cut(lengths, COUNTS) or 1)
        counted = emit(graph, aten.reshape.default, counted, lengths)
        counts = emit(graph, aten.sum.dim_IntList, counted, [len(lengths) - 1], dtype=torch.float32)
        return emit(graph, aten.reshape.default, counts, [-1, 1])


# ------------------------------------------------------------------ vectors
def _widths(vectors: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """To what length each vector is padded: that of a longer one, if it is not four times as long."""
    widths: dict[fx.Node, int] = {}
    width = 0
    for length, vector in sorted(((v.meta["val"].numel(), v) for v in vectors), reverse=True):
        width = width if width and width <= 4 * length else length
        widths[vector] = width
    return widths


def _joined(
    vector: fx.Node, parts: Sequence[fx.Node], partial: Mapping[fx.Node, fx.Node], rows: int, width: int
) -> fx.Node:
    """The vector as one sum over ``rows`` rows of parts padded to ``width``.

    One row more keeps Inductor from making a concatenation, a kernel a part, of what is padded on one side only.
    """
    graph, length, at = vector.graph, vector.meta["val"].numel(), 0
    joined: fx.Node | None = None
    constants: list[tuple[int, int, Any]] = []
    for part in parts:
        size = part.meta["val"].numel()
        value = arguments(part)[FILLS[part.target]] if part.target in FILLS else None
        if isinstance(value, (int, float)):
            constants.append((at, size, value))
        else:
            some = partial.get(part) or emit(graph, aten.reshape.default, part, [1, size])
            padding = [at, width - at - size, 0, rows + 1 - some.meta["val"].shape[0]]
            padded = emit(graph, aten.constant_pad_nd.default, some, padding)
            joined = emit(graph, aten.add.Tensor, joined, padded) if joined else padded
        at += size
    joined = emit(graph, aten.sum.dim_IntList, joined, [0]) if joined else filled(vector, [width], 0.0)
    place = _places(vector, width)
    for start, size, value in constants:
        from_start, to_end = emit(graph, aten.ge.Scalar, place, start), emit(graph, aten.lt.Scalar, place, start + size)
        inside = emit(graph, aten.bitwise_and.Tensor, from_start, to_end)
        joined = emit(graph, aten.where.self, inside, filled(vector, [], value), joined)
    return emit(graph, aten.slice.Tensor, joined, 0, 0, length)


def _places(like: fx.Node, length: int) -> fx.Node:
    device = like.meta["val"].device
    options = {"start": 0, "step": 1, "dtype": torch.int64, "device": device, "requires_grad": False}
    return emit(like.graph, prims.iota.default, length, **options)
