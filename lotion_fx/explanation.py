"""`explain`: each graph of a model before and after each pass, and what stopped the way to a weight's contraction."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lotion_fx import private
from lotion_fx.passes.attach.attach import Plan
from lotion_fx.passes.attach.probe import Code
from lotion_fx.passes.pipeline import LOG, JointState, Pass, watched
from lotion_fx.state import Weight, names_of
from lotion_fx.variants import Variants


@dataclass(frozen=True)
class PassRun:
    """One pass over one graph: its name, the graph before and after as Python source."""

    name: str
    before: str
    after: str


@dataclass
class GraphExplanation:
    """One graph in one variant.

    Args:
        plans: each weight's name, and what its node does there.
        passes: in the order in which they ran: forward, then joint where there is one.
        fisher: each weight that takes the Fisher form there, with the op that stopped the walk and why.
    """

    plans: dict[str, str]
    passes: list[PassRun] = field(default_factory=list)
    fisher: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"  {name}: {what}" for name, what in self.plans.items()]
        lines += [f"  {name} takes the Fisher form: {why}" for name, why in self.fisher.items()]
        for run in self.passes:
            changed = run.before != run.after
            lines.append(f"-- {run.name}" + ("" if changed else ": nothing to do"))
            lines += ["   before:", run.before, "   after:", run.after] if changed else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """Every graph that a model's weights were compiled into so far. ``str()`` prints all of it."""

    graphs: tuple[GraphExplanation, ...]

    @property
    def fisher(self) -> dict[str, str]:
        """Each weight that takes the Fisher form in some graph, with the op that stopped the walk and why."""
        return {name: why for graph in self.graphs for name, why in graph.fisher.items()}

    def __str__(self) -> str:
        return "\n\n".join(f"== graph {i} of {len(self.graphs)}\n{g}" for i, g in enumerate(self.graphs, start=1))


def explain(model: nn.Module) -> Explanation:
    """What the passes do to each graph of a transformed model, and why a weight takes the Fisher form.

    The graphs are those of the calls so far, in each of their variants (training, ``eval()``, a later phase, ...). The
    passes run over them once more, without Inductor, whose caches would keep them from running.

    Args:
        model: transformed, and called at least once.

    Raises:
        ValueError: the model is not under lotion_fx, or did not run yet.
    """
    names = names_of(model)
    graphs = [_explained(variants, names) for variants in Variants.known if any(w in names for w in variants.taught)]
    if not graphs:
        raise ValueError(f"model: this {type(model).__name__} did not run yet, so no graph is known; call it once")
    return Explanation(tuple(graph for group in graphs for graph in group))


def _explained(variants: Variants, names: Mapping[Weight, str]) -> list[GraphExplanation]:
    """One explanation for each variant."""
    found: list[GraphExplanation] = []
    probed: Sequence[int] = ()

    def named(index: int) -> str:
        return " = ".join(name for weight, name in names.items() if index in variants.taught.get(weight, ()))

    def watcher(each: Pass[Any], before: str, state: Any) -> None:
        nonlocal probed
        found[-1].passes.append(PassRun(each.name, before.strip(), state.text.strip()))
        if isinstance(state, JointState) and state.resolutions and not found[-1].fisher:
            found[-1].fisher.update(_stopped(state, [named(index) for index in probed]))
        probed = probed if isinstance(state, JointState) else state.probed

    with watched(watcher):
        for plans in variants.rehearsal():
            found.append(GraphExplanation({named(index): _told(plan) for index, plan in plans.items()}))
    return found


def _told(plan: Plan) -> str:
    fmt, axis, noise = plan.quantizer.constants
    probe = "no probe" if plan.layout is None else f"probe {plan.layout.kind} {plan.layout.factors}"
    stream = "" if plan.moments == "off" else f", moment stream {plan.moments}"
    return f"{plan.mode} forward in {fmt} along dimension {axis}, noise {noise}, {probe}{stream}"


def _stopped(state: JointState, names: Sequence[str]) -> dict[str, str]:
    """The weights that take the Fisher form, by the place of their probe's gradient among the graph's outputs."""
    outputs = private.tree_leaves(state.graph.output_node().args[0])
    gradients = outputs[len(outputs) - len(names) :]  # probes are the last inputs, gradients are in their order
    found: dict[str, str] = {}
    for resolution in state.resolutions:
        if resolution.code in (Code.ANALYTIC, Code.BY_CHOICE):
            continue
        reached, pending = set(), [resolution.vector]
        while pending:
            node = pending.pop()
            reached.add(node)
            pending += [user for user in node.users if user not in reached]
        places = [place for place, gradient in enumerate(gradients) if gradient in reached]
        name = names[places[0]] if places else "a weight that no gradient reaches"
        found[name] = f"{resolution.reason}; the walk stopped at {resolution.op}"
    return found


def log_as_asked() -> None:
    """Prints what ``LOTION_FX_LOGS`` names, a list with commas; ``passes`` is all there is, as torch's loggers do.

    Raises:
        ValueError: it names something else.
    """
    asked = [name.strip() for name in os.environ.get("LOTION_FX_LOGS", "").split(",") if name.strip()]
    if unknown := [name for name in asked if name != "passes"]:
        raise ValueError(f"LOTION_FX_LOGS: unknown log {unknown[0]!r}; expected 'passes'")
    if asked and not LOG.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        LOG.addHandler(handler)
        LOG.setLevel(logging.DEBUG)
