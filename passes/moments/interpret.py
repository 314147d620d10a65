"""Runs a graph on random tensors: a rule for each op says how mean and variance pass through it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from lotion_fx.passes.curvature.contraction import arguments
from lotion_fx.passes.moments.random_tensor import RULES, Call, Ended, Rule, mean_of, randoms
from lotion_fx.passes.moments.rules import affine, losses, nonlinear, views
from lotion_fx.private import tree_leaves

RULE_FILES = (views, affine, nonlinear, losses)
"""Whose decorators fill `RULES`."""


@dataclass
class Trace:
    """What one interpretation of a graph saw.

    Args:
        outputs: the graph's outputs, in order, random where they are.
        paths: for each weight, the ops that its noise passed.
    """

    outputs: list[Any] = field(default_factory=list)
    paths: dict[str, list[str]] = field(default_factory=dict)


class EndedAt(Exception):
    """A stream has ended: whose, at which op and why."""

    def __init__(self, sources: frozenset[str], op: str, reason: str) -> None:
        super().__init__(op, reason)
        self.sources, self.op, self.reason = sources, op, reason


class _Interpreter(fx.Interpreter):
    """Runs a pre-dispatch ATen graph in which some inputs are random, as far as the losses need."""

    def __init__(self, gm: fx.GraphModule, losses: Sequence[int]) -> None:
        super().__init__(gm)
        self.trace = Trace()
        self.needed = _needed(gm.graph, losses)

    def run_node(self, node: fx.Node) -> Any:
        if node.op != "call_function":
            return super().run_node(node)
        with self._set_current_node(node):
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            if node not in self.needed:  # a metric beside the loss
                args, kwargs = mean_of((args, kwargs))
            given = randoms((args, kwargs))
            if not given:
                return self.call_function(node.target, args, kwargs)
            call = Call(name_of(node.target), frozenset().union(*(value.sources for value in given)))
            try:
                out = self._random(node, call, args, kwargs)
            except Ended as ended:
                raise EndedAt(call.sources, call.op, str(ended)) from None
        for value in randoms(out):
            for source in value.sources:
                path = self.trace.paths.setdefault(source, [])
                if not path or path[-1] != call.op:
                    path.append(call.op)
        return out

    def _random(self, node: fx.Node, call: Call, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        if target is operator.getitem:
            return args[0][args[1]]
        packet = getattr(target, "overloadpacket", None)
        if packet in RULES:
            return _apply(RULES[packet], call, args, kwargs)
        functional = getattr(torch.ops.aten, call.op.removesuffix("_"), None) if call.op.endswith("_") else None
        if functional in RULES and not _may_alias(arguments(node)[0]):
            out = _apply(RULES[functional], replace(call, op=call.op.removesuffix("_")), args, kwargs)
            self.env[arguments(node)[0]] = out  # later uses see the changed value
            return out
        raise Ended("no rule for this op")


def _needed(graph: fx.Graph, losses: Sequence[int]) -> set[fx.Node]:
    """The nodes that the losses depend on; what is changed in place counts as changed for them."""
    outputs = tree_leaves(graph.output_node().args[0])
    pending = [outputs[index] for index in losses]
    pending += [node for node in graph.nodes if node.op == "call_function" and name_of(node.target).endswith("_")]
    needed: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if isinstance(node, fx.Node) and node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    return needed


def _apply(rule: Rule, call: Call, args: Any, kwargs: Any) -> Any:
    try:
        inspect.signature(rule).bind(call, *args, **kwargs)
    except TypeError as error:
        raise Ended(f"its rule cannot take these arguments: {error}") from None
    return rule(call, *args, **kwargs)


def _may_alias(node: fx.Node) -> bool:
    """Whether changing this node's tensor in place changes another's: then later uses cannot be told apart."""
    made_fresh = node.op == "call_function" and name_of(node.target) in _FRESH
    return not made_fresh or any(_is_view(user) for user in node.users)


def _is_view(node: fx.Node) -> bool:
    """Whether an op may return (a view of) the tensor it is given; an op in place is none, its own user is it."""
    name, schema = name_of(node.target), getattr(node.target, "_schema", None)
    if name in ("dropout", "feature_dropout"):  # the tensor itself, in evaluation
        return True
    return not name.endswith("_") and (schema is None or any(out.alias_info is not None for out in schema.returns))


_FRESH = {"linear", "conv1d", "conv2d", "conv3d", "convolution", "add", "mul", "batch_norm", "layer_norm", "matmul"}


def name_of(target: Any) -> str:
    """An op's own name, ``"linear"``."""
    packet = getattr(target, "overloadpacket", None)
    return str(packet).rpartition(".")[2] if packet is not None else getattr(target, "__name__", str(target))


def interpret(gm: fx.GraphModule, inputs: Sequence[Any], losses: Sequence[int] = (0,)) -> Trace:
    """Runs a graph on inputs of which some are `Random`.

    Args:
        gm: a pre-dispatch ATen graph, one output list.
        inputs: one tensor, number or `Random` for each placeholder.
        losses: which outputs are losses. What they do not depend on is computed at the means.

    Raises:
        EndedAt: at the first op that ends a stream.
    """
    interpreter = _Interpreter(gm, losses)
    out = interpreter.run(*inputs)
    interpreter.trace.outputs = list(out) if isinstance(out, (list, tuple)) else [out]
    return interpreter.trace
