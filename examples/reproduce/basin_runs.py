"""The trainings of the basin experiment, and what is measured of each: plain data for its tables and plots."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import lotion_fx
from lotion_fx.examples.reproduce.basin_tasks import Task

GROWTH = 0.1  # nats above the full-precision loss: where the basin ends
METHODS = ("ste", "lotion", "lotion_finish")
FINISH = 0.4  # the share of "lotion_finish" that runs at rounded weights
ROUNDING_BATCHES = 4
Point = dict[str, Tensor]  # all parameters of a model, by name


@dataclass(frozen=True)
class Size:
    """How long a run takes.

    Args:
        plain, tuned: steps of the plain training, and of what goes on from it by each method.
        looks: how often the cosines are taken after its beginning.
        grid: points of a slice's side.
        inner: what compiles the training graphs.
    """

    plain: int
    tuned: int
    looks: int
    grid: int
    inner: str


@dataclass(frozen=True)
class Row:
    """One deployed solution.

    Args:
        solution: ``"ptq"`` and ``"round_"`` of the full-precision weights, or one of `METHODS`.
        loss, held_out: at the rounded weights, on the sample of the training data and on what was kept back, in nats.
        full: of the full-precision solution on that sample.
        latent: at the solution's own weights before rounding.
        edge: the share of the way to the rounded weights at which the loss is `GROWTH` above the latent one.
        width: of the basin along random directions, in roundings.
        ste, term, lotion, chance: cosines with the way back, as of `lotion_fx.Diagnosis`.
        line: (t, loss) from the latent weights, 0, to the rounded, 1, and beyond.
    """

    task: str
    fmt: str
    seed: int
    solution: str
    loss: float
    held_out: float
    full: float
    latent: float
    edge: float
    width: float
    ste: float
    term: float
    lotion: float
    chance: float
    line: tuple[tuple[float, float], ...]

    @property
    def above(self) -> float:
        """Of the loss, above full precision's."""
        return self.loss - self.full

    @property
    def inside(self) -> bool:
        return self.above <= GROWTH


@dataclass(frozen=True)
class Look:
    """Cosines with the way back after a step of the training by one method, and the loss at the rounded weights."""

    task: str
    fmt: str
    seed: int
    method: str
    step: int
    ste: float
    term: float
    lotion: float
    chance: float
    above: float


@dataclass(frozen=True)
class Slice:
    """The loss on the plane through the full-precision weights, PTQ's and another solution's.

    Args:
        solution: which that is.
        x, y: of the grid, in lengths of the rounding to nearest; the full-precision weights are at 0, PTQ's at (1, 0).
        losses: above full precision's, a row for each y.
        at: where the solution lies; the plane holds it.
    """

    task: str
    fmt: str
    solution: str
    x: list[float]
    y: list[float]
    losses: list[list[float]]
    at: tuple[float, float]


@dataclass
class Found:
    """All that was measured."""

    rows: list[Row] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)


