"""The way from a weight's gradient back to the contractions that made it, and the same way walked by squares.

Only ops that are linear and free of the weight are walked: those that place, repeat, scale and add gradients. The way
ends at a contraction whose other operand the weight met in the forward pass, or, below a sum over copies of the weight
(a broadcast, a gather), at the gradient of those copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lotion_fx.passes.attach.probe import Code
from lotion_fx.passes.curvature.contraction import Contraction, arguments, contraction_at, emit, square, to_float
from lotion_fx.passes.curvature.joint import ALIASES, PERMUTES, RESHAPES, JointGraph, Uses, numel, operands
from lotion_fx.private import tree_leaves

aten = torch.ops.aten

# Linear ops, with the positions of the arguments that hold gradients. The same op takes squares to squares.
PLACEMENTS: dict[Any, tuple[int, ...]] = dict.fromkeys(PERMUTES | RESHAPES, (0,)) | {
    aten.expand.default: (0,),
    aten.select.int: (0,),
    aten.slice.Tensor: (0,),
    aten.flip.default: (0,),
    torch.ops.prims.rev.default: (0,),
    aten.roll.default: (0,),
    aten.tril.default: (0,),
    aten.triu.default: (0,),
    aten.index.Tensor: (0,),
    aten.constant_pad_nd.default: (0,),
    aten.select_backward.default: (0,),
    aten.slice_backward.default: (0,),
    aten.slice_scatter.default: (0, 1),
    aten.select_scatter.default: (0, 1),
    aten.where.self: (1, 2),
    aten.masked_fill.Scalar: (0,),
    aten.cat.default: (0,),
    aten.stack.default: (0,),
}
REDUCTIONS: dict[Any, tuple[int, ...]] = {
    aten.sum.dim_IntList: (0,),
    aten.sum.default: (0,),
    aten.index_put.default: (0, 2),
    aten._unsafe_index_put.default: (0, 2),
    aten._unsafe_masked_index_put_accumulate.default: (0, 3),
    aten.scatter_add.default: (0, 3),
    aten.embedding_dense_backward.default: (0,),
}
# These change signs, precision or scale, or add, so that squares need their own form of them.
UNSIGNED = ALIASES | {aten.neg.default}
SUMS: dict[Any, tuple[int, ...]] = {aten.add.Tensor: (0, 1), aten.sub.Tensor: (0, 1), aten.index_add.default: (0, 3)}
SCALES: dict[Any, tuple[int, ...]] = {
    aten.mul.Tensor: (0, 1),
    aten.mul.Scalar: (0,),
    aten.div.Tensor: (0,),
    aten.div.Scalar: (0,),
}
HELD = dict.fromkeys(UNSIGNED, (0,)) | PLACEMENTS | REDUCTIONS | SUMS | SCALES
ADDS_POSITIONS = {*REDUCTIONS, aten.index_add.default}

ZEROS = {aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default}
FILLS: dict[Any, int] = {
    aten.full.default: 1,
    aten.new_full.default: 2,
    aten.full_like.default: 1,
    aten.scalar_tensor.default: 0,
}


@dataclass(frozen=True)
class Path:
    """A node on the way from a weight's gradient to its contractions.

    Args:
        node: the gradient here.
        children: the ways on through a linear op; None where the way ends.
        contraction: its rule, where the way ends in a contraction.
        below: the sum over copies, where the way ends at the gradient of copies of the weight.
    """

    node: fx.Node
    children: tuple[Path, ...] | None = None
    contraction: Contraction | None = None
    below: fx.Node | None = None

    def ends(self) -> Iterator[Path]:
        """The contractions, and the gradients of copies, below."""
        if self.children is None:
            yield self
        for child in self.children or ():
            yield from child.ends()


class Stop(Exception):
    """The walk met an op that proves nothing."""

    def __init__(self, code: Code, node: fx.Node) -> None:
        super().__init__(code, node)
        self.code, self.node = code, node


def find_path(joint: JointGraph, uses: Uses, grad: fx.Node) -> Path:
    """The path from a weight's gradient to its contractions; raises `Stop` where there is none."""
    if uses.nonlinear is not None:
        raise Stop(Code.NONLINEAR, uses.nonlinear)
    return _Walk(joint, uses).walk(grad)


