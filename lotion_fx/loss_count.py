"""T: over how many terms the loss of the step under way is a mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from lotion_fx import private_ranks
from lotion_fx.residuals import Residuals
from lotion_fx.shards import summed


@dataclass
class LossCount:
    """What is counted where backward passes begin.

    Attributes:
        counted: by the passes that gave weights a gradient, 0-d; None if there were none since the last step.
        elsewhere: by all others, as an attack on the inputs, gradients that are looked at, or taken by hand.
        is_used: whether an optimizer took ``counted``; then the next of these passes begins a new one.
        rows, forwards: of the outputs of the forwards since, as far as they have rows, and how many those are.
        passes, passes_elsewhere: backward passes in ``counted`` and ``elsewhere``.
        parts: the process group whose ranks have each a part of the outputs' rows; None where all have all.
        residuals: what the gradients at the outputs told, which is forgotten with it.
    """

    counted: Tensor | None = None
    elsewhere: Tensor | None = None
    is_used: bool = False
    rows: int = 0
    forwards: int = 0
    passes: int = 0
    passes_elsewhere: int = 0
    parts: Any = None
    residuals: Residuals = field(default_factory=Residuals)

    @property
    def value(self) -> Tensor | None:
        """T of the step under way. What is counted elsewhere is that of a loop that hands gradients over by itself."""
        is_told = self.counted is not None and not self.is_used
        return self.counted if is_told or self.elsewhere is None else self.elsewhere

    def gave(self, rows: int) -> None:
        """A forward gave an output of so many rows, to which gradients may come."""
        self.rows, self.forwards = self.rows + rows, self.forwards + 1

    def gave_outputs(self, outputs: Iterable[Any]) -> None:
        """A graph of a model that is divided over ranks gave these: a DTensor among them may hold some rows alone."""
        first = next((x for x in outputs if isinstance(x, DTensor) and x.requires_grad and x.ndim), None)
        if first is not None:
            dims = range(max(first.ndim - 1, 1))
            rows = [at for at, kind in enumerate(first.placements) if any(kind.is_shard(dim) for dim in dims)]
            self.parts = private_ranks.mesh_group(first.device_mesh, rows)

    def over_parts(self, count: Tensor) -> Tensor:
        """T of the outputs' rows on all ranks that have some."""
        return summed(count, self.parts)

    def add(self, count: Tensor, *, to_gradients: bool) -> None:
        """One backward pass counted so many. A row that several passes through one graph come to is one loss term."""
        if to_gradients:
            self.counted = count if self.counted is None or self.is_used else self.counted + count
            self.is_used, self.passes = False, self.passes + 1
            if self.passes > self.forwards > 0:
                self.counted = self.counted.clamp(max=self.rows)
        else:
            self.elsewhere = count if self.elsewhere is None else self.elsewhere + count
            self.passes_elsewhere += 1
            if self.passes_elsewhere > self.forwards > 0:
                self.elsewhere = self.elsewhere.clamp(max=self.rows)

    def keep(self, factor: Tensor) -> None:
        """Forgets all if the factor, 0-d, is not 1 but 0."""
        self.counted = None if self.counted is None else self.counted * factor
        self.residuals.keep(factor)

    def forget(self) -> None:
        """No step is to come of what was counted."""
        self.counted = self.elsewhere = None
        self.rows = self.forwards = self.passes = self.passes_elsewhere = 0
        self.residuals.forget()

    def was_used(self) -> None:
        """An optimizer took it. One more may, of the same passes."""
        self.counted, self.elsewhere, self.is_used = self.value, None, True
        self.rows = self.forwards = self.passes = self.passes_elsewhere = 0
