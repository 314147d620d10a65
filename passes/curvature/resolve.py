"""Resolve: how each weight's gradient is made, read off the joint graph, and its curvature made in the same way.

`smooth` leaves one `lotion_fx::curvature(grad, weight)` a weight. From ``grad`` the pass walks back through whatever is
linear and free of the weight (views, casts, slices, scatters, sums of uses) down to the contractions of output gradient
and input, and emits the same path on squares. That the other operand is one the weight met in the forward pass, and no
function of the weight itself, proves the op linear in the weight. What ends anywhere else takes the Fisher form.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from lotion_fx.passes.attach.probe import LOSS, Code, Layout
from lotion_fx.passes.curvature.contraction import after, arguments, bound, constant, emit
from lotion_fx.passes.curvature.factors import factored
from lotion_fx.passes.curvature.joint import JointGraph, Uses
from lotion_fx.passes.curvature.kronecker import kronecker
from lotion_fx.passes.curvature.loss_count import loss_count
from lotion_fx.passes.curvature.path import Path, Stop, find_path, squares
from lotion_fx.passes.registered import settle

if TYPE_CHECKING:
    from lotion_fx.passes.pipeline import JointState

aten = torch.ops.aten


@dataclass(frozen=True)
class Resolution:
    """What the pass found for one weight.

    Args:
        code: how the curvature was made.
        op: the contractions found, joined by ``+``, or the op that stopped the walk.
        uses: number of contractions found.
        reason: why it takes the Fisher form; empty where it does not.
        kind: of the vector, see `Layout`.
        vector: the probe vector that was made.
    """

    code: Code
    op: str
    uses: int
    reason: str
    kind: str
    vector: fx.Node


def resolve_state(state: JointState) -> JointState:
    """`resolve_curvature`, as a pass."""
    return replace(state, resolutions=tuple(resolve_curvature(state.graph)))


def resolve_curvature(graph: fx.Graph) -> list[Resolution]:
    """Replaces each ``lotion_fx::curvature`` node of a joint graph by its probe vector (see `passes.attach.probe`).

    Args:
        graph: AOTAutograd's joint graph, functional, with ``meta["val"]`` on every node; rewritten in place.

    Returns:
        One `Resolution` for each curvature node, in the graph's order.
    """
    targets = [node for node in graph.nodes if node.target is torch.ops.lotion_fx.curvature.default]
    if not targets:
        return []
    settle()
    joint = JointGraph(graph)
    uses = [joint.uses(_unviewed(arguments(node)[1])) for node in targets]
    found = [_find(joint, use, node) for node, use in zip(targets, uses, strict=True)]
    ends = [end for item in found if isinstance(item, Path) for end in item.ends()]
    count = loss_count(joint, uses, ends)
    resolutions: list[Resolution] = []
    for node, item in zip(targets, found, strict=True):
        resolution = _resolution(node, item, count, joint.backward)
        node.replace_all_uses_with(resolution.vector)
        resolutions.append(resolution)
    graph.eliminate_dead_code()
    graph.lint()
    return resolutions


def _find(joint: JointGraph, uses: Uses, node: fx.Node) -> Path | Stop:
    """The path of one weight's gradient, or what stopped it."""
    try:
        if not _layout(node).direct and uses.nonlinear is None:
            raise Stop(Code.BY_PARAMETERS, arguments(node)[0])
        return find_path(joint, uses, arguments(node)[0])
    except Stop as stop:
        return stop


def _resolution(node: fx.Node, found: Path | Stop, count: fx.Node | None, gradients: Collection[fx.Node]) -> Resolution:
    """Emits the probe vector that takes the node's place: payload, calls = 1, code, what the head tells of the loss."""
    grad, layout = arguments(node)[0], _layout(node)
    kind = layout.kind
    payload: list[fx.Node] = []
    code, op, uses = Code.BY_CHOICE, "", 0
    if isinstance(found, Path) and kind != "none":
        # Here and not where T is known, which may be the end of the pass: the path's operands need not be kept so long.
        with node.graph.inserting_before(node):
            payload, code = _payload(found, layout, gradients)
        names = [_name(end.below or end.node) for end in found.ends()]
        op, uses = "+".join(dict.fromkeys(names)), len(names)
    elif kind != "none":
        assert isinstance(found, Stop)
        with node.graph.inserting_before(node):
            payload = [constant(grad, [layout.payload], 0)]
        code, op = found.code, _name(found.node)
    with node.graph.inserting_before(after(count) if count is not None and node < count else node):
        header = [constant(grad, [1], value) for value in (1, int(code))]
        known = 0 if count is None else count.meta["val"].numel()
        header += [constant(grad, [LOSS - known], 0)] if known < LOSS else []
        header += [] if count is None else [count]
        vector = emit(node.graph, aten.cat.default, [*payload, *header])
    return Resolution(code, op, uses, code.reason, kind, vector)


def _layout(node: fx.Node) -> Layout:
    grad, _, kind, *rest = bound(node)
    return Layout(kind, tuple(grad.meta["val"].shape), *rest)


def _payload(path: Path, layout: Layout, gradients: Collection[fx.Node]) -> tuple[list[fx.Node], Code]:
    """The parts of a probe before its header, flat, and how they were made."""
    if layout.kind == "kronecker":
        parts = kronecker(path, layout, gradients)
        if parts is None:
            return [constant(path.node, [layout.payload], 0)], Code.MIXED_SIDES
    else:
        parts = [squares(path)] if layout.kind == "full" else list(factored(path, layout))
    return [emit(path.node.graph, aten.reshape.default, part, [-1]) for part in parts], Code.ANALYTIC


def _name(node: fx.Node) -> str:
    if node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return str(node.target).removeprefix("aten.").rsplit(".", 1)[0]


def _unviewed(node: fx.Node) -> fx.Node:
    """The node behind views that change nothing, which `smooth` and autograd put between a value and its uses."""
    while node.target in {aten.alias.default, aten.detach.default, aten.view.default}:
        behind = node.all_input_nodes[0]
        if behind.meta["val"].shape != node.meta["val"].shape:
            break
        node = behind
    return node