@dataclass(frozen=True)
class _Walk:
    joint: JointGraph
    uses: Uses

    def walk(self, node: fx.Node) -> Path:
        if is_zero(node):
            return Path(node, ())
        contraction = contraction_at(node)
        if contraction and self._is_use(contraction.operands):
            return Path(node, contraction=contraction)
        held = self._held(node)
        others = set(operands(node)).difference(held)
        if not held or others & (self.uses.shadow | self.joint.backward):
            raise self._stop(node)
        return Path(node, tuple(self._below(node, child) for child in held))

    def _below(self, node: fx.Node, child: fx.Node) -> Path:
        try:
            return self.walk(child)
        except Stop:
            of_copies = child in self.joint.backward and numel(child) in self.uses.copies
            if node.target in ADDS_POSITIONS and of_copies:
                return Path(child, below=node)
            raise

    def _held(self, node: fx.Node) -> list[fx.Node]:
        """The arguments through which a linear op hands on gradients; none where the op is not known as linear."""
        by_frequency = node.target is aten.embedding_dense_backward.default and node.args[4]
        fills = node.target is aten.masked_fill.Scalar and node.args[2] != 0
        if node not in self.joint.backward or by_frequency or fills:
            return []
        chosen = [node.args[position] for position in HELD.get(node.target, ())]
        held = [leaf for leaf in tree_leaves(chosen) if isinstance(leaf, fx.Node)]
        return [n for n in held if n in self.joint.backward] if node.target in SCALES else held

    def _is_use(self, pair: tuple[fx.Node, fx.Node]) -> bool:
        """Whether one operand is a gradient and the other what the weight met, and no function of the weight."""
        inputs = [operand for operand in pair if operand not in self.joint.backward]
        if len(inputs) != 1 or inputs[0] in self.uses.shadow:
            return False
        return self.joint.number(inputs[0]) in self.uses.partners

    def _stop(self, node: fx.Node) -> Stop:
        nonlinear = any(operand in self.uses.shadow for operand in operands(node))
        return Stop(Code.NONLINEAR if nonlinear else Code.NOT_A_CONTRACTION, node)


def is_zero(node: fx.Node) -> bool:
    """Whether the node is a constant zero, the ground that gradients are placed on."""
    position = FILLS.get(node.target)
    return node.target in ZEROS or (position is not None and arguments(node)[position] == 0)


def squares(path: Path) -> fx.Node:
    """Emits the path on squares: float32, in the shape of the path's gradient."""
    node, graph = path.node, path.node.graph
    if path.contraction:
        return to_float(path.contraction.full())
    if path.children is None:
        return square(node)
    if not path.children:
        return to_float(node)
    below = {child.node: squares(child) for child in path.children}
    if node.target in UNSIGNED:
        return below[path.children[0].node]
    op = aten.add.Tensor if node.target is aten.sub.Tensor else node.target
    args: Any = fx.node.map_arg(node.args, lambda n: below[n] if n in below else _factor(node, n))
    kwargs: dict[str, Any] = {name: value for name, value in node.kwargs.items() if name != "dtype"}
    if node.target in SCALES:
        args = tuple(a if isinstance(a, fx.Node) else a * a for a in args)
    if "alpha" in kwargs:
        kwargs["alpha"] = kwargs["alpha"] ** 2
    return emit(graph, op, *args, **kwargs)


def _factor(node: fx.Node, other: fx.Node) -> fx.Node:
    """Another argument of an op on the path: a factor of a scale is squared, an index or a mask is not."""
    return square(other) if node.target in SCALES else other
