"""What a setting is: a model, its data, and how it is trained and evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer


class Setting(Protocol):
    """One of the table's settings.

    Args:
        steps: of one training.
        windows: held out, over which a loss is the mean.
        inner: what compiles the training graphs.
        name: what the log calls it.
        pretrained: `make` gives a trained model, which is full precision's; every recipe starts from it and has all
            the steps, whatever it would train plainly before.
        likelihood: of the model's output, where the loss says nothing at full precision's weights, or None.
        left_out: recipes that make no sense here.
    """

    steps: int
    windows: int
    inner: str

    @property
    def name(self) -> str: ...
    @property
    def pretrained(self) -> bool: ...
    @property
    def likelihood(self) -> str | None: ...
    @property
    def left_out(self) -> frozenset[str]: ...
    @property
    def conditions(self) -> dict[str, Any]:
        """What a run depends on besides its recipe."""

    def arguments(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Of `lotion_fx.transform`, for a recipe's."""

    def make(self, seed: int) -> nn.Module:
        """The model as it is before training; sets torch's seed."""

    def optimizer(self, parameters: Iterable[Any]) -> Optimizer: ...
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor: ...
    def fit(
        self,
        model: nn.Module,
        seed: int,
        optimizer: Optimizer,
        begin: int,
        after_step: Callable[[int], None],
        teacher: nn.Module | None = None,
        taught_from: int = 0,
    ) -> float:
        """Trains a model in place from the step ``begin`` to the end, and gives the seconds that this took.

        Args:
            teacher: whose outputs the steps after ``taught_from`` learn in place of the targets.
        """

    def calibration(self, seed: int, count: int = ...) -> list[tuple[Tensor, Tensor]]:
        """Training batches that a rounding sees, (inputs, targets)."""

    def evaluate(self, model: nn.Module) -> float:
        """Mean loss over the held-out windows, in ``eval()``."""
