"""The sizes that want a GPU: a model, how much text it sees, and in which steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lotion_fx.examples.fsdp2_lm import Size

VOCAB = 50_304  # GPT-2's tokens, filled up to a multiple of 64
BYTES = 256


@dataclass(frozen=True)
class Scale:
    """One size of the comparison.

    Args:
        name: on the command line.
        model: its shape; ``batch`` is what a rank takes at once.
        tokens: of one training.
        sequences: of one optimizer step, over all ranks.
        lr: the highest learning rate.
        points: of the curve along training.
        windows: batches a rank that a loss in the end is a mean over; a point of the curve has a quarter.
    """

    name: str
    model: Size
    tokens: float
    sequences: int
    lr: float
    points: int = 30
    windows: int = 32

    @property
    def step_tokens(self) -> int:
        """Of one optimizer step."""
        return self.sequences * self.model.length

    @property
    def steps(self) -> int:
        """Optimizer steps of one training."""
        return round(self.tokens / self.step_tokens)

    def accumulate(self, world: int) -> int:
        """Batches of each of so many ranks that make one step.

        Raises:
            ValueError: the step's sequences cannot be shared out evenly.
        """
        at_once = self.model.batch * world
        if self.sequences % at_once:
            raise ValueError(
                f"{self.sequences} sequences a step cannot be shared among {world} ranks in batches of "
                f"{self.model.batch}: take a number of ranks, or a --batch, whose product divides {self.sequences}"
            )
        return self.sequences // at_once

    @property
    def shrunk(self) -> Scale:
        """The same, so small that a few seconds on a CPU show whether everything runs."""
        model = replace(self.model, width=64, depth=2, length=32, batch=2)
        return replace(self, model=model, sequences=8, tokens=8 * 32 * 8, points=4, windows=4)


SCALES = {
    scale.name: scale
    for scale in (
        Scale("small", Size(512, 6, vocab=BYTES), tokens=100e6, sequences=64, lr=2e-3),
        Scale("150m", Size(768, 12, vocab=VOCAB), tokens=15e9, sequences=256, lr=1e-3),
        Scale("300m", Size(1024, 16, vocab=VOCAB), tokens=15e9, sequences=256, lr=1e-3),
    )
}
"""The paper's are 150M over 15 B tokens, and 300M. Widths, depths, vocabulary, steps and learning rates are a choice of
ours, and so is the 300M model's number of tokens: its text was not at hand."""
