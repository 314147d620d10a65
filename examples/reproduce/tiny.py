"""The size "tiny": the quickstart's byte-level GPT on the Python library's own source, minutes on one core."""

from __future__ import annotations

import math
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import lotion_fx
from lotion_fx.examples import quickstart
from lotion_fx.examples.forking import Checkpoint, after_plain
from lotion_fx.examples.reproduce.recipes import RECIPES, Recipe
from lotion_fx.examples.reproduce.runs import Curve, Job, Result

POINTS = 20  # of a curve, each over an eighth of the held-out windows


@dataclass(frozen=True)
class Plain:
    """A training without any quantization, from start to end.

    Args:
        states: the model at each point of the curve, by step.
        fork: where methods that begin by plain training go on from it.
        seconds: that it took.
    """

    states: dict[int, dict[str, Tensor]]
    fork: Checkpoint
    seconds: float


class Tiny:
    """Trains by one process, on the CPU. Full precision is trained once a seed: PTQ rounds its states at each format,
    and methods that begin by plain training go on from its checkpoint.

    Args:
        steps: of one training.
        windows: held out, for the losses in the end.
        inner: what compiles the training graphs.
    """

    size, device, writes = "tiny", "cpu", True
    step_tokens = quickstart.BATCH * quickstart.CONTEXT

    def __init__(self, steps: int = 600, windows: int = quickstart.WINDOWS, inner: str = "inductor") -> None:
        self.steps, self.windows, self.inner = steps, windows, inner
        self._plain: dict[int, Plain] = {}

    def conditions(self, recipe: Recipe) -> str:
        """See `Bench`."""
        return recipe.fingerprint(size=self.size, steps=self.steps, windows=self.windows, points=POINTS)

    def agreed(self, value: bool) -> bool:
        """See `Bench`."""
        return value

    def run(self, job: Job) -> Result:
        """See `Bench`."""
        if job.method == "ptq":
            return self._post_training(job)
        plain, began = self._full_precision(job.seed), time.perf_counter()
        share, arguments = after_plain(job.recipe.arguments)
        fork = plain.fork if share else None
        begin = fork.step if fork else 0
        model = self._model(job.seed, fork.model if fork else None)
        total = self.steps - begin if job.recipe.has_phases else None
        lotion_fx.transform(model, job.format, **arguments, steps=total, inner=self.inner)
        weights = list(model.parameters())
        optimizer = quickstart.adam(weights)
        if fork:
            fork.resume(optimizer, weights)
        curve = self._rounded({step: state for step, state in plain.states.items() if step <= begin}, job.format)
        seconds = self._fit(job, model, optimizer, begin, lambda step: curve.append((step, self._glance(model))))
        if not job.recipe.two_sided:
            return self._measured(model, curve, seconds)
        with lotion_fx.full_precision(model):
            latent = quickstart.evaluate(model, self._held_out)
        began = time.perf_counter()
        lotion_fx.round_(model, quickstart.calibration(self._text[0], job.seed), quickstart.cross_entropy)
        seconds += time.perf_counter() - began
        return Result(quickstart.evaluate(model, self._held_out), None, latent, curve, round(seconds, 1))

    # ------------------------------------------------------------------------------------------------ full precision

    def _full_precision(self, seed: int) -> Plain:
        if seed in self._plain:
            return self._plain[seed]
        model = lotion_fx.transform(self._model(seed), method="ptq", inner=self.inner)
        optimizer = quickstart.adam(model.parameters())
        states: dict[int, dict[str, Tensor]] = {}
        forks: list[Checkpoint] = []

        def keep(step: int) -> None:
            states[step] = {name: value.detach().clone() for name, value in model.state_dict().items()}
            if step == self._fork:
                forks.append(Checkpoint.of(step, model, optimizer))

        seconds = self._fit(Job(self.size, "fp32", "ptq", seed, ""), model, optimizer, 0, keep)
        self._plain[seed] = Plain(states, forks[0], seconds)
        return self._plain[seed]

    def _post_training(self, job: Job) -> Result:
        plain = self._full_precision(job.seed)
        curve = self._rounded(plain.states, job.format)
        model = self._model(job.seed, plain.states[self.steps])
        lotion_fx.transform(model, job.format, method="ptq", inner="aot_eager")
        return self._measured(model, curve, plain.seconds)

    # ------------------------------------------------------------------------------------------- training and measuring

    def _fit(
        self, job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, at_point: Callable[[int], None]
    ) -> float:
        """Trains to the end, and gives the seconds that this took, curve left out."""
        torch.compiler.reset()  # of graphs of one code Dynamo keeps a few
        torch.manual_seed(job.seed)  # what a run draws in training does not depend on what came before it
        label = f"{job.recipe.label}, {job.format}, seed {job.seed}"
        with tqdm(total=self.steps, initial=begin, desc=label, leave=False, disable=None) as bar:

            def after_step(step: int) -> None:
                bar.update()
                if step in self._points:
                    at_point(step)

            return quickstart.fit(
                model, job.seed, self.steps, self._text[0], after_step, optimizer=optimizer, begin=begin
            )

    @cached_property
    def _points(self) -> set[int]:
        return {self._fork, *(math.ceil(self.steps * point / POINTS) for point in range(1, POINTS + 1))}

    @property
    def _fork(self) -> int:
        """The step after which methods that begin by plain training go on from it."""
        return round(after_plain(RECIPES["round_"].arguments)[0] * self.steps)

    def _measured(self, model: nn.Module, curve: Curve, seconds: float) -> Result:
        with lotion_fx.randomized(model):  # every forward draws anew
            randomized = quickstart.evaluate(model, self._held_out)
        with lotion_fx.full_precision(model):
            latent = quickstart.evaluate(model, self._held_out)
        return Result(quickstart.evaluate(model, self._held_out), randomized, latent, curve, round(seconds, 1))

    def _glance(self, model: nn.Module) -> float:
        return quickstart.evaluate(model, self._held_out[::8])

    def _rounded(self, states: dict[int, dict[str, Tensor]], fmt: str) -> Curve:
        """The losses of states at their rounded weights, by step."""
        model, curve = lotion_fx.transform(self._model(0), fmt, method="ptq", inner="aot_eager"), []
        for step, state in states.items():
            model.load_state_dict(state)
            curve.append((step, self._glance(model)))
        return curve

    def _model(self, seed: int, state: dict[str, Tensor] | None = None) -> nn.Module:
        torch.manual_seed(seed)
        model = quickstart.GPT()
        if state is not None:
            model.load_state_dict(state)
        return model

    @cached_property
    def _text(self) -> tuple[Tensor, Tensor]:
        training, held_out = quickstart.split_files(quickstart.source_files(Path(sysconfig.get_paths()["stdlib"])))
        return quickstart.tokens(training), quickstart.tokens(held_out)

    @cached_property
    def _held_out(self) -> Tensor:
        return quickstart.spread_windows(self._text[1], self.windows)
