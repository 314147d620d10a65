"""A weight's curvature as a Kronecker product ``B (x) A``, from a path of contractions: what adaptive rounding takes.

With ``g_n`` and ``x_n`` the output's gradient and the input at position n,

    A = sum_n |g_n|^2 x_n x_n^T        B = sum_n g_n g_n^T

each over the positions of its group, up to a factor that rounding does not see. The positions that the loss does not
depend on are in neither.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import torch
from torch import fx

from lotion_fx.passes.attach.probe import SIDE, Layout
from lotion_fx.passes.curvature.contraction import emit, square, transposed
from lotion_fx.passes.curvature.factors import orientation, summed
from lotion_fx.passes.curvature.path import Path

aten = torch.ops.aten


class Matrices(NamedTuple):
    """Float32 nodes [E, P, P] and [E, Q, Q] of a contraction's left and right index."""

    left: fx.Node
    right: fx.Node


def kronecker(path: Path, layout: Layout, gradients: Collection[fx.Node]) -> list[fx.Node] | None:
    """B [G, R, R] and A [G, C, C] of a layout, float32, without a side that is longer than `SIDE`.

    Args:
        gradients: the nodes of the backward pass, by which the gradient is told from the input.

    Returns:
        None where the path mixes the contraction's sides, or ends in what has none.
    """
    swapped = orientation(path, layout)
    if swapped is None or not all(end.contraction and end.contraction.sides for end in path.ends()):
        return None
    left, right = summed(path, partial(_matrices_at, gradients=gradients), scales=2)
    by_row, by_column = (right, left) if swapped else (left, right)
    groups, rows, columns = layout.factors
    if by_row.meta["val"].shape[1] != rows:
        by_row = _diagonal_blocks(by_row, groups, rows)
    expand = aten.expand.default
    made = [emit(by_row.graph, expand, x, [groups, n, n]) for x, n in ((by_row, rows), (by_column, columns))]
    return [x for x, n in zip(made, (rows, columns), strict=True) if n <= SIDE]


def _matrices_at(path: Path, gradients: Collection[fx.Node]) -> Matrices:
    assert path.contraction and path.contraction.sides
    left, right = path.contraction.sides()
    if path.contraction.operands[0] in gradients:
        return Matrices(_product(left, left), _product(_weighted(right, left), right))
    return Matrices(_product(_weighted(left, right), left), _product(right, right))


def _weighted(x: fx.Node, by: fx.Node) -> fx.Node:
    """Each row [E, N, :] times the energy of the other's."""
    energy = emit(x.graph, aten.sum.dim_IntList, square(by), [2], True)
    return emit(x.graph, aten.mul.Tensor, x, energy)


def _product(a: fx.Node, b: fx.Node) -> fx.Node:
    """The sum over positions of rows' outer products."""
    return emit(a.graph, aten.bmm.default, transposed(a), b)


def _diagonal_blocks(matrix: fx.Node, groups: int, rows: int) -> fx.Node:
    """Of one matrix [1, G * R, G * R] those on its diagonal, [G, R, R]."""
    graph = matrix.graph
    split = emit(graph, aten.reshape.default, matrix, [groups, rows, groups, rows])
    return emit(graph, aten.permute.default, emit(graph, aten.diagonal.default, split, 0, 0, 2), [2, 0, 1])
