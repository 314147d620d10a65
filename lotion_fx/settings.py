"""What `transform` was told, checked and frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lotion_fx.numerics.noise import RANDOMIZED, NoiseLaw
from lotion_fx.passes.attach.attach import LATENT, MEAN, RR, STE, STE_SCALE

METHODS = {"ptq": LATENT, "ste": STE, "ste_scale": STE_SCALE, "rr": RR, "lotion": LATENT}
"""Each method's training forward."""
MOMENTS = ("closed", "diagonal", "off")
CURVATURES = ("factored", "full", "fisher", "ggn")
INNERS = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class Settings:
    """The settings of one transformed model; see `transform` for what each means.

    Args:
        method, strength, curvature, inner, decay, noise, moments, refresh: as given.
        finish, total_steps: the share of the training that finishes, and its length in optimizer steps; or both None.
        finish_term: whether the term stays on meanwhile, unless `finish` says otherwise.
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
    finish: float | None = None
    total_steps: int | None = None
    finish_term: bool = True
    loss_fn: Any = None
    moments: str = "closed"
    likelihood: str | None = None
    refresh: int = 1
    calibrate: bool = True
    process_group: Any = None
    adopted: bool = False

    @property
    def forward_mode(self) -> str:
        """The training forward before the finishing phase.

        Under a biased noise the expected loss is taken around the mean of the random weights.
        """
        return MEAN if self.method == "lotion" and not self.noise.unbiased else METHODS[self.method]

    @property
    def measures(self) -> bool:
        """Whether steps are to measure the term, by random roundings, of which it must then be the cost.

        Of an adopted model no call is seen that one could begin with.
        """
        return (
            self.calibrate and self.noise.rounds and self.method == "lotion" and self.strength > 0 and not self.adopted
        )

    @property
    def samples_labels(self) -> bool:
        """Whether curvature comes from a pass of its own, at labels drawn from the model's output."""
        return self.curvature == "ggn"

    @property
    def reads_moment(self) -> bool:
        """Whether curvature is asked of the optimizer's second moment, and nothing of the graph."""
        return self.curvature == "fisher"
