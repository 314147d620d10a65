"""The log of finished runs: one JSON object a line, added when a run ends and never changed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

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
    """The runs of a log; none where there is no file.

    Raises:
        ValueError: a line is no run; the last one, which a killed process may have cut, is passed over with a word.
    """
    return {run.key: run for run in _runs(path)} if path.exists() else {}


def _runs(path: Path) -> Iterator[Run]:
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                yield Run(**json.loads(line))
        except (ValueError, TypeError) as error:
            if number == len(lines):  # whatever was written whole ends in a newline
                print(f"{path}:{number}: cut off in the middle; that run is done again")
                return
            raise ValueError(f"{path}:{number}: no run of this log ({error}); mend the line or take it out") from None


def add(path: Path, run: Run) -> None:
    """Adds a run, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() and path.read_bytes()[-1:] != b"\n":  # drop the half line of a killed process
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(json.dumps(asdict(run)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
