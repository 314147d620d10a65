"""The phases of one training: which forward each step has, and whether the expected-loss term or a pull is added."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from lotion_fx.numerics.formats import Format
from lotion_fx.numerics.noise import NoiseLaw
from lotion_fx.numerics.scales import PowerOfTwoScale
from lotion_fx.passes.attach.attach import LATENT, RR, STE, STE_SCALE

Shares = tuple[tuple[str, float], ...]
"""Names of phases, each with its share of the training."""

TINY = 1e-9
"""Shares add to 1 up to this, and one below it is none."""


@dataclass(frozen=True)
class Phase:
    """What a training does in one of its phases.

    Args:
        name: as `transform`'s ``schedule`` has it.
        forward: the training forward, see `Plan`.
        has_term: whether the expected-loss term is added.
        pulls: whether each step pulls the weights to their rounded values, see `pull`.
        holds_codes: whether steps move scales alone, see `scale_training`.
    """

    name: str
    forward: str
    has_term: bool = False
    pulls: bool = False
    holds_codes: bool = False

    @property
    def measures(self) -> bool:
        """Whether the size of the term can be measured: only a forward at latent weights has any other to run at."""
        return self.has_term and self.forward == LATENT


PHASES = {
    phase.name: phase
    for phase in (
        Phase("plain", LATENT),
        Phase("lotion", LATENT, has_term=True),
        Phase("finish", STE_SCALE, has_term=True),
        Phase("ste_scale", STE_SCALE),
        Phase("ste", STE),
        Phase("rr", RR),
        Phase("cage", STE, pulls=True),
        Phase("scales", STE, holds_codes=True),
    )
}

METHODS: dict[str, Shares] = {
    "ptq": (("plain", 1.0),),
    "ste": (("ste", 1.0),),
    "ste_scale": (("ste_scale", 1.0),),
    "rr": (("rr", 1.0),),
    "lotion": (("lotion", 1.0),),
    "scales": (("scales", 1.0),),
    "cage": (("ste", 0.8), ("cage", 0.2)),  # the silent share of its authors' own runs
}
"""Each method's phases."""

FROM_PLAIN: Shares = (("plain", 0.6), ("ste_scale", 0.4))
TO_NEAREST: Shares = (("lotion", 0.7), ("ste_scale", 0.3))
LATE: Shares = (("plain", 0.6), ("lotion", 0.4))
AUTO: tuple[tuple[str, Callable[[Format], bool], Shares, Shares], ...] = (
    ("scales that are powers of two", lambda fmt: isinstance(fmt.law, PowerOfTwoScale), FROM_PLAIN, LATE),
    ("two levels of scales", lambda fmt: fmt.law.two_level, FROM_PLAIN, METHODS["ptq"]),
    ("up to two bits", lambda fmt: fmt.grid.bits <= 2, TO_NEAREST, METHODS["lotion"]),
    ("four bits and more in blocks", lambda fmt: fmt.grid.bits >= 4 and isinstance(fmt.block, int), FROM_PLAIN, LATE),
    ("any other", lambda fmt: True, TO_NEAREST, LATE),
)
"""What ``schedule="auto"`` chooses for a kind of format, the first that fits: where the weights are rounded to nearest
in the end, and where `round_` rounds them (``noise="adaptive"``). Measured in docs/accuracy.md."""


@dataclass(frozen=True)
class Schedule:
    """Which phase each step of a training is in.

    Args:
        shares: the phases in their order, whose shares add to 1.
        steps: optimizer steps in the whole training; None where there is one phase.
    """

    shares: Shares = METHODS["lotion"]
    steps: int | None = None

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """The step that each phase begins with, where 0 is the first."""
        before = itertools.accumulate((share for _, share in self.shares[:-1]), initial=0.0)
        return tuple(round((self.steps or 0) * share) for share in before)

    @property
    def has_term(self) -> bool:
        """Whether any phase has the expected-loss term."""
        return any(PHASES[name].has_term for name, _ in self.shares)

    @property
    def pulls(self) -> bool:
        """Whether any phase pulls weights to their rounded values."""
        return any(PHASES[name].pulls for name, _ in self.shares)

    @property
    def holds_codes(self) -> bool:
        """Whether any phase trains scales alone."""
        return any(PHASES[name].holds_codes for name, _ in self.shares)

    @cached_property
    def term_begins(self) -> int:
        """The first step with the expected-loss term."""
        pairs = zip(self.begins, self.shares, strict=True)
        return next((step for step, (name, _) in pairs if PHASES[name].has_term), 0)

    def _place(self, step: int) -> int:
        return bisect.bisect_right(self.begins, step) - 1  # of phases that begin together the last

    def phase(self, step: int) -> Phase:
        """The phase that the step after so many is in; the last one beyond the end."""
        return PHASES[self.shares[self._place(step)][0]]

    def after(self, step: int) -> tuple[str, int] | None:
        """The next phase and the step that it begins with; None in the last."""
        place = self._place(step) + 1
        return (self.shares[place][0], self.begins[place]) if place < len(self.shares) else None

    def ramp(self, step: int) -> float:
        """How much of the step's phase is over: 0 in its first step, growing linearly, below 1."""
        begin, following = self.begins[self._place(step)], self.after(step)
        end = following[1] if following else self.steps or 0
        return min((step - begin) / max(end - begin, 1), 1.0)


def shared_out(method: str, start: float, finish: float, finish_term: bool) -> Shares:
    """A method's own phases between plain training and a last phase at rounded weights, scales differentiated.

    Args:
        start, finish: the shares of these two; the method's phases divide the rest as they divide the whole.
        finish_term: whether the term stays on at the end, if the method has one.
    """
    own = METHODS[method]
    last = "finish" if finish_term and any(PHASES[name].has_term for name, _ in own) else "ste_scale"
    shares = ("plain", start), *((name, share * (1 - start - finish)) for name, share in own), (last, finish)
    return tuple((name, share) for name, share in shares if share > TINY)


def automatic(fmt: Format, noise: NoiseLaw) -> Shares:
    """What ``schedule="auto"`` chooses."""
    _, _, nearest, adaptive = next(row for row in AUTO if row[1](fmt))
    return nearest if noise.rounds else adaptive
