"""Rows, columns and norm of a weight's curvature, from a path of contractions.

A path whose every step keeps the contraction's left and right index apart (views, permutes, scales, sums of uses, a
scatter of whole matrices) has natural factors: plain sums of squares, no product. Its gradient's dimensions are tracked
as atoms of the group, left and right index, to see that the weight viewed as [G, R, C] is (group, left, right) or
(group, right, left). Any other path yields the marginals of its full curvature.

Where uses are added each gives the marginals of its own product instead. Sums of squares are of different scales: left
may be the output's gradient in one use and the input in another, or gradients shrink from use to use, and a product of
what was added crosses them. Marginals are of one scale, that of h, and those of a sum are the sums of marginals.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import fx

from lotion_fx.passes.attach.probe import Layout
from lotion_fx.passes.curvature.contraction import GROUP, LEFT, RIGHT, Atom, Factors, emit, filled
from lotion_fx.passes.curvature.path import Path, squares
from lotion_fx.passes.ops import PERMUTES, RESHAPES, SCALED, UNSIGNED

aten = torch.ops.aten
Dims = tuple[tuple[Atom, ...], ...]
Parts = TypeVar("Parts", bound=tuple[fx.Node, ...])
SCATTERS = {aten.index_put.default, aten.index_add.default}


def factored(path: Path, layout: Layout) -> Factors:
    """Rows [G, R], columns [G, C] and norm [G], float32, with h = rows * columns / norm."""
    swapped = orientation(path, layout)
    if swapped is None:
        return _marginals(squares(path), layout)
    adds = _adds_uses(path)
    left, right, count = summed(path, _marginals_at if adds else _factors_at, scales=3 if adds else 1)
    rows, cols = (right, left) if swapped else (left, right)
    groups, per_group, columns = layout.factors
    graph = rows.graph
    rows = emit(graph, aten.reshape.default, rows, [groups, per_group])
    return Factors(
        rows,
        emit(graph, aten.expand.default, cols, [groups, columns]),
        emit(graph, aten.expand.default, count, [groups]),
    )


def _marginals(h: fx.Node, layout: Layout) -> Factors:
    """Row sums, column sums and total of each group of the full curvature."""
    graph = h.graph
    h = emit(graph, aten.reshape.default, h, list(layout.factors))
    rows = emit(graph, aten.sum.dim_IntList, h, [2])
    cols = emit(graph, aten.sum.dim_IntList, h, [1])
    return Factors(rows, cols, emit(graph, aten.sum.dim_IntList, rows, [1]))


def orientation(path: Path, layout: Layout) -> bool | None:
    """Whether the layout's rows are the contraction's right index; None where a step mixes them or neither way fits."""
    dims = _track(path)
    return _oriented(dims, layout) if dims else None


def _oriented(dims: Dims, layout: Layout) -> bool | None:
    atoms = [atom for dim in dims for atom in dim if not _single(atom)]
    if not all(isinstance(atom.size, int) for atom in atoms):
        return None
    groups, rows, cols = layout.factors
    total = {axis: math.prod(atom.size for atom in atoms if atom.axis == axis) for axis in (GROUP, LEFT, RIGHT)}
    for swapped, order in ((False, (GROUP, LEFT, RIGHT)), (True, (GROUP, RIGHT, LEFT))):
        in_order = sorted(atoms, key=lambda atom: (order.index(atom.axis), -atom.stride)) == atoms
        grouped = total[GROUP] == groups and total[order[1]] == rows
        # One group of factors can serve several of the layout's: the rows are cut, the columns shared.
        shared = total[GROUP] == 1 and total[order[1]] == groups * rows
        if in_order and (grouped or shared) and total[order[2]] == cols:
            return swapped
    return None


def _track(path: Path) -> Dims | None:
    """The gradient's dimensions as atoms, or None where a step mixes them."""
    node, children = path.node, path.children
    if children is None:
        return path.contraction.dims or None if path.contraction else None
    below = [_track(child) for child in _nonzero(path)]
    dims = below[0] if below else None
    if dims is None or any(other != dims for other in below[1:]):
        return None
    if node.target in UNSIGNED or _is_sum_of_uses(node) or (node.target in SCALED and _is_scalar(_scale(path))):
        return dims
    if node.target in PERMUTES:
        return _permute(dims, node)
    if node.target in RESHAPES:
        return _regroup(dims, list(node.meta["val"].shape))
    if node.target is aten.sum.dim_IntList:
        return _sum_groups(dims, node)
    return _scatter_groups(dims, node) if node.target in SCATTERS else None


def _factors_at(path: Path) -> Factors:
    """The factors of the end of a path that can be tracked."""
    assert path.contraction and path.contraction.factors
    return path.contraction.factors()


def _marginals_at(path: Path) -> Factors:
    """The same as row sums, column sums and total of the product; 0 where no position was counted."""
    left, right, count = _factors_at(path)
    graph = left.graph
    positions = emit(graph, aten.clamp_min.default, count, 1)
    of_left, of_right = (emit(graph, aten.sum.dim_IntList, part, [1]) for part in (left, right))
    by_left, by_right = (emit(graph, aten.div.Tensor, total, positions) for total in (of_left, of_right))
    by_row, by_column = (emit(graph, aten.unsqueeze.default, share, 1) for share in (by_right, by_left))
    return Factors(
        emit(graph, aten.mul.Tensor, left, by_row),
        emit(graph, aten.mul.Tensor, right, by_column),
        emit(graph, aten.mul.Tensor, of_left, by_right),
    )