def train(task: Task, model: nn.Module, steps: int, seed: int, rate: float, after: Callable[[int], None]) -> None:
    """Adam, the rate falling to zero along a cosine; ``after`` is called with the number of each step."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, (inputs, targets) in zip(range(1, steps + 1), task.batches(seed), strict=False):
        optimizer.zero_grad()
        task.loss(model(inputs), targets).backward()
        optimizer.step()
        schedule.step()
        after(step)


class Seed:
    """One seed of one task: a plain training, and what goes on from its end.

    Args:
        tick: called after each training, for a progress bar.
    """

    def __init__(self, task: Task, seed: int, size: Size, found: Found, tick: Callable[[], None]) -> None:
        self.task, self.seed, self.size, self.found, self.tick = task, seed, size, found, tick
        torch.manual_seed(seed)
        self.plain = task.build()
        train(task, self.plain, size.plain, seed, task.rate, lambda step: None)
        # As many steps as the methods take from here, so that none has seen more than full precision.
        self.full = copy.deepcopy(self.plain)
        train(task, self.full, size.tuned, 1000 + seed, task.rate / 3, lambda step: None)
        self.loss = self.loss_at(_point(self.full), task.sample)
        tick()

    @torch.no_grad()
    def loss_at(self, point: Mapping[str, Tensor], data: tuple[Tensor, Tensor]) -> float:
        """The loss of a plain model with these parameters."""
        return float(self.task.loss(torch.func.functional_call(self.plain, dict(point), data[0]), data[1]))

    def under(self, model: nn.Module, fmt: str, method: str) -> nn.Module:
        """A transformed copy."""
        options: dict[str, Any] = {"method": method}
        if method == "lotion_finish":
            options = {"method": "lotion", "finish": FINISH, "steps": self.size.tuned}
        return lotion_fx.transform(copy.deepcopy(model), fmt, **options, inner=self.size.inner)

    def run(self, fmt: str, looked: bool, sliced: bool) -> None:
        """All solutions in one format."""
        ptq = self.under(self.full, fmt, "ptq")
        rounded = self.two_sided(ptq)
        seen = self.seen(ptq, rounded=rounded)
        assert seen.rounded is not None
        full, nearest = _point(self.full), self.deployed(ptq)
        self.add(fmt, "ptq", seen, seen.nearest, nearest)
        self.add(fmt, "round_", seen, seen.rounded, {**full, **rounded})
        for method in METHODS:
            model = self.tuned(fmt, method, looked and method != "lotion_finish")
            seen, deployed = self.seen(model), self.deployed(model)
            self.add(fmt, method, seen, seen.nearest, deployed)
            if sliced and method != "lotion_finish":
                self.found.slices.append(self.slice(fmt, method, full, nearest, deployed))
            self.tick()

    def seen(self, model: nn.Module, **options: Any) -> lotion_fx.Diagnosis:
        return lotion_fx.diagnose(model, self.task.sample, self.task.loss, growth=GROWTH, **options)

    def two_sided(self, model: nn.Module) -> Point:
        """The weights rounded by `round_`."""
        copied = copy.deepcopy(model)
        given = [batch for batch, _ in zip(self.task.batches(5000 + self.seed), range(ROUNDING_BATCHES), strict=False)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where it ends above rounding to nearest the table shows it
            lotion_fx.round_(copied, given, self.task.loss)
        return {name: p.detach() for name, p in copied.named_parameters() if name in lotion_fx.quantized(model)}

    def deployed(self, model: nn.Module) -> Point:
        """All parameters, the quantized ones rounded to nearest."""
        return {**_point(model), **{name: w.dequantize() for name, w in lotion_fx.quantized(model).items()}}

    def tuned(self, fmt: str, method: str, looked: bool) -> nn.Module:
        """Trained on from the plain training's end, and perhaps looked at on the way."""
        model = self.under(self.plain, fmt, method)
        tuned, looks = self.size.tuned, self.size.looks
        at = {0, *(round(tuned * (i / looks) ** 2) for i in range(1, looks + 1))} if looked else set()

        def look(step: int) -> None:
            if step not in at:
                return
            seen = self.seen(model, times=(), samples=2, directions=2)
            on = seen.nearest.over_all
            where = (self.task.name, fmt, self.seed, method, step)
            above = seen.nearest.loss - self.loss
            self.found.looks.append(Look(*where, on.ste, on.term, on.lotion, seen.by_chance[0], above))

        look(0)
        train(self.task, model, tuned, 1000 + self.seed, self.task.rate / 3, look)
        return model

    def add(
        self, fmt: str, solution: str, seen: lotion_fx.Diagnosis, rounded: lotion_fx.RoundingDiagnosis, deployed: Point
    ) -> None:
        on = rounded.over_all
        self.found.rows.append(
            Row(
                self.task.name, fmt, self.seed, solution, rounded.loss, self.loss_at(deployed, self.task.held_out),
                self.loss, seen.latent, rounded.edge, seen.width, on.ste, on.term, on.lotion, seen.by_chance[0],
                rounded.line,
            )
        )  # fmt: skip

    def slice(self, fmt: str, solution: str, full: Point, nearest: Point, other: Point) -> Slice:
        """The plane's axes: the way to PTQ's weights, and the part of the way to the others that is orthogonal."""
        across = {name: nearest[name] - full[name] for name in full}
        length = _inner(across, across) ** 0.5
        away = {name: other[name] - full[name] for name in full}
        along = _inner(away, across) / length**2
        up = {name: away[name] - along * across[name] for name in full}
        height = _inner(up, up) ** 0.5
        up = {name: value * (length / height) for name, value in up.items()}
        x, y = (_grid(0.0, 1.0, along, self.size.grid), _grid(0.0, 0.0, height / length, self.size.grid))
        losses = [
            [
                self.loss_at({n: full[n] + a * across[n] + b * up[n] for n in full}, self.task.sample) - self.loss
                for a in x
            ]
            for b in y
        ]
        return Slice(self.task.name, fmt, solution, x, y, losses, (along, height / length))


def _grid(*at: float | int) -> list[float]:
    """Even steps over the given places and a third more on both sides; the last argument is how many."""
    *places, count = at
    least, most = min(places), max(places)
    margin = (most - least) / 3
    return torch.linspace(least - margin, most + margin, int(count)).tolist()


def _point(model: nn.Module) -> Point:
    return {name: p.detach() for name, p in model.named_parameters()}


def _inner(a: Point, b: Point) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)
