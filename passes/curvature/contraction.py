"""Contraction rules: for each op that makes a weight's gradient, how its contraction of squares is emitted.

A weight gradient is a sum over positions n of two operands, the output's gradient g and the input x,

    grad[e, p, q] = sum_n left[e, n, p] * right[e, n, q]        e: group (batch, expert, convolution group)

and the weight's curvature, up to the factor T, is the same contraction of squares. A rule says it in two ways: in full,
``h[e, p, q]``, by the op itself on squared operands, and factored, ``h[e, p, q] ~ left[e, p] right[e, q] / norm[e]``,
by sums alone. And it gives the operands in the form of the sum, of which `kronecker` makes whole matrices. To teach the
pass an op, add such a function here and name it in the op's row of `passes.ops`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from lotion_fx.private import arguments_of

aten = torch.ops.aten
GROUP, LEFT, RIGHT = "group", "left", "right"


class Atom(NamedTuple):
    """Part of one dimension of a gradient: ``size`` steps of ``stride`` along the group, left or right index."""

    axis: str
    size: int
    stride: int = 1


class Factors(NamedTuple):
    """``h[e, p, q] ~ left[e, p] * right[e, q] / norm[e]``, three float32 nodes [E, P], [E, Q], [E]."""

    left: fx.Node
    right: fx.Node
    norm: fx.Node


class Sides(NamedTuple):
    """The operands as the sum has them, two float32 nodes [E, N, P] and [E, N, Q]."""

    left: fx.Node
    right: fx.Node


@dataclass(frozen=True)
class Contraction:
    """What a rule says of one node.

    Args:
        operands: the two factors of the sum, one the output's gradient and one the input, left and right.
        full: emits h in the gradient's shape and in any dtype.
        dims: the gradient's dimensions, each a tuple of atoms; empty where the op has no natural factors.
        factors: emits the factors.
        sides: emits the operands in the form of the sum.
        positions: the dimensions of either operand that are positions, of an op that makes nothing but weights'
            gradients; empty of one that may also be a forward product.
    """

    operands: tuple[fx.Node, fx.Node]
    full: Callable[[], fx.Node]
    dims: tuple[tuple[Atom, ...], ...] = ()
    factors: Callable[[], Factors] | None = None
    sides: Callable[[], Sides] | None = None
    positions: tuple[tuple[int, ...], ...] = ()


Rule = Callable[[fx.Node], Contraction]


def arguments(node: fx.Node) -> Any:
    """The node's positional arguments, which the op's schema types and FX does not."""
    return node.args


def bound(node: fx.Node) -> list[Any]:
    """The node's arguments in the order of the op's schema, defaults included."""
    target: Any = node.target
    given, kwargs = arguments(node), node.kwargs
    schema = arguments_of(target)
    return [given[i] if i < len(given) else kwargs.get(a.name, a.default_value) for i, a in enumerate(schema)]


def emit(graph: fx.Graph, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node at the graph's insertion point, its fake value computed by the op itself."""
    return _add(graph, op, args, kwargs, op)


def _add(graph: fx.Graph, op: Any, args: Any, kwargs: Any, value_of: Callable[..., Any]) -> fx.Node:
    node = graph.call_function(op, args, kwargs)
    values: Any = fx.node.map_arg((args, kwargs), lambda argument: argument.meta["val"])
    node.meta["val"] = value_of(*values[0], **values[1])
    # Without the tag a partitioner could take squares of activations for forward values, and save them beside those.
    node.meta["partitioner_tag"] = "must_be_in_backward"
    return node


def after(node: fx.Node) -> fx.Node:
    """Where to insert what is made of a node: before the next one that is no input."""
    node = node.next
    while node.op == "placeholder":
        node = node.next
    return node


def to_float(node: fx.Node) -> fx.Node:
    """The node in float32."""
    if node.meta["val"].dtype == torch.float32:
        return node
    return emit(node.graph, torch.ops.prims.convert_element_type.default, node, torch.float32)


def filled(like: fx.Node, shape: Sequence[Any], value: Any, dtype: torch.dtype | None = torch.float32) -> fx.Node:
    """A filled tensor on ``like``'s device, of its dtype where ``dtype`` is None.

    The op is ``full``, as Inductor lowers no ``new_full``; its fake value is the latter's, as no mode may be active.
    """
    fake = like.meta["val"]
    options = {"dtype": dtype or fake.dtype, "device": fake.device, "pin_memory": False}
    return _add(like.graph, aten.full.default, (list(shape), value), options, fake.new_full)


