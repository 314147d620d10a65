"""The setting "text": the quickstart's byte-level GPT, trained from scratch on the Python library's own source."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lotion_fx
from accuracy.recipes import RECIPES
from lotion_fx.examples import quickstart


@dataclass(frozen=True)
class Text:
    """The quickstart's model, data, optimizer and learning rates.

    Args:
        steps: of one training.
        windows: held out, each of the model's context.
        inner: what compiles the training graphs.
    """

    steps: int = 600
    windows: int = 2048
    inner: str = "inductor"
    name: str = "text"
    pretrained: bool = False
    likelihood: str | None = None
    left_out: frozenset[str] = frozenset(name for name, recipe in RECIPES.items() if recipe.rounded_first)

    @property
    def conditions(self) -> dict[str, Any]:
        """What a run depends on besides its recipe."""
        return {
            "setting": self.name,
            "steps": self.steps,
            "windows": self.windows,
            "calibration": quickstart.CALIBRATION,
        }

    def arguments(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        return dict(recipe)

    @cached_property
    def _text(self) -> tuple[Tensor, Tensor]:
        root = Path(sysconfig.get_paths()["stdlib"])
        training, validation = quickstart.split_files(quickstart.source_files(root))
        return quickstart.tokens(training), quickstart.tokens(validation)

    def make(self, seed: int) -> nn.Module:
        """The model as it is before training; sets torch's seed."""
        torch.manual_seed(seed)
        return quickstart.GPT()

    def optimizer(self, parameters: Iterable[Any]) -> Optimizer:
        return quickstart.adam(parameters)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return quickstart.cross_entropy(outputs, targets)

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
        """As `Setting` has it; the teacher's part is the divergence from its outputs."""

        def loss_of(model: nn.Module, batch: Tensor, step: int) -> Tensor:
            outputs = model(batch[:, :-1])
            if teacher is None or step <= taught_from:
                return self.loss(outputs, batch[:, 1:])
            with torch.no_grad():
                known = teacher(batch[:, :-1])
            return lotion_fx.distillation_loss(outputs, known)

        text = self._text[0]
        return quickstart.fit(
            model, seed, self.steps, text, after_step, optimizer=optimizer, begin=begin, loss_of=loss_of
        )

    def calibration(self, seed: int, count: int = quickstart.CALIBRATION) -> list[tuple[Tensor, Tensor]]:
        """Batches of the training text that a rounding sees, (inputs, targets)."""
        return quickstart.calibration(self._text[0], seed, count)

    def evaluate(self, model: nn.Module) -> float:
        """Mean loss over the held-out windows, nats per byte, in ``eval()``."""
        return quickstart.evaluate(model, quickstart.spread_windows(self._text[1], self.windows))
