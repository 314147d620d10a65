"""Trained models, kept in files: each full-precision run and what goes on from its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import lotion_fx
from accuracy.deployment import formats, holding, rounded
from accuracy.lsq import deployed_state, learn_scales, rate, scales_of
from accuracy.recipes import RECIPES, REST, Recipe, scale_rate
from accuracy.setting import Setting
from lotion_fx.examples.forking import Checkpoint, after_plain
from lotion_fx.examples.runlog import fingerprint
from lotion_fx.numerics.searched import clipped

State = dict[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Args:
        state: the model's state dict; its weights are latent.
        latent: the loss at those.
        deployed: the loss at the weights that are deployed, where `lotion_fx` does not make them of the latent ones.
        seconds: that the training took after its fork, compilation included.
    """

    state: State
    latent: float
    deployed: float | None
    seconds: float


class Trainings:
    """Trains each model of a setting once, and keeps it.

    Args:
        setting: what is trained.
        folder: of the files; those that are there already are taken as they are.
    """

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting, self.folder = setting, folder
        folder.mkdir(parents=True, exist_ok=True)

    # ---------------------------------------------------------------------------------------------------- what is kept

    def trained(self, name: str, fmt: str, seed: int) -> Trained:
        """The model of a recipe."""
        recipe = RECIPES[name]
        if recipe.fork == 1:
            return self.full_precision(seed)
        label = f"{name}-{recipe.fingerprint(**self.setting.conditions)}-{fmt.replace('/', '_')}-seed{seed}"
        train = self._learned if recipe.learned else self._transformed
        return Trained(**self._kept(label, lambda: vars(train(recipe, fmt, seed))))

    def full_precision(self, seed: int) -> Trained:
        """The run that all others are paired with: plain training from start to end."""
        return Trained(**self._full_run(seed)["end"])

    def rounded(self, state: State, fmt: str, rounding: str, seed: int, name: str) -> tuple[nn.Module, float]:
        """As `deployment.rounded` has it; of full precision's own weights it is kept, if nearest leaves it as it is."""
        if RECIPES[name].fork != 1 or rounding in ("nearest", "adaround"):
            return rounded(self.setting, state, fmt, rounding, seed)
        label = (
            f"rounded-{fingerprint(rounding=rounding, **self.setting.conditions)}-{fmt.replace('/', '_')}-seed{seed}"
        )

        def make() -> dict[str, Any]:
            model, seconds = rounded(self.setting, state, fmt, rounding, seed)
            return {"state": dict(model.state_dict()), "seconds": seconds}

        kept = self._kept(label, make)
        return rounded(self.setting, kept["state"], fmt, "nearest", seed)[0], kept["seconds"]

    def _full_run(self, seed: int) -> dict[str, Any]:
        forks = {self._begin(recipe) for recipe in RECIPES.values() if 0 < recipe.fork < 1}
        plain = RECIPES["ptq"].fingerprint(**self.setting.conditions, forks=sorted(forks))
        return self._kept(f"full_precision-{plain}-seed{seed}", lambda: self._train_full(seed, forks))

    def _kept(self, label: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / f"{label}.pt"
        if path.exists():
            return torch.load(path, weights_only=True)
        made = make()
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(made, partial)
        partial.replace(path)  # at once: a killed process leaves no half file
        return made

    # ------------------------------------------------------------------------------------------------------- trainings

    def _begin(self, recipe: Recipe) -> int:
        """The step from which on a recipe trains by itself."""
        return 0 if self.setting.pretrained else round(recipe.fork * self.setting.steps)

    def _train_full(self, seed: int, wanted: set[int]) -> dict[str, Any]:
        """The end of plain training, and the model and the optimizer's state at each of the wanted steps."""
        forks: dict[int, dict[str, Any]] = {}
        if self.setting.pretrained:
            return {"end": vars(self._ended(self.setting.make(seed).state_dict(), 0.0)), "forks": forks}
        model = lotion_fx.transform(self.setting.make(seed), method="ptq", inner=self.setting.inner)
        optimizer = self.setting.optimizer(model.parameters())

        def keep(step: int) -> None:
            if step in wanted:
                forks[step] = vars(Checkpoint.of(step, model, optimizer))

        seconds = self._fit("full precision", model, seed, optimizer, 0, keep)
        return {"end": vars(self._ended(model.state_dict(), seconds)), "forks": forks}

    def _transformed(self, recipe: Recipe, fmt: str, seed: int) -> Trained:
        """What `lotion_fx.transform` trains, from the recipe's fork on."""
        begin = self._begin(recipe)
        fork = self._fork(begin, seed) if begin else None
        model = holding(self.setting, fork.model) if fork else self.setting.make(seed)
        if recipe.rounded_first:
            start, _ = self.rounded(model.state_dict(), fmt, recipe.rounded_first, seed, "ptq")
            model.load_state_dict(start.state_dict())
            for name in lotion_fx.quantized(start) if recipe.held and not recipe.trains_scales else ():
                model.get_parameter(name).requires_grad_(False)
        for name, form in formats(self.setting, model.state_dict(), fmt).items() if recipe.clipped else ():
            model.get_parameter(name).data.copy_(clipped(model.get_parameter(name).detach(), form, -1))
        total = self.setting.steps - begin if recipe.has_phases else None
        arguments = self.setting.arguments(after_plain(recipe.arguments)[1])
        lotion_fx.transform(model, fmt, **arguments, steps=total, inner=self.setting.inner)
        weights = list(model.parameters())
        scaled = [model.get_parameter(name) for name in lotion_fx.quantized(start)] if recipe.trains_scales else []
        optimizer = self.setting.optimizer(weights if not scaled else _groups(weights, scaled))
        rates = (REST, scale_rate(lotion_fx.resolve(fmt))) if recipe.held else ()
        for group, factor in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] *= factor
        if fork:
            fork.resume(optimizer, weights)
        taught: dict[str, Any] = {}
        if recipe.distills:
            teacher = holding(self.setting, self.full_precision(seed).state)
            taught = {"teacher": teacher, "taught_from": round(recipe.first_share * self.setting.steps)}
        seconds = self._fit(f"{fmt}, {recipe.label}", model, seed, optimizer, begin, lambda _: None, **taught)
        return self._ended(model.state_dict(), seconds)

    def _learned(self, recipe: Recipe, fmt: str, seed: int) -> Trained:
        """LSQ from the recipe's fork on, under plain `torch.compile`."""
        begin = self._begin(recipe)
        fork = self._fork(begin, seed) if begin else None
        model = holding(self.setting, fork.model) if fork else self.setting.make(seed)
        latent = dict(model.named_parameters())
        learn_scales(model, formats(self.setting, model.state_dict(), fmt), searched=recipe.clipped)
        trained = [parameter for parameter in latent.values() if parameter.requires_grad]
        optimizer = self.setting.optimizer([{"params": trained}, {"params": scales_of(model)}])
        optimizer.param_groups[1]["lr"] *= rate(lotion_fx.resolve(fmt))
        if fork:
            fork.resume(optimizer, latent.values())
        model.compile(backend=self.setting.inner)
        seconds = self._fit(f"{fmt}, {recipe.label}", model, seed, optimizer, begin, lambda _: None)
        ended = self._ended(latent, seconds)  # before the latent weights are rounded in place
        return replace(ended, deployed=self.setting.evaluate(holding(self.setting, deployed_state(model))))

    def _ended(self, state: Mapping[str, Tensor], seconds: float) -> Trained:
        kept = {name: value.detach().clone() for name, value in state.items()}
        return Trained(kept, self.setting.evaluate(holding(self.setting, kept)), None, seconds)

    def _fork(self, step: int, seed: int) -> Checkpoint:
        return Checkpoint(**self._full_run(seed)["forks"][step])

    def _fit(
        self,
        label: str,
        model: nn.Module,
        seed: int,
        optimizer: Optimizer,
        begin: int,
        after_step: Callable[[int], None],
        **taught: Any,
    ) -> float:
        torch.compiler.reset()  # of graphs of one code Dynamo keeps a few
        torch.manual_seed(seed)  # what a run draws in training does not depend on what came before it
        with tqdm(total=self.setting.steps - begin, desc=f"{label}, seed {seed}", leave=False, disable=None) as bar:

            def step_ended(step: int) -> None:
                bar.update()
                after_step(step)

            return self.setting.fit(model, seed, optimizer, begin, step_ended, **taught)


def _groups(parameters: Iterable[Tensor], apart: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Those that are trained in a group for an optimizer, those apart in another."""
    apart = dict.fromkeys(apart)
    rest = [parameter for parameter in parameters if parameter.requires_grad and parameter not in apart]
    return [{"params": rest}, {"params": list(apart)}]