def square(node: fx.Node) -> fx.Node:
    """The node squared in float32, for sums."""
    node = to_float(node)
    return emit(node.graph, aten.mul.Tensor, node, node)


def square_operand(node: fx.Node) -> fx.Node:
    """The node squared for a matrix product: float16, which would underflow, in float32, others in their own dtype."""
    return square(node) if node.meta["val"].dtype == torch.float16 else emit(node.graph, aten.mul.Tensor, node, node)


def size(node: fx.Node, dim: int) -> int | fx.Node:
    """A dimension's length, a node where it is symbolic."""
    length = node.meta["val"].shape[dim]
    return length if isinstance(length, int) else emit(node.graph, aten.sym_size.int, node, dim)


def constant(like: fx.Node, shape: Sequence[int | fx.Node], *values: Any) -> fx.Node:
    """Float32 tensor filled with the product of the values, which may be symbolic."""
    graph, product = like.graph, values[0]
    for value in values[1:]:
        both_known = isinstance(product, int) and isinstance(value, int)
        product = product * value if both_known else emit(graph, operator.mul, product, value)
    return filled(like, shape, product)


def transposed(node: fx.Node) -> fx.Node:
    """A stack of matrices, each transposed."""
    return emit(node.graph, aten.permute.default, node, [0, 2, 1])


def _shape(node: fx.Node) -> torch.Size:
    return node.meta["val"].shape


def mm(node: fx.Node) -> Contraction:
    """[P, N] @ [N, Q]: one group."""
    a, b = arguments(node)
    graph = node.graph

    def full() -> fx.Node:
        return emit(graph, aten.mm.default, square_operand(a), square_operand(b))

    def factors() -> Factors:
        left = emit(graph, aten.sum.dim_IntList, square(a), [1])
        right = emit(graph, aten.sum.dim_IntList, square(b), [0])
        unsqueeze = aten.unsqueeze.default
        return Factors(emit(graph, unsqueeze, left, 0), emit(graph, unsqueeze, right, 0), constant(a, [1], size(a, 1)))

    def sides() -> Sides:
        unsqueeze = aten.unsqueeze.default
        return Sides(transposed(to_float(emit(graph, unsqueeze, a, 0))), to_float(emit(graph, unsqueeze, b, 0)))

    rows, cols = _shape(node)
    return Contraction((a, b), full, ((Atom(LEFT, rows),), (Atom(RIGHT, cols),)), factors, sides)


def bmm(node: fx.Node) -> Contraction:
    """[E, P, N] @ [E, N, Q]: a group for each matrix of the stack."""
    a, b = arguments(node)
    graph = node.graph
    groups, rows, cols = _shape(node)

    def full() -> fx.Node:
        return emit(graph, aten.bmm.default, square_operand(a), square_operand(b))

    def factors() -> Factors:
        left = emit(graph, aten.sum.dim_IntList, square(a), [2])
        right = emit(graph, aten.sum.dim_IntList, square(b), [1])
        return Factors(left, right, constant(a, [size(a, 0)], size(a, 2)))

    def sides() -> Sides:
        return Sides(transposed(to_float(a)), to_float(b))

    dims = ((Atom(GROUP, groups),), (Atom(LEFT, rows),), (Atom(RIGHT, cols),))
    return Contraction((a, b), full, dims, factors, sides)


def outer(node: fx.Node) -> Contraction | None:
    """[..., P, 1] * [..., 1, Q]: one position, which decompositions write as a product; None for any other product."""
    graph, pair, rank = node.graph, arguments(node), len(_shape(node))
    if rank not in (2, 3) or not all(isinstance(factor, fx.Node) for factor in pair):
        return None
    padded = [(1,) * (rank - len(_shape(factor))) + tuple(_shape(factor)) for factor in pair]
    places = [place for place in (0, 1) if _is_one(padded[place][-1]) and _is_one(padded[1 - place][-2])]
    if not places:
        return None
    a, b = pair[places[0]], pair[1 - places[0]]

    def full() -> fx.Node:
        return emit(graph, aten.mul.Tensor, square_operand(a), square_operand(b))

    def factors() -> Factors:
        left, right = (
            emit(graph, aten.reshape.default, square(factor), [-1, length]) for factor, length in ((a, rows), (b, cols))
        )
        return Factors(left, right, constant(a, [size(left, 0)], 1))

    def sides() -> Sides:
        pairs = ((a, rows), (b, cols))
        return Sides(*(emit(graph, aten.reshape.default, to_float(x), [-1, 1, length]) for x, length in pairs))

    *groups, rows, cols = _shape(node)
    dims = (*((Atom(GROUP, group),) for group in groups), (Atom(LEFT, rows),), (Atom(RIGHT, cols),))
    return Contraction((a, b), full, dims, factors, sides)


