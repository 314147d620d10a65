"""Which weights' noise reaches a loss by rules alone, and how exactly: each weight's certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from lotion_fx.passes.moments.interpret import EndedAt, interpret
from lotion_fx.passes.moments.random_tensor import Note, Notes, Random, merged, randoms

EXACT, SECOND_ORDER, ANALYTIC, FISHER = "exact", "second order", "analytic", "fisher"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Certificate:
    """How one weight's part of the expected loss is known.

    Args:
        kind: ``"exact"`` (the closed form equals the sum over all roundings), ``"second order"`` (the moment stream,
            with the approximations in ``notes``), ``"analytic"`` (the joint graph's contraction of squares),
            ``"fisher"``, or ``"unknown"`` (its gradient is 0, and the loss depends on it nevertheless).
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
