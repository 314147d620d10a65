"""T: over how many terms the loss of the step under way is a mean."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lotion_fx.residuals import Residuals


@dataclass
class LossCount:
    """What is counted where backward passes begin.

    Attributes:
        counted: by the passes that gave weights a gradient, 0-d; None if there were none since the last step.
        elsewhere: by all others, as an attack on the inputs, gradients that are looked at, or taken by hand.
        is_used: whether an optimizer took ``counted``; then the next of these passes begins a new one.
        rows: of the outputs of each forward since, as far as they have rows.
        passes: backward passes in ``counted``.
        residuals: what the gradients at the outputs told, which is forgotten with it.
    """

    counted: Tensor | None = None
    elsewhere: Tensor | None = None
    is_used: bool = False
    rows: list[int] = field(default_factory=list)
    passes: int = 0
    residuals: Residuals = field(default_factory=Residuals)

    @property
    def value(self) -> Tensor | None:
        """T of the step under way. What is counted elsewhere is that of a loop that hands gradients over by itself."""
        is_told = self.counted is not None and not self.is_used
        return self.counted if is_told or self.elsewhere is None else self.elsewhere

    def gave(self, rows: int) -> None:
        """A forward gave an output of so many rows, to which gradients may come."""
        self.rows.append(rows)

    def add(self, count: Tensor, *, to_gradients: bool) -> None:
        """One backward pass counted so many. A row that several passes through one graph come to is one loss term."""
        if to_gradients:
            self.counted = count if self.counted is None or self.is_used else self.counted + count
            self.is_used, self.passes = False, self.passes + 1
            if self.passes > len(self.rows) > 0:
                self.counted = self.counted.clamp(max=sum(self.rows))
        else:
            self.elsewhere = count if self.elsewhere is None else self.elsewhere + count

    def keep(self, factor: Tensor) -> None:
        """Forgets all if the factor, 0-d, is not 1 but 0."""
        self.counted = None if self.counted is None else self.counted * factor
        self.residuals.keep(factor)

    def forget(self) -> None:
        """No step is to come of what was counted."""
        self.counted = self.elsewhere = None
        self.rows, self.passes = [], 0
        self.residuals.forget()

    def was_used(self) -> None:
        """An optimizer took it. One more may, of the same passes."""
        self.counted, self.elsewhere, self.is_used = self.value, None, True
        self.rows, self.passes = [], 0
