"""Fuse: a weight's gradient and the curvature that is made of the same two operands become one call.

    mm(g^T, x)    mm((g^T)^2, x^2)        lotion_fx::curvature_linear(g, x)

These are what the rule for ``mm`` in `passes.contraction` emits beside the gradient. The call reads g and x once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

import lotion_fx.kernels.curvature  # noqa: F401  registers the op
from lotion_fx.passes.lower.nodes import products, squared, transposed
from lotion_fx.passes.ops import CASTS

aten = torch.ops.aten


def match_full_curvature(graph: fx.Graph, wanted: Callable[[fx.Node, fx.Node], bool] = lambda g, x: True) -> int:
    """Fuses each gradient with its full curvature.

    Args:
        graph: a joint graph after `passes.curvature.resolve`, with ``meta["val"]``; rewritten in place.
        wanted: told g [N, O] and x [N, I] of a pair, whether to fuse it.

    Returns:
        How many were fused.
    """
    gradients = {node.args: node for node in products(graph)}
    fused = 0
    for h in products(graph):
        gradient = gradients.get(tuple(map(squared, h.args)))
        if gradient is None or not _fits(gradient) or not wanted(*_operands(gradient)):
            continue
        made, curvature = _fuse(gradient, h)
        gradient.replace_all_uses_with(made)
        for user in list(h.users):
            if user.target in CASTS and user.meta["val"].dtype == torch.float32:
                user.replace_all_uses_with(curvature)
        if h.users and h.meta["val"].dtype != torch.float32:
            with graph.inserting_before(curvature.next):
                cast = torch.ops.prims.convert_element_type.default
                curvature = _like(h, graph.call_function(cast, (curvature, h.meta["val"].dtype)), h.meta["val"])
        h.replace_all_uses_with(curvature)
        del gradients[gradient.args]
        fused += 1
    _cleaned(graph)
    return fused


def _fits(gradient: fx.Node) -> bool:
    """Whether the kernel takes the operands as they lie: g^T a view of g, and its dtypes."""
    g, x = transposed(gradient.args[0]), gradient.all_input_nodes[-1]
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return g is not None and all(node.meta["val"].dtype in dtypes for node in (g, x))


def _operands(gradient: fx.Node) -> tuple[fx.Node, fx.Node]:
    g = transposed(gradient.args[0])
    assert g is not None
    return g, gradient.all_input_nodes[-1]


def _fuse(gradient: fx.Node, h: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The call's two outputs, placed before both of the nodes that it replaces."""
    graph, value = gradient.graph, gradient.meta["val"]
    g, x = transposed(gradient.args[0]), gradient.args[1]
    values = value, value.new_empty(value.shape, dtype=torch.float32)
    with graph.inserting_before(min(gradient, h)):
        call = graph.call_function(torch.ops.lotion_fx.curvature_linear.default, (g, x))
        outputs = [graph.call_function(operator.getitem, (call, index)) for index in range(2)]
    _like(h, call, values)
    first, second = (_like(h, out, each) for out, each in zip(outputs, values, strict=True))
    return first, second


def _like(replaced: fx.Node, node: fx.Node, value: Any) -> fx.Node:
    """The node with its fake value, and in the same part of the graph as what it replaces."""
    node.meta["val"] = value
    if "partitioner_tag" in replaced.meta:
        node.meta["partitioner_tag"] = replaced.meta["partitioner_tag"]
    return node


def _cleaned(graph: fx.Graph) -> None:
    graph.eliminate_dead_code()
    graph.lint()
