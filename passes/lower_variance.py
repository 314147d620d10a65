"""Fuse: mean and variance of a linear layer in a moment stream become one call.

    mm(x, W^T)    mm(x^2, S^T)                                 lotion_fx::variance_linear_given(x, W, S)
    mm(x, W^T)    mm(u, (W^T)^2 + S^T) + mm(x^2, S^T)          lotion_fx::variance_linear_given(x, W, S, u)

These are what `passes.moment_affine` makes of a linear layer whose weight W has the variances S, and whose input is
fixed, or random with variance u. The call reads x and W once and squares in registers. A layer of which the covariance
is kept, no wider than `random_tensor.COVARIANCE_WIDTH`, has other nodes and is left as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import fx

import lotion_fx.kernels.variance_linear  # noqa: F401  registers the op
from lotion_fx.passes.joint import RESHAPES
from lotion_fx.passes.square_nodes import products, reshaped, squared, transposed

aten = torch.ops.aten


class Layer(NamedTuple):
    """The nodes of one layer: mean and variance, of N O elements each, and what they are made of."""

    mean: fx.Node
    variance: fx.Node
    x: fx.Node
    weight: fx.Node
    variances: fx.Node
    u: fx.Node | None = None


def match_variance_linear(graph: fx.Graph) -> int:
    """Fuses each layer's mean and variance.

    Args:
        graph: the joint or forward graph of a moment stream, with ``meta["val"]``; rewritten in place.

    Returns:
        How many were fused.
    """
    # Of a random input first: its parts would be taken for a fixed one's.
    sums = graph.find_nodes(op="call_function", target=aten.add.Tensor)
    fused = _fuse_each(graph, sums, _of_sum)
    fused += _fuse_each(graph, products(graph), lambda product: _of_square(product, product))
    graph.lint()
    return fused


def _fuse_each(graph: fx.Graph, nodes: Iterable[fx.Node], layer_of: Callable[[fx.Node], Layer | None]) -> int:
    fused, alive = 0, set(graph.nodes)
    for node in nodes:
        layer = layer_of(node) if node in alive else None
        if layer is not None and _fuse(layer):
            graph.eliminate_dead_code()  # so that no other layer takes these products
            fused, alive = fused + 1, set(graph.nodes)
    return fused


def _of_square(product: fx.Node, variance: fx.Node) -> Layer | None:
    """The layer whose ``mm(x^2, S^T)`` the product is."""
    second, s = squared(reshaped(product.all_input_nodes[0])), transposed(product.args[1])
    if second is None or s is None:
        return None
    # The nearest before it, as of several layers of one input each has its own.
    for mean in sorted((node for node in products(product.graph) if node < product), reverse=True):
        x, weight = mean.all_input_nodes[0], transposed(mean.args[1])
        is_first = reshaped(x) is reshaped(second) and _alike(x, product.all_input_nodes[0])
        if is_first and weight is not None and weight is not s and _alike(weight, s):
            return Layer(_last_reshape(mean), _last_reshape(variance), x, weight, s)
    return None


def _of_sum(total: fx.Node) -> Layer | None:
    """The layer whose two products of a random input the node adds, in `_product_variance`'s order."""
    parts = [reshaped(part) for part in total.args[:2] if isinstance(part, fx.Node)]
    if len(parts) != 2 or total.kwargs or any(part.target is not aten.mm.default for part in parts):
        return None
    of_variance, of_square = parts
    layer = _of_square(of_square, total)
    both: Any = of_variance.args[1]
    if layer is None or both.target is not aten.add.Tensor or both.kwargs:
        return None
    of_mean, of_noise = transposed(squared(both.args[0])), transposed(both.args[1])
    u = of_variance.all_input_nodes[0]
    matches = of_mean is layer.weight and of_noise is layer.variances and _alike(u, layer.x)
    return layer._replace(u=u) if matches else None


def _last_reshape(node: fx.Node) -> fx.Node:
    """The node as its users see it: they come later than reshapes that stand between."""
    while len(node.users) == 1 and next(iter(node.users)).target in RESHAPES:
        node = next(iter(node.users))
    return node


def _alike(a: fx.Node, b: fx.Node) -> bool:
    return a.meta["val"].shape == b.meta["val"].shape and a.meta["val"].dtype == b.meta["val"].dtype


def _fuse(layer: Layer) -> bool:
    """Puts the call where all that it reads is there and nothing that it makes was read; false where no place is."""
    graph, made = layer.mean.graph, (layer.mean, layer.variance)
    place = min(user for node in made for user in node.users)
    if not all(node < place for node in layer[2:] if node is not None) or _value(layer.x).dtype == torch.float64:
        return False
    with graph.inserting_before(place):
        args = layer.x, layer.weight, layer.variances, None, layer.u
        call = graph.call_function(torch.ops.lotion_fx.variance_linear_given.default, args)
        outputs = [graph.call_function(operator.getitem, (call, index)) for index in range(2)]
        shaped = [
            graph.call_function(aten.reshape.default, (output, list(_value(node).shape)))
            for output, node in zip(outputs, made, strict=True)
        ]
    y = _value(layer.x).new_empty(_value(layer.x).shape[0], _value(layer.weight).shape[0])
    call.meta["val"] = y, y
    for output, new, node in zip(outputs, shaped, made, strict=True):
        output.meta["val"], new.meta["val"] = y, _value(node)
        node.replace_all_uses_with(new)
    return True


def _value(node: fx.Node) -> torch.Tensor:
    return node.meta["val"]