def _is_one(length: Any) -> bool:
    return isinstance(length, int) and length == 1


def mv(node: fx.Node) -> Contraction:
    """[P, N] @ [N]: the gradient of a weight that is a vector."""
    a, b = arguments(node)
    return Contraction((a, b), lambda: emit(node.graph, aten.mv.default, square_operand(a), square_operand(b)))


def grouped_mm(node: fx.Node) -> Contraction:
    """[P, N] @ [N, Q] with the columns N cut into experts at ``offs``: a group for each expert, its own positions."""
    a, b, offs = arguments(node)[:3]
    graph = node.graph

    def full() -> fx.Node:
        return emit(graph, aten._grouped_mm.default, square_operand(a), square_operand(b), offs)

    if len(_shape(a)) != 2 or len(_shape(b)) != 2:
        return Contraction((a, b), full)
    at = a, b, offs
    return Contraction(
        (a, b),
        full,
        _stack(_shape(node)),
        lambda: _by_expert(*at, turned=True),
        lambda: _sides_by_expert(*at, turned=True),
    )


def grouped_rows(node: fx.Node) -> Contraction:
    """transformers' gradient of a stack, output 1 of the op: rows ``input`` [N, P] and ``grad`` [N, Q] cut likewise."""
    rows, weight, offs, grad = bound(node)
    graph = node.graph

    def full() -> fx.Node:
        squares = square_operand(rows), square_operand(grad)
        # The op also makes the rows' gradient, which needs a weight of their dtype and is then dead.
        stack = to_float(weight) if squares[0].meta["val"].dtype == torch.float32 else weight
        return emit(graph, operator.getitem, emit(graph, node.target, squares[0], stack, offs, squares[1]), 1)

    shape = node.meta["val"][1].shape
    at = rows, grad, offs
    return Contraction(
        (rows, grad),
        full,
        _stack(shape),
        lambda: _by_expert(*at, turned=False),
        lambda: _sides_by_expert(*at, turned=False),
        positions=((0,), (0,)),
    )


def _stack(shape: torch.Size) -> tuple[tuple[Atom, ...], ...]:
    """[E, P, Q]: a group, its left and its right index."""
    return tuple((Atom(axis, length),) for axis, length in zip((GROUP, LEFT, RIGHT), shape, strict=True))


def _by_expert(a: fx.Node, b: fx.Node, offs: fx.Node, *, turned: bool) -> Factors:
    """Sums of the squares of ``a`` [N, P], or [P, N] if turned, and ``b`` [N, Q] over each expert's positions."""
    graph, member = b.graph, _membership(b, offs)
    weights = to_float(member)
    # Rows of no expert hold whatever memory held, and 0 * nan is nan: zero them before the sum.
    known = emit(graph, aten.unsqueeze.default, emit(graph, aten.any.dim, member, 0), 1)
    zero = constant(a, [], 0)
    rows = [square(emit(graph, aten.permute.default, a, [1, 0]) if turned else a), square(b)]
    left, right = (emit(graph, aten.mm.default, weights, emit(graph, aten.where.self, known, r, zero)) for r in rows)
    return Factors(left, right, emit(graph, aten.sum.dim_IntList, weights, [1]))


def _sides_by_expert(a: fx.Node, b: fx.Node, offs: fx.Node, *, turned: bool) -> Sides:
    """The rows of ``a`` and ``b``, as in `_by_expert`, once an expert, zero where they are another's."""
    graph, zero = b.graph, constant(b, [], 0)
    member = emit(graph, aten.unsqueeze.default, _membership(b, offs), 2)
    rows = [emit(graph, aten.permute.default, a, [1, 0]) if turned else a, b]
    stacked = [emit(graph, aten.unsqueeze.default, to_float(row), 0) for row in rows]
    return Sides(*(emit(graph, aten.where.self, member, row, zero) for row in stacked))


