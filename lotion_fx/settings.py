"""What `transform` was told, checked and frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lotion_fx.numerics.noise import RANDOMIZED, NoiseLaw
from lotion_fx.passes.attach.attach import MEAN
from lotion_fx.schedule import Phase, Schedule

MOMENTS = ("closed", "diagonal", "off")
CURVATURES = ("factored", "full", "fisher", "ggn")
INNERS = ("inductor", "aot_eager", "eager")

EARLY, REFRESH = 1000, 4
"""Where `transform` was not told otherwise. Graphs that gather no curvature are compiled when the first step rests, and
a short training would not get that back."""


@dataclass(frozen=True)
class Settings:
    """The settings of one transformed model; see `transform` for what each means.

    Args:
        method, strength, curvature, inner, decay, noise, moments: as given.
        early, refresh: the first so many steps with a term all gather curvature, then one of so many does.
        schedule: the phases of the training.
        pull: of ``"cage"``, see `pull`.
        loss_fn: a callable, or ``"model"`` where the model returns its loss; None where graphs hold no loss.
        likelihood: of ``curvature="ggn"``: what the model's output parametrizes.
        calibrate: whether the term's size is measured while training.
        process_group: over which the user's loop averages gradients.
        adopted: came in through ``torch.compile(backend="lotion_fx")``.
    """

    method: str = "lotion"
    strength: float = 1.0
    curvature: str = "factored"
    inner: str = "inductor"
    decay: float = 0.99
    noise: NoiseLaw = RANDOMIZED
    schedule: Schedule = field(default_factory=Schedule)
    pull: float = 10.0
    loss_fn: Any = None
    moments: str = "closed"
    likelihood: str | None = None
    early: int = 0
    refresh: int = 1
    calibrate: bool = True
    process_group: Any = None
    adopted: bool = False

    def forward_in(self, phase: Phase) -> str:
        """The training forward in a phase.

        Under a biased noise the expected loss is taken around the mean of the random weights.
        """
        return MEAN if phase.measures and not self.noise.unbiased else phase.forward

    @property
    def measures(self) -> bool:
        """Whether steps are to measure the term; of an adopted model no call is seen that one could begin with.

        They do so by random roundings under `NoiseLaw.rounds` or not: what they tell is the size of the curvature.
        """
        return self.calibrate and self.schedule.has_term and self.strength > 0 and not self.adopted

    def interval(self, step: int) -> int:
        """Of how many steps one gathers curvature, at a step counted from the first with a term."""
        return 1 if step < self.early else self.refresh

    @property
    def samples_labels(self) -> bool:
        """Whether curvature comes from a pass of its own, at labels drawn from the model's output."""
        return self.curvature == "ggn"

    @property
    def reads_moment(self) -> bool:
        """Whether curvature is asked of the optimizer's second moment, and nothing of the graph."""
        return self.curvature == "fisher"
