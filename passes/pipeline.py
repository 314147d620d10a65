"""Runs passes over a graph, one after the other, with whoever watches told of each."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import fx

from lotion_fx.passes.attach.attach import Plan
from lotion_fx.passes.curvature.resolve import Resolution
from lotion_fx.passes.moments.certificate import Certificate

LOG = logging.getLogger("lotion_fx.passes")


class Carrier(Protocol):
    """What passes hand on: a graph, and what is known of it."""

    @property
    def text(self) -> str:
        """The graph as Python source."""
        ...


State = TypeVar("State", bound=Carrier)


@dataclass(frozen=True)
class Pass(Generic[State]):
    """One pass.

    Args:
        run: from state to state.
        assumes: what holds of the graph before.
        leaves: what holds of it afterwards.
    """

    name: str
    run: Callable[[State], State]
    assumes: str
    leaves: str


@dataclass(frozen=True)
class ForwardState:
    """A forward graph of torch functions, as Dynamo made it, on its way.

    Args:
        gm: the graph; a pass makes a new one, or changes one that an earlier pass made.
        inputs: its example inputs, in the order of its placeholders.
        plans: what each of its weights needs, by placeholder index.
        has_joint: whether a joint graph will be made of it.
        arch: compute capability of the weights' device, 80 for sm_80; None on a CPU.
        variances: of the weights in a moment stream, the index of the input that its variance is, then its gain.
        certificates: of the same weights.
        probed: the weights with a probe, in the order in which the probes follow all other inputs.
        fired: how many nodes each pass that counts rewrote, by the pass's name.
    """

    gm: fx.GraphModule
    inputs: Sequence[Any]
    plans: Mapping[int, Plan]
    has_joint: bool
    arch: int | None
    variances: Mapping[int, int] = field(default_factory=dict)
    certificates: Mapping[int, Certificate] = field(default_factory=dict)
    probed: tuple[int, ...] = ()
    fired: Mapping[str, int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.gm.graph.python_code("self").src


@dataclass(frozen=True)
class JointState:
    """AOTAutograd's joint graph, functional, in ATen ops, rewritten in place.

    Args:
        graph: with ``meta["val"]`` on every node.
        arch: compute capability of its device, 80 for sm_80; None on a CPU.
        resolutions: what was found for each weight with a probe.
        fired: how many nodes each pass that counts rewrote, by the pass's name.
    """

    graph: fx.Graph
    arch: int | None
    resolutions: tuple[Resolution, ...] = ()
    fired: Mapping[str, int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.graph.python_code("self").src


Watcher = Callable[[Pass[Any], str, Any], None]
"""Told of each pass that ran: the pass, the graph before as source, the state after."""
_watchers: list[Watcher] = []


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Inside, the watcher is told of each pass that runs."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def run(passes: Sequence[Pass[State]], state: State) -> State:
    """The state after all passes."""
    for each in passes:
        logs = LOG.isEnabledFor(logging.DEBUG)
        before = state.text if _watchers or logs else ""
        state = each.run(state)
        if logs and (after := state.text) != before:
            LOG.debug("%s: %s\n%s", each.name, each.leaves, after.strip())
        elif logs:
            LOG.debug("%s: nothing to do", each.name)
        for watcher in _watchers:
            watcher(each, before, state)
    return state
