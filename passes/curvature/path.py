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
from lotion_fx.passes.curvature.contraction import Contraction, arguments, emit, square, to_float
from lotion_fx.passes.curvature.joint import JointGraph, Uses, numel, operands
from lotion_fx.passes.ops import ADDING_POSITIONS, FILLS, SCALED, UNSIGNED, WALKED, ZEROS, contraction_at
from lotion_fx.private import tree_leaves

aten = torch.ops.aten
_ON_SQUARES: dict[Any, Any] = {  # where that is not the op itself
    aten.sub.Tensor: aten.add.Tensor,
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
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
            if node.target in ADDING_POSITIONS and of_copies and not self._by_frequency(child):
                return Path(child, below=node)
            raise

    def _by_frequency(self, node: fx.Node) -> bool:
        """Whether a gradient is divided by a function of indices alone: by how often each row was read.

        So Inductor writes ``embedding(scale_grad_by_freq=True)``. It is no derivative then.
        """
        if node.target is not aten.div.Tensor or not isinstance(node.args[1], fx.Node):
            return False
        inputs = [n.meta["val"] for n in self.joint.ancestors(node.args[1]) if n.op == "placeholder"]
        return bool(inputs) and not any(x.is_floating_point() for x in inputs if isinstance(x, torch.Tensor))

    def _held(self, node: fx.Node) -> list[fx.Node]:
        """The arguments through which a linear op hands on gradients; none where the op is not known as linear."""
        by_frequency = node.target is aten.embedding_dense_backward.default and node.args[4]
        fills = node.target is aten.masked_fill.Scalar and node.args[2] != 0
        if node not in self.joint.backward or by_frequency or fills:
            return []
        chosen = [node.args[position] for position in WALKED.get(node.target, ())]
        held = [leaf for leaf in tree_leaves(chosen) if isinstance(leaf, fx.Node)]
        return [n for n in held if n in self.joint.backward] if node.target in SCALED else held

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
    # A copy in another memory order is no step of the path, so that squares may not be viewed as the gradient could.
    op = _ON_SQUARES.get(node.target, node.target)
    args: Any = fx.node.map_arg(node.args, lambda n: below[n] if n in below else _factor(node, n))
    kwargs: dict[str, Any] = {name: value for name, value in node.kwargs.items() if name != "dtype"}
    if node.target in SCALED:
        args = tuple(a if isinstance(a, fx.Node) else a * a for a in args)
    if "alpha" in kwargs:
        kwargs["alpha"] = kwargs["alpha"] ** 2
    return emit(graph, op, *args, **kwargs)


def _factor(node: fx.Node, other: fx.Node) -> fx.Node:
    """Another argument of an op on the path: a factor of a scale is squared, an index or a mask is not."""
    return square(other) if node.target in SCALED else other