def _membership(positions: fx.Node, offs: fx.Node) -> fx.Node:
    """Boolean [E, N]: whether position n lies in expert e, of ends ``offs`` [E]."""
    graph = positions.graph
    ones = filled(offs, [size(positions, 0)], 1, None)
    index = emit(graph, aten.sub.Tensor, emit(graph, aten.cumsum.default, ones, 0), 1)
    ends = emit(graph, aten.unsqueeze.default, offs, 1)
    starts = emit(graph, aten.constant_pad_nd.default, emit(graph, aten.slice.Tensor, ends, 0, 0, -1), [0, 0, 1, 0])
    above = emit(graph, aten.ge.Tensor, index, starts)
    return emit(graph, aten.bitwise_and.Tensor, above, emit(graph, aten.lt.Tensor, index, ends))


def convolution(node: fx.Node) -> Contraction:
    """Output 1 of the op. Rows are the weight's first dimension, [O, I/g, k...] or, transposed, [I, O/g, k...].

    The columns' sum is over the windows that the kernel really saw: the op itself, with ones of one channel a group for
    the operand that the rows come from.
    """
    g, x, weight, _, *_, transposed, _, groups, _ = arguments(node)
    graph = node.graph
    by_row, by_col = (x, g) if transposed else (g, x)
    mask = [False, True, False]

    def gradient(g: fx.Node, x: fx.Node, weight: fx.Node) -> fx.Node:
        args = (
            g,
            x,
            to_float(weight) if g.meta["val"].dtype == torch.float32 else weight,
            None,
            *node.args[4:10],
            mask,
        )
        return emit(graph, operator.getitem, emit(graph, aten.convolution_backward.default, *args), 1)

    def full() -> fx.Node:
        return gradient(square_operand(g), square_operand(x), weight)

    def factors() -> Factors:
        dims = [0, *range(2, len(_shape(by_row)))]
        left = emit(graph, aten.sum.dim_IntList, square(by_row), dims)
        windows = emit(graph, aten.sum.dim_IntList, square(by_col), [0], True)
        spatial = [size(by_row, dim) for dim in dims[1:]]
        ones = filled(windows, [1, groups, *spatial], 1.0, None)
        one_row = emit(graph, aten.slice.Tensor, weight, 0, 0, groups)
        right = gradient(*((windows, ones) if transposed else (ones, windows)), one_row)
        shape = [groups, -1]
        left, right = (emit(graph, aten.reshape.default, vector, shape) for vector in (left, right))
        return Factors(left, right, constant(left, [groups], *(size(by_row, dim) for dim in dims)))

    def sides() -> Sides:
        return Sides(_pixels(by_row, groups), _windows(by_col, node, groups))

    if isinstance(groups, fx.Node):  # as many as the batch: a kernel for each sample, which no weight has for its own
        return Contraction((by_row, by_col), full)
    rows, *cols = _shape(weight)
    inner = 1
    right_dims: list[tuple[Atom, ...]] = []
    for length in reversed(cols):
        right_dims.insert(0, (Atom(RIGHT, length, inner),))
        inner *= length
    return Contraction(
        (by_row, by_col), full, ((Atom(GROUP, groups), Atom(LEFT, rows // groups)), *right_dims), factors, sides
    )


def _pixels(x: fx.Node, groups: int) -> fx.Node:
    """[B, groups * P, *spatial] as [groups, B * spatial, P]."""
    graph, rank = x.graph, len(_shape(x))
    last = emit(graph, aten.permute.default, to_float(x), [0, *range(2, rank), 1])
    split = emit(graph, aten.reshape.default, last, [-1, groups, _shape(x)[1] // groups])
    return emit(graph, aten.permute.default, split, [1, 0, 2])


def _windows(x: fx.Node, node: fx.Node, groups: int) -> fx.Node:
    """What a convolution's kernel sees of ``x`` [B, groups * Q, *spatial], as [groups, B * places, Q * kernel]."""
    weight, _, stride, padding, dilation = arguments(node)[2:7]
    graph, kernel = x.graph, _shape(weight)[2:]
    each = [list(given) * (len(kernel) // len(given)) for given in (stride, padding, dilation)]
    pads = [pad for length in reversed(each[1]) for pad in (length, length)]
    seen = emit(graph, aten.constant_pad_nd.default, to_float(x), pads)
    for dim, (length, step, _, apart) in enumerate(zip(kernel, *each, strict=True), 2):
        seen = emit(graph, aten.unfold.default, seen, dim, (length - 1) * apart + 1, step)
        seen = emit(graph, aten.slice.Tensor, seen, -1, 0, None, apart)
    rank = len(kernel)
    seen = emit(graph, aten.permute.default, seen, [0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank)])
    split = emit(graph, aten.reshape.default, seen, [-1, groups, _shape(x)[1] // groups * math.prod(kernel)])
    return emit(graph, aten.permute.default, split, [1, 0, 2])