def summed(path: Path, at_end: Callable[[Path], Parts], scales: int) -> Parts:
    """What the ends of a tracked path have, with what the path does to the gradient done to it.

    Args:
        path: that `orientation` knows.
        at_end: emits the parts at one end, nodes whose first dimension is the group.
        scales: how many of the parts, from the first on, grow with the gradient's square.
    """
    node, graph = path.node, path.node.graph
    if path.contraction:
        return at_end(path)
    first, *rest = [summed(child, at_end, scales) for child in _nonzero(path)]
    kind: Any = type(first)
    for other in rest:
        first = kind(*(emit(graph, aten.add.Tensor, a, b) for a, b in zip(first, other, strict=True)))
    if node.target in SCALED:
        factor = _scale(path)
        grown = [emit(graph, node.target, emit(graph, node.target, x, factor), factor) for x in first[:scales]]
        return kind(*grown, *first[scales:])
    if node.target is aten.sum.dim_IntList:
        return kind(*(emit(graph, aten.sum.dim_IntList, part, [0], True) for part in first))
    if node.target in SCATTERS:
        index = emit(graph, aten.reshape.default, _index(node), [-1])
        base = [node.meta["val"].shape[0]]
        zeros = [filled(part, base + list(part.meta["val"].shape[1:]), 0.0, None) for part in first]
        put = aten.index_put.default
        return kind(*(emit(graph, put, zero, [index], part, True) for zero, part in zip(zeros, first, strict=True)))
    return first


def _single(atom: Atom) -> bool:
    return isinstance(atom.size, int) and atom.size == 1


def _nonzero(path: Path) -> list[Path]:
    return [child for child in path.children or () if child.children != ()]


def _adds_uses(path: Path) -> bool:
    """Whether the weight's gradient is a sum over several ends."""
    below = _nonzero(path)
    return len(below) > 1 or any(map(_adds_uses, below))


def _is_sum_of_uses(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and not node.kwargs


def _scale(path: Path) -> Any:
    """The factor of a scale, a number or a node."""
    return next(arg for arg in path.node.args if arg is not (path.children or ())[0].node)


def _is_scalar(factor: Any) -> bool:
    return not isinstance(factor, fx.Node) or factor.meta["val"].dim() == 0


def _permute(dims: Dims, node: fx.Node) -> Dims:
    order: Any = list(reversed(range(len(dims))))
    if node.target is aten.permute.default:
        order = node.args[1]
    elif node.target is aten.transpose.int:
        a, b = node.args[1:]
        order = list(range(len(dims)))
        order[a], order[b] = order[b], order[a]
    return tuple(dims[i] for i in order)


def _regroup(dims: Dims, shape: list[Any]) -> Dims | None:
    """The atoms, in row-major order, cut to a new shape."""
    atoms = [atom for dim in dims for atom in dim if not _single(atom)]
    if not all(isinstance(length, int) for length in [*shape, *(atom.size for atom in atoms)]):
        return None
    result = []
    for length in shape:
        dim = []
        while length > 1:
            axis, size, stride = atoms.pop(0)
            if length % size and size % length:
                return None
            taken = min(size, length)
            dim.append(Atom(axis, taken, stride * (size // taken)))
            if size > taken:
                atoms.insert(0, Atom(axis, size // taken, stride))
            length //= taken
        result.append(tuple(dim))
    return tuple(result)


def _sum_groups(dims: Dims, node: fx.Node) -> Dims | None:
    """A sum over the whole group index, as for a weight that is broadcast over a batch of matrices."""
    summed: Any = node.args[1]
    reduced = {dim % len(dims) for dim in summed}
    keeps = len(node.meta["val"].shape) == len(dims)
    left = [() if i in reduced else dim for i, dim in enumerate(dims) if keeps or i not in reduced]
    gone = all(atom.axis == GROUP for i in reduced for atom in dims[i] if not _single(atom))
    whole = all(atom.axis != GROUP for dim in left for atom in dim if not _single(atom))
    return tuple(left) if gone and whole else None


def _scatter_groups(dims: Dims, node: fx.Node) -> Dims | None:
    """A scatter of whole matrices into a stack, as for experts gathered by index."""
    index = _index(node)
    if index is None:
        return None
    slots = index.meta["val"].dim()
    leading, rest = [atom for dim in dims[:slots] for atom in dim], dims[slots:]
    only_groups = all(atom.axis == GROUP for atom in leading) and all(a.axis != GROUP for dim in rest for a in dim)
    ordered = all(a.stride > b.stride for a, b in pairwise(leading))
    return ((Atom(GROUP, node.meta["val"].shape[0]),), *rest) if only_groups and ordered else None


def _index(node: fx.Node) -> fx.Node | None:
    """The index of a scatter along dimension 0 that accumulates."""
    args: Any = node.args
    if node.target is aten.index_add.default:
        return args[2] if args[1] == 0 and not node.kwargs else None
    return args[1][0] if len(args[1]) == 1 and args[3:] == (True,) else None
