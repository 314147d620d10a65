"""Moment propagation: a variance stream beside the mean, from randomly rounded weights to the loss.

Where the loss is in the graph, its expectation can be computed instead of estimated. Every value that depends on a
random weight is carried as a `Random`, its elementwise mean and variance and what is known of its dependences; a rule
for each op says how they pass through. The rules are PyTorch functions, so a graph is rewritten by tracing its own
interpretation: `stream` is a pure function from graph to graph.

Nothing is assumed in silence. A rule that is not exact leaves a `Note` on the mean or on the variance that it touches,
and the notes on the loss's mean are each weight's certificate: none, and the closed form equals the sum over all
roundings. An op without a rule ends the stream: the weights that reach it are handed to the joint-graph form.

Source: LOTION, arXiv 2510.08757, section 3; the rules name their own.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from lotion_fx.passes import moment_affine, moment_losses, moment_nonlinear, moment_views
from lotion_fx.passes.contraction import arguments
from lotion_fx.passes.random_tensor import (
    RULES,
    Call,
    Ended,
    Note,
    Notes,
    Random,
    Rule,
    mean_of,
    merged,
    randoms,
    weight,
)

RULE_FILES = (moment_views, moment_affine, moment_nonlinear, moment_losses)
"""Whose decorators fill `RULES`."""

# ----------------------------------------------------------------------------------------------------- interpretation


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


# ------------------------------------------------------------------------------------------------------- certificates

EXACT, SECOND_ORDER, ANALYTIC, FISHER = "exact", "second order", "analytic", "fisher"


@dataclass(frozen=True)
class Certificate:
    """How one weight's part of the expected loss is known.

    Args:
        kind: ``"exact"`` (the closed form equals the sum over all roundings), ``"second order"`` (the moment stream,
            with the approximations in ``notes``), ``"analytic"`` (the joint graph's contraction of squares) or
            ``"fisher"``.
        path: the ops that its noise passed on the way to the loss, where the stream reached it.
        notes: the approximations on that way.
        ended: the op that ended the stream and why; empty where it did not.
    """

    kind: str
    path: tuple[str, ...] = ()
    notes: Notes = ()
    ended: str = ""

    def __str__(self) -> str:
        if self.ended:
            return f"{self.kind}: {self.ended}"
        why = "; ".join(dict.fromkeys(str(note) for note in self.notes))
        return f"{self.kind}: {why}" if why else f"{self.kind}: {' > '.join(self.path)}"


@dataclass(frozen=True)
class Analysis:
    """Which weights' noise reaches the loss by rules alone.

    Args:
        certificates: of the weights that do.
        ended: for each weight that does not, the op that ended its stream and why.
    """

    certificates: Mapping[str, Certificate]
    ended: Mapping[str, str]


_PATIENCE = 8


def analyse(gm: fx.GraphModule, inputs: Sequence[Any], losses: Sequence[int], diagonal: bool = False) -> Analysis:
    """Finds the weights whose moment stream reaches a loss.

    A weight that reaches an op without a rule is taken as fixed and the rest is tried again, so one unknown op costs
    the weights before it and none behind it.

    Args:
        gm: a pre-dispatch ATen graph.
        inputs: one (fake) tensor or number per placeholder; the candidates as `Random`, one source each.
        losses: which outputs are losses: every scalar that may be one.
        diagonal: whether a stream goes on past an op at which covariances are dropped. Without them it can be off by a
            factor, as through a residual connection, where the joint-graph form is not.
    """
    ended: dict[str, str] = {}
    rounds = 0
    while True:
        values = [v.mean if isinstance(v, Random) and v.sources & ended.keys() else v for v in inputs]
        names = [name for value in values if isinstance(value, Random) for name in value.sources]
        try:
            trace = interpret(gm, values, losses)
        except EndedAt as end:
            ended.update(dict.fromkeys(end.sources, f"{end.op}: {end.reason}"))
            continue
        found = randoms([trace.outputs[index] for index in losses])
        notes = merged(*(loss.mean_notes for loss in found))
        drops = [] if diagonal else [note for note in notes if note.dropped]
        if drops:
            # Without the first one's weights a later one may drop nothing. A deep graph has no time for that.
            blamed = drops[:1] if rounds < _PATIENCE else drops
            ended.update({source: str(note) for note in reversed(blamed) for source in note.dropped})
            rounds += 1
            continue
        reached = frozenset().union(*(loss.sources for loss in found))
        certificates = {n: _certificate(n, trace.paths.get(n, []), notes, list(ended)) for n in names if n in reached}
        return Analysis(certificates, ended | dict.fromkeys(set(names) - reached, "it does not reach the loss"))


def _certificate(name: str, path: list[str], notes: Notes, fixed: list[str]) -> Certificate:
    """A weight's noise multiplies others': it is exact where all are, and all are in the stream."""
    mine = tuple(note for note in notes if name in note.sources) or notes
    if not mine and fixed:
        mine = (Note(f"{', '.join(fixed[:3])}{' ...' * (len(fixed) > 3)} taken as fixed", "stream", frozenset({name})),)
    return Certificate(SECOND_ORDER if mine else EXACT, tuple(path), mine)


# ------------------------------------------------------------------------------------------------------ graph to graph


@dataclass(frozen=True)
class Streamed:
    """A graph whose loss is the expected one.

    Args:
        gm: takes the graph's inputs, then the variance of each weight in the stream.
        variances: for each of those weights' input index that of its variance.
        certificates: of each.
    """

    gm: fx.GraphModule
    variances: Mapping[int, int]
    certificates: Mapping[int, Certificate]


def stream(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    weights: Sequence[int],
    losses: Sequence[int],
    diagonal: bool,
    trace: Callable[[Callable[..., Any], Sequence[Any]], fx.GraphModule],
) -> Streamed:
    """Puts a variance stream beside the mean; a loss becomes the expected loss, any other output its mean.

    Args:
        gm: a pre-dispatch ATen graph with a list or tuple of outputs; left as it is.
        inputs: one (fake) tensor or number per placeholder.
        weights: the inputs that are weights under randomized rounding.
        losses, diagonal: see `analyse`.
        trace: makes a graph of a function of tensors.
    """
    names = {str(index): index for index in weights}
    candidates = [_random_weight(i, x, x) if str(i) in names else x for i, x in enumerate(inputs)]
    analysis = analyse(gm, candidates, losses, diagonal)
    certificates = {names[name]: certificate for name, certificate in analysis.certificates.items()}
    variances = {index: len(inputs) + position for position, index in enumerate(certificates)}

    def run(*args: Any) -> list[Any]:
        values = [_random_weight(i, x, args[variances[i]]) if i in variances else x for i, x in enumerate(args)]
        return [mean_of(output) for output in interpret(gm, values[: len(inputs)], losses).outputs]

    traced = trace(run, [*inputs, *(torch.zeros_like(inputs[i]) for i in certificates)])
    return Streamed(traced, variances, certificates)


def _random_weight(index: int, mean: Tensor, var: Tensor) -> Random:
    return weight(str(index), mean, var.to(mean.dtype))
