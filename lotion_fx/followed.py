"""Whether the traced graph of a loss computes what the model does.

A trace sees ops on tensors. What a model reads in Python (``.item()``, ``.data``, numpy) or computes inside
`torch.vmap`, `torch.func` and `torch.autograd.grad` enters the graph as a constant: right at the weights that it was
traced at, and at no others. Traced again at other weights such a constant is another one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from lotion_fx.private import tree_leaves

MOVED = 2.0**-10
"""How far the weights of the second trace lie from those of the first, in units of their mean magnitude."""

NEAR = 1e-4
"""Losses that differ by less are one loss, as a share of it: a graph runs the kernels that the model does."""

ADVICE = (
    "values that are read in Python (.item(), .tolist(), .data, numpy), and what torch.vmap, torch.func or "
    "torch.autograd.grad compute inside a forward, are constants to whoever traces a loss; compute them by tensors and "
    "outside of these"
)


@contextlib.contextmanager
def same_draws(tensors: Iterable[Any], seed: int = 0) -> Iterator[None]:
    """Inside, what draws random numbers draws the same ones each time; outside none were drawn.

    Args:
        tensors: on the devices that may draw.
        seed: other draws for another one.
    """
    devices = {x.device for x in tensors if isinstance(x, Tensor)} - {torch.device("cpu")}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng(sorted(devices, key=str), device_type=kind):
        torch.manual_seed(seed)
        yield


def draws(node: fx.Node) -> bool:
    """Whether an op may draw random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def moved(parameter: Tensor) -> Tensor:
    """A parameter near another, the same each time."""
    own = parameter.detach()
    if not own.is_floating_point() or not own.numel():
        return own
    step = torch.rand(own.shape, generator=torch.Generator().manual_seed(0)).to(own.device) + 0.5
    return (own + MOVED * own.abs().mean(dtype=torch.float32) * step).to(own.dtype)


def check_followed(gm: fx.GraphModule, traced_again: Callable[[bool], fx.GraphModule]) -> None:
    """Raises where a graph holds what depends on the weights as a constant.

    Args:
        gm: traced at the model's own weights.
        traced_again: gives another trace, at moved weights or at its own.

    Raises:
        ValueError: which says what it is, and what to do.
    """
    found = _constant(gm, traced_again(True))
    if found and not _constant(gm, traced_again(False)):  # else it changes by itself
        raise ValueError(
            f"model: its loss is made of {found} that changes with the weights, and that a trace of the loss takes "
            f"for a constant: {ADVICE}"
        )


def _constant(gm: fx.GraphModule, other: fx.GraphModule) -> str:
    """What two graphs have different constants for; empty of none, and where Python went another way."""
    nodes, others = _nodes(gm), _nodes(other)
    if [_way(node) for node in nodes] != [_way(node) for node in others]:
        return ""
    for a, b in zip(nodes, others, strict=True):
        if a.op == "get_attr":
            one, two = getattr(gm, str(a.target), None), getattr(other, str(b.target), None)
            if isinstance(one, Tensor) and isinstance(two, Tensor) and _differ(one, two):
                return f"a tensor {list(one.shape)}, which {_read_by(a)} reads,"
        for one, two in zip(tree_leaves((a.args, a.kwargs)), tree_leaves((b.args, b.kwargs)), strict=False):
            if isinstance(one, float) and isinstance(two, float) and one != two and one == one:
                return f"a number, {one:.6g}, which {a.target} reads,"
    return ""


def _nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """A graph's nodes without the copies of constants that were added after the trace."""
    copy = torch.ops.aten.clone.default
    return [n for n in gm.graph.nodes if n.target is not copy or n.all_input_nodes[0].op != "get_attr"]


def _way(node: fx.Node) -> Any:
    return node.op, node.target if node.op == "call_function" else None


def _differ(one: Tensor, two: Tensor) -> bool:
    is_real = one.is_floating_point() or one.is_complex()
    return is_real and one.shape == two.shape and one.dtype == two.dtype and not torch.equal(one, two)


def _read_by(node: fx.Node) -> str:
    return str(next((user.target for user in node.users), "nothing"))
