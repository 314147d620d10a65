"""Which parameters a loss depends on by steps alone, where no gradient tells what moving them does.

A comparison, an argmin, a rounding has the derivative 0 wherever it has one, and `detach` hides the one there is. What
is before them alone has no gradient, as what the loss never uses has none: the graph tells the two apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from lotion_fx.passes.moments.interpret import name_of
from lotion_fx.private import tree_leaves


@dataclass(frozen=True)
class Step:
    """How a loss depends on a parameter in which it has no gradient.

    Args:
        op: the first one on the way that has none.
        is_all: whether no other way to the loss has one.
        is_hidden: there is a derivative, which `detach` or `torch.no_grad` hides.
    """

    op: str
    is_all: bool
    is_hidden: bool

    def __str__(self) -> str:
        return f"its gradient is 0 behind {self.op}"


@dataclass
class _Seen:
    """What a value, or a tensor that was written into, depends on: a bit for each parameter.

    Args:
        smooth: by ways that have a gradient.
        hidden: by ways whose derivative `detach` or `torch.no_grad` hides.
        stepped: by ways that have none.
    """

    smooth: int = 0
    hidden: int = 0
    stepped: int = 0

    def add(self, other: _Seen) -> None:
        self.smooth |= other.smooth
        self.hidden |= other.hidden
        self.stepped |= other.stepped

    def hide(self) -> None:
        self.hidden, self.smooth = self.hidden | self.smooth, 0

    def step(self) -> None:
        self.stepped, self.hidden, self.smooth = self.stepped | self.hidden | self.smooth, 0, 0


@dataclass(frozen=True)
class _Cut:
    """A node at which some parameters' gradient ends."""

    node: fx.Node
    bits: int
    op: str
    is_hidden: bool


def steps_to_loss(gm: fx.GraphModule, names: Iterable[str]) -> dict[str, Step]:
    """The parameters that a loss depends on by steps, by name.

    Args:
        gm: a pre-dispatch ATen graph as it was traced, whose first output is the loss; sizes may depend on data.
        names: of the parameters, which are its first placeholders.
    """
    names = list(names)
    seen, cuts = _followed(gm, len(names))
    end: Any = gm.graph.output_node()
    loss = end.args[0][0]
    needed = _needed(gm.graph, loss)
    found = {}
    for place, name in enumerate(names):
        bit = 1 << place
        is_all, is_hidden = not seen[loss].smooth & bit, not seen[loss].stepped & bit
        if not is_hidden or (is_all and seen[loss].hidden & bit):
            mine = (cut for cut in cuts if cut.bits & bit and cut.node in needed and cut.is_hidden == is_hidden)
            found[name] = Step(next(mine).op, is_all, is_hidden)
    return found


def unknown(steps: Mapping[str, Step], names: Iterable[str]) -> dict[str, str]:
    """Those of the names whose gradient is 0 though the loss depends on them, each with why."""
    return {name: str(steps[name]) for name in names if name in steps and steps[name].is_all}


def tell_of_unknown(what: str, why: Mapping[str, str], *, stacklevel: int = 3) -> None:
    """Warns of weights whose rounding costs what no gradient tells.

    Args:
        what: was called, and what it makes of them.
        why: of each, by name.
    """
    if why:
        first = next(iter(why))
        others = f", nor of {len(why) - 1} more" if len(why) > 1 else ""
        warnings.warn(
            f"{what}: what rounding {first!r} costs is not known, for {why[first]}{others}; the loss in eval() beside "
            f"that under full_precision(model) shows it, and only={{{first!r}: None}} keeps it as it is",
            stacklevel=stacklevel + 1,
        )


def _followed(gm: fx.GraphModule, parameters: int) -> tuple[dict[fx.Node, _Seen], list[_Cut]]:
    """What each value depends on, and where gradients end."""
    bits = {node: 1 << place for place, node in enumerate(gm.graph.find_nodes(op="placeholder")[:parameters])}
    seen: dict[fx.Node, _Seen] = {}
    roots: dict[fx.Node, fx.Node] = {}  # whose memory a node's is
    written: dict[fx.Node, _Seen] = {}  # what that memory has been given since
    cuts: list[_Cut] = []
    with_grad = True
    for node in gm.graph.nodes:
        if name_of(node.target) == "_set_grad_enabled":
            with_grad = bool(node.args[0])
        roots[node] = node
        mine = seen[node] = _Seen(bits.get(node, 0))
        if node.op != "call_function" or _tells_shape_alone(node):
            continue
        for each in _read(node):
            mine.add(seen[each])
            mine.add(written.get(roots[each], _Seen()))
        if why := _step(node):
            cuts.append(_Cut(node, mine.smooth | mine.hidden, why, is_hidden=False))
            mine.step()
        elif not with_grad or name_of(node.target).startswith("detach"):
            cuts.append(_Cut(node, mine.smooth, "detach" if with_grad else "torch.no_grad()", is_hidden=True))
            mine.hide()
        if _shares_memory(node) and node.all_input_nodes:
            roots[node] = roots[node.all_input_nodes[0]]
        if _writes(node):
            written.setdefault(roots[node.all_input_nodes[0]], _Seen()).add(mine)
    return seen, cuts


def _step(node: fx.Node) -> str:
    """What of an op has no gradient; empty where it has one."""
    name = name_of(node.target)
    leaves = [leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
    if leaves and not any(leaf.is_floating_point() or leaf.is_complex() for leaf in leaves):
        given = node.all_input_nodes[0] if name == "getitem" else node
        return f"a cast to {leaves[0].dtype}" if name in _CASTS else name_of(given.target)
    if name.removesuffix("_") in _FLAT or (name in ("div", "div_") and node.kwargs.get("rounding_mode")):
        return name
    return ""


def _read(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values an op reads; of some it reads the shape of all but the first."""
    nodes = node.all_input_nodes
    return nodes[:1] if name_of(node.target) in _SHAPED_AS else nodes


def _tells_shape_alone(node: fx.Node) -> bool:
    name = name_of(node.target)
    return name.endswith("_like") or name.startswith(("new_", "sym_"))


def _shares_memory(node: fx.Node) -> bool:
    """Whether an op's result may be (a view of) what it is given."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(out.alias_info is not None for out in schema.returns)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable) and bool(node.all_input_nodes)


def _needed(graph: fx.Graph, loss: fx.Node) -> set[fx.Node]:
    """The nodes that a loss depends on, what is written in place counted in."""
    pending = [loss, *(node for node in graph.nodes if node.op == "call_function" and _writes(node))]
    needed: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    return needed


_CASTS = ("to", "_to_copy", "type_as")
_SHAPED_AS = ("expand_as", "view_as", "reshape_as", "type_as")
_FLAT = frozenset(
    ("sign", "sgn", "round", "floor", "ceil", "trunc", "fix", "heaviside", "bernoulli", "poisson", "binomial",
     "normal")
)  # fmt: skip
"""Ops of real results whose gradient is 0, or none, wherever it is."""
