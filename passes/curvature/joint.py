"""Questions about AOTAutograd's joint graph: what is backward, what is the same value, and how a weight is used.

The joint graph is one list of ATen ops: the forward pass from the primals, then the backward pass, which is every node
that depends on a tangent. Recomputation (checkpointing) repeats forward ops inside the backward pass, so values are
compared by number, as in common subexpression elimination, and not by node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lotion_fx.passes.curvature.contraction import bound
from lotion_fx.passes.ops import (
    ADDING,
    CONTRACTIONS,
    ELEMENTWISE,
    GATHERS,
    HOLDING,
    SCALINGS,
    STACK_PRODUCTS,
    VIEWS,
)
from lotion_fx.private import tree_leaves

aten = torch.ops.aten

_MAXIMUM = 2  # of `torch.nn.functional.embedding_bag`'s modes


def root(node: fx.Node) -> fx.Node:
    """The node whose values this one hands on."""
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    return node


def numel(node: fx.Node) -> Any:
    """Number of elements, in a form that compares symbolic sizes without guarding on them."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    count = value.numel()
    return count if isinstance(count, int) else count.node.expr


@dataclass
class Uses:
    """How a weight is used in the forward pass.

    Args:
        chain: nodes that hold the weight itself, viewed, cut, gathered, cast, scaled or added to.
        shadow: everything that depends on the weight with no contraction or gather between.
        partners: numbers of the operands that meet the chain in an op.
        copies: element counts of the chain and of what elementwise ops make of it.
        stack: whether the weight is a stack of matrices, of which some may be gathered.
        spread: nodes of the chain in which the weight was multiplied by data that is the same along some of it: kernels
            of a sample's own, or a product by hand. They are operands only of what takes them for kernels.
        nonlinear: the op in which the weight meets a function of itself, if one does.
    """

    chain: set[fx.Node] = field(default_factory=set)
    shadow: set[fx.Node] = field(default_factory=set)
    partners: set[int] = field(default_factory=set)
    copies: set[Any] = field(default_factory=set)
    stack: bool = False
    spread: set[fx.Node] = field(default_factory=set)
    nonlinear: fx.Node | None = None


class JointGraph:
    """A joint graph with its backward nodes and value numbers."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.backward: set[fx.Node] = set()
        self.has_loss = False  # whether an output is one number
        self._numbers: dict[fx.Node, int] = {}
        table: dict[Any, int] = {}
        for node in graph.nodes:
            is_tangent = node.name.startswith("tangents_")
            value = node.meta["val"] if is_tangent else None  # of a DTensor's, its mesh may be one
            self.has_loss |= isinstance(value, torch.Tensor) and value.dim() == 0
            if is_tangent or any(n in self.backward for n in node.all_input_nodes):
                self.backward.add(node)
            key: Any = node
            if node.op == "call_function":
                args = fx.node.map_arg((node.args, node.kwargs), lambda n: ("value", self._numbers[n]))
                key = (node.target, repr(args))
            self._numbers[node] = table.setdefault(key, len(table))

    def number(self, node: fx.Node) -> int:
        """The same for two nodes whose roots compute the same value."""
        return self._numbers[root(node)]

    def uses(self, weight: fx.Node) -> Uses:
        """Follows a weight, the value that `smooth` handed on, to the ops that combine it with data."""
        uses = Uses(shadow=self._shadow(weight), stack=weight.meta["val"].dim() == 3)
        pending = [weight]
        while pending:
            node = pending.pop()
            if node in uses.chain:
                continue
            uses.chain.add(node)
            uses.copies.add(numel(node))
            pending += [user for user in node.users if user not in self.backward and self._hands_on(node, user, uses)]
        return uses

    def ancestors(self, node: fx.Node) -> set[fx.Node]:
        """All that a value is made of, itself included."""
        seen, pending = set[fx.Node](), [node]
        while pending:
            if (node := pending.pop()) not in seen:
                seen.add(node)
                pending += node.all_input_nodes
        return seen

    def _shadow(self, weight: fx.Node) -> set[fx.Node]:
        shadow, pending = set(), [weight]
        while pending:
            node = pending.pop()
            if node not in shadow:
                shadow.add(node)
                pending += [user for user in node.users if user not in self.backward and not _ends(user)]
        return shadow

    def _hands_on(self, node: fx.Node, user: fx.Node, uses: Uses) -> bool:
        """Records what the weight meets in ``user``, and says whether ``user`` still holds the weight."""
        if user.target not in HOLDING:
            return False
        if node not in uses.shadow and not _takes_gathered(node, user, uses.stack):
            return False
        arguments = operands(user)
        others = [other for other in arguments if other is not node]
        meets_itself = arguments.count(node) > 1 or any(other in uses.shadow for other in others)
        if user.target in SCALINGS and not meets_itself:
            # Activations may depend on it: a layer used twice is linear in each. A scale of the weight may not, as by
            # its own spectral norm.
            meets_itself = any(self.ancestors(other) & uses.chain for other in others)
        if user.target in SCALINGS | CONTRACTIONS and meets_itself:
            uses.nonlinear = user
        if node in uses.spread:
            if user.target in VIEWS:
                uses.spread.add(user)
                return True
            if not _takes_kernels(node, user):
                return False
        uses.partners.update(self.number(other) for other in others)
        if user.target in ADDING and user.args[0] is node:
            uses.copies.add(numel(user))
        if user.target in ELEMENTWISE:
            uses.copies.add(numel(user))
            if node.meta["val"].dim() == user.meta["val"].dim() and numel(node) == numel(user):
                return True
            if user.target in SCALINGS and any(_spreads(node, other) for other in others):
                uses.spread.add(user)
            return user in uses.spread
        return user.target not in CONTRACTIONS


def _ends(user: fx.Node) -> bool:
    """Whether what an op makes of a weight is no longer the weight: a product, or rows that it read.

    What a bag of rows tells its backward pass beside their sum depends on indices alone, unless it is their maximum.
    """
    if user.target is aten._embedding_bag.default:
        return bound(user)[4] != _MAXIMUM
    return user.target in CONTRACTIONS | GATHERS


def _takes_gathered(node: fx.Node, user: fx.Node, stack: bool) -> bool:
    """Whether an op uses gathered parts of a weight as weights: matrices of a stack, or rows of the second operand.

    Anything else has them as activations, such as an embedding's rows, and their gradient is the output's gradient g.
    """
    if user.target in STACK_PRODUCTS:
        return stack
    return user.target in VIEWS or (user.target in (aten.mm.default, aten.addmm.default) and user.args[-1] is node)


def _spreads(node: fx.Node, other: fx.Node) -> bool:
    """Whether a factor is the same along one of two dimensions or more of a weight: no scale of activations is."""
    shape, by = list(node.meta["val"].shape), list(other.meta["val"].shape)
    by = [1] * (len(shape) - len(by)) + by[max(len(by) - len(shape), 0) :]
    long = [place for place, length in enumerate(shape) if not _is_one(length)]
    return len(long) > 1 and any(_is_one(by[place]) for place in long)


def _is_one(length: Any) -> bool:
    return isinstance(length, int) and length == 1


def _takes_kernels(node: fx.Node, user: fx.Node) -> bool:
    """Whether an op has a spread weight for its kernels: with an input for each of them."""
    if user.target is aten.convolution.default:
        return user.args[1] is node
    others = [other for other in operands(user) if other is not node]
    return user.target is aten.bmm.default and all(numel(root(other)) == numel(other) for other in others)


def operands(node: fx.Node) -> list[fx.Node]:
    """The node's arguments that are nodes, one that occurs twice given twice."""
    return [leaf for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]
