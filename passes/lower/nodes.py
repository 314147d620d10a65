"""What a joint graph's nodes are squares, transposes and reshapes of, by which fused products are recognized."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lotion_fx.passes.ops import CASTS

aten = torch.ops.aten


def squared(node: Any) -> fx.Node | None:
    """The node of which this one is the square, made in its own dtype or in float32; None for any other."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2:
        factor: Any = node.args[0]
    elif node.target is aten.mul.Tensor and node.args[0] is node.args[1]:
        factor = node.args[0]
    else:
        return None
    widened = factor.target in CASTS and factor.meta["val"].dtype == torch.float32
    return factor.all_input_nodes[0] if widened else factor


def transposed(node: Any) -> fx.Node | None:
    """The matrix of which this one is the transpose, as a view; None for any other."""
    if not isinstance(node, fx.Node):
        return None
    swaps = node.target is aten.t.default
    swaps |= node.target is aten.permute.default and list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
    swaps |= node.target is aten.transpose.int and {d % 2 for d in node.args[1:]} == {0, 1}  # type: ignore[operator]
    return node.all_input_nodes[0] if swaps else None


def products(graph: fx.Graph) -> list[fx.Node]:
    """The matrix products, in the graph's order."""
    return list(graph.find_nodes(op="call_function", target=aten.mm.default))
