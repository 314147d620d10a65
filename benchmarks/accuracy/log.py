"""The log of finished runs: one JSON object a line, added when a run ends and never changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lotion_fx.examples import runlog

Key = tuple[str, str, str, int, str]


@dataclass(frozen=True)
class Run:
    """One row of one seed. Losses are means over the same held-out windows, in the setting's own unit.

    Args:
        setting, format, method, seed: what ran; "fp32" and "full_precision" for the run that the others are paired
            with.
        recipe: the fingerprint of how.
        loss: at the weights that are deployed.
        latent: at the latent weights.
        full_precision: of the full-precision run of the same seed.
        windows: held out, over which these are means.
        steps: of training, from the start.
        seconds: of training after the fork from the full-precision run, compilation included.
        rounding_seconds: of rounding in the end.
        commit: of lotion_fx, with "+" where files differed from it.
        torch: its version.
    """

    setting: str
    format: str
    method: str
    seed: int
    recipe: str
    loss: float
    latent: float
    full_precision: float
    windows: int
    steps: int
    seconds: float
    rounding_seconds: float
    commit: str
    torch: str

    @property
    def key(self) -> Key:
        """What tells whether a run is there already."""
        return self.setting, self.format, self.method, self.seed, self.recipe

    @property
    def excess(self) -> float:
        """The loss that quantization adds."""
        return self.loss - self.full_precision


def read(path: Path) -> dict[Key, Run]:
    """The runs of a log, see `runlog.read`."""
    return {run.key: run for run in runlog.read(path, Run)}
