"""`diagnose`: where the rounded weights lie in the basin of the loss, and which gradients lead back inside.

After "Understanding Quantization-Aware Training: Gradients at Quantized Weights Bias to the Low-Loss Basin" (Li, Ma,
Cui 2026, arXiv 2606.09012): the loss is flat around the weights that full precision trains, rounding may step over the
basin's edge, and the gradient that a straight-through estimator takes there has a part that leads back.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from lotion_fx.estimate import Estimate, estimate
from lotion_fx.loss_graph import LossFunction
from lotion_fx.scalars import check_count, check_generator, check_number
from lotion_fx.switches import switched
from lotion_fx.vanishing import tell_of_unknown, unknown

TIMES = tuple(step / 8 for step in range(-4, 13))
"""Where on the way from the weights (0) to the rounded ones (1) the loss is taken."""
FAR = 16.0  # lengths of a rounding; a basin that is wider is as good as without an edge
_FIRST, _HALVINGS = 1 / 16, 8  # the search for the edge: where it begins to double, and how often it then halves

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Cosines:
    """Of steps downhill with the way back inside, from the rounded weights to the latent ones: ``w - Q``.

    1 leads straight back, 0 neither in nor out, -1 straight out; nan where either has no length.

    Args:
        length: of the rounding, ``|Q - w|``.
        ste: of ``-grad L(Q)``, which straight-through training follows.
        latent: of ``-grad L(w)``, which training in full precision follows.
        term: of the expected-loss term's step, ``-grad 1/2 <h, sigma^2(w)>``, at ``strength`` 1.
        lotion: of the sum of these last two, which LOTION follows.
    """

    length: float
    ste: float
    latent: float
    term: float
    lotion: float


@dataclass(frozen=True)
class RoundingDiagnosis:
    """One rounding of the weights.

    Args:
        loss: there.
        edge: the share of the way to it at which the loss has grown by `Diagnosis.growth`; inf if not within 16 times
            the way. Above 1 the rounding stays inside.
        line: (t, loss) at ``w + t (Q - w)``.
        cosines: of each weight alone.
        over_all: of all weights together.
    """

    loss: float
    edge: float
    line: tuple[tuple[float, float], ...]
    cosines: Mapping[str, Cosines]
    over_all: Cosines


@dataclass(frozen=True)
class Diagnosis:
    """Where a model's rounded weights lie. ``str()`` is a table, ``to_dict()`` for machines.

    Args:
        latent: the loss at the weights themselves.
        growth: of the loss, at which the basin ends, in the loss's units.
        nearest: rounded to nearest, as the model is in ``eval()``.
        rounded: rounded as given; None if nothing was.
        randomized: (mean, standard error) of the loss under randomized rounding; None where the noise law rounds to
            nothing.
        widths: of the basin along random directions, in lengths of the rounding to nearest: each weight's step is as
            long as its own rounding. inf beyond 16.
        by_chance: (mean, standard error) of the cosine of ``-grad L`` with the way back after those random steps: what
            `Cosines.ste` is without quantization.
    """

    latent: float
    growth: float
    nearest: RoundingDiagnosis
    rounded: RoundingDiagnosis | None
    randomized: tuple[float, float] | None
    widths: tuple[float, ...]
    by_chance: tuple[float, float]

    @property
    def width(self) -> float:
        """The median of ``widths``."""
        return statistics.median(self.widths)

    def stays_inside(self, rounded: RoundingDiagnosis) -> bool:
        """Whether a rounding's loss is within ``growth`` of the latent weights'."""
        return rounded.loss - self.latent <= self.growth

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries."""
        return {**asdict(self), "width": self.width}

    def __str__(self) -> str:
        both = {"to nearest": self.nearest, **({"as given": self.rounded} if self.rounded else {})}
        headers = ["rounding", "parameter", "length", "-grad L(Q)", "-grad L(w)", "term", "LOTION"]
        rows = []
        for how, rounded in both.items():
            for name, each in [*rounded.cosines.items(), ("all", rounded.over_all)]:
                cosines = (each.ste, each.latent, each.term, each.lotion)
                rows.append([how, name, f"{each.length:.3g}", *(f"{cosine:+.2f}" for cosine in cosines)])
        lines = ["cosines with the way back inside, w - Q:", tabulate(rows, headers, disable_numparse=True)]
        lines.append(f"by chance, after random steps of a rounding's length: {_pair(self.by_chance)}")
        lines.append(f"loss {self.latent:.6g} at the weights; the basin ends {self.growth:.4g} above")
        for how, rounded in both.items():
            where = "inside" if self.stays_inside(rounded) else "outside"
            if not rounded.over_all.length:
                lines.append(f"rounded {how}: the weights lie on their levels already, and there is no way back")
                continue
            lines.append(f"rounded {how}: loss {rounded.loss:.6g}, {where}; edge at {rounded.edge:.2g} of the way")
        if self.randomized is None:
            lines.append("randomized rounding: none, for the noise law is of no random rounding")
        else:
            lines.append(f"randomized rounding: loss {_pair(self.randomized)}")
        lines.append(f"width along random directions: {self.width:.2g} roundings (median of {len(self.widths)})")
        return "\n".join(lines)


def _pair(found: tuple[float, float]) -> str:
    return f"{found[0]:.4g} ± {found[1]:.1g}"


def diagnose(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None = None,
    *,
    rounded: Weights | None = None,
    growth: float | None = None,
    times: Sequence[float] = TIMES,
    samples: int = 8,
    directions: int = 8,
    generator: torch.Generator | None = None,
) -> Diagnosis:
    """Where a transformed model's rounded weights lie in the basin of its loss, on one batch.

    The model runs in ``eval()`` mode, uncompiled, and is left as it is. The term's curvature is that of this batch.

    Args:
        model: transformed; it need not have run yet.
        batch, loss_fn: as `expected_loss` takes them.
        rounded: another rounding of the weights, by their names, to see beside that to nearest: the parameters of a
            copy of the model after `round_`. Weights that are not named, or not quantized, stay out of it.
        growth: of the loss, at which the basin ends, in the loss's units; by default a tenth of the loss.
        times: where on the way from the weights (0) to the rounded ones (1) and beyond the loss is taken.
        samples: randomized roundings, 2 or more.
        directions: random ones, 2 or more, that the basin's width is taken along.
        generator: of both; by default always the same draws.

    Raises:
        ValueError: the model is not under lotion_fx, is sharded, or has no quantized weight; the batch or the loss is
            not as above; ``rounded`` names a weight that is not there, or has another shape; no ``growth``, and a loss
            that is not above 0.
    """
    check_count("samples", samples, 2, "the number of randomized roundings, 2 or more")
    check_count("directions", directions, 2, "the number of random directions, 2 or more")
    check_generator(generator)
    if not isinstance(times, Iterable):
        raise TypeError(f"times={times!r}: expected numbers, such as {TIMES}")
    for t in times:
        check_number("times", t, math.isfinite, "finite numbers, 0 at the weights and 1 at the rounded ones")
    if growth is not None:
        check_number("growth", growth, lambda x: 0 < x < math.inf, "an increase of the loss above 0")
    with switched(model, plain=True), torch.no_grad():
        found = estimate(model, batch, loss_fn, "off")
        tell_of_unknown("diagnose, whose cosines have no part of it", unknown(found.graph.steps, found.weights))
        landscape = _Landscape(found)
        bound = _growth(landscape.loss({})) if growth is None else float(growth)
        nearest = {name: weight.quantizer.rtn(landscape.at[name]) for name, weight in found.weights.items()}
        draw = generator or torch.Generator(next(iter(nearest.values())).device).manual_seed(0)
        spread = [landscape.random_step(nearest, draw) for _ in range(directions)]
        chances = [landscape.cosine(step, landscape.downhill(step), list(step)) for step in spread]
        return Diagnosis(
            latent=landscape.loss({}),
            growth=bound,
            nearest=landscape.seen_at(nearest, bound, times),
            rounded=None if rounded is None else landscape.seen_at(_checked(rounded, nearest), bound, times),
            randomized=_randomized(found, samples, draw),
            widths=tuple(_edge(landscape.along(step), bound) for step in spread),
            by_chance=_mean(chances),
        )


def _growth(loss: float) -> float:
    if not loss > 0:
        raise ValueError(f"growth=None: it is a tenth of the loss, which is {loss:.4g} here; pass a number above 0")
    return 0.1 * loss


def _checked(rounded: Weights, nearest: Weights) -> Weights:
    """Those of the given weights that are quantized here, detached."""
    if not isinstance(rounded, Mapping):
        raise TypeError(f"rounded={type(rounded).__name__}: expected a mapping of names to tensors")
    kept = {name: rounded[name].detach().to(own) for name, own in nearest.items() if name in rounded}
    if not kept:
        raise ValueError(
            f"rounded: it names none of the quantized weights {', '.join(list(nearest)[:4])}; pass "
            "dict(copy.named_parameters()) of a copy of the model after round_"
        )
    for name, value in kept.items():
        if value.shape != nearest[name].shape:
            raise ValueError(
                f"rounded[{name!r}] has shape {tuple(value.shape)}; expected the weight's, {tuple(nearest[name].shape)}"
            )
    return kept


def _randomized(found: Estimate, samples: int, draw: torch.Generator) -> tuple[float, float] | None:
    if not all(weight.quantizer.noise.rounds for weight in found.weights.values()):
        return None
    increase, error = found.sample(list(found.weights), samples, draw)
    return found.latent + increase, error


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    spread = torch.tensor(values, dtype=torch.float64)  # which knows nan, as the statistics module does not
    return float(spread.mean()), float(spread.std()) / math.sqrt(len(values))


def _edge(loss_at: Callable[[float], float], growth: float) -> float:
    """The first t at which a loss has grown so far from t = 0, to a 4096th part; inf if not up to `FAR`."""
    start, outside = loss_at(0.0), _FIRST
    # A loss that is no number is outside: the comparison is False.
    while loss_at(outside) - start < growth:
        outside *= 2
        if outside > FAR:
            return math.inf
    inside = outside / 2 if outside > _FIRST else 0.0
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if loss_at(middle) - start < growth else (inside, middle)
    return (inside + outside) / 2


class _Landscape:
    """The loss around the latent weights, and the steps that training takes there.

    Args:
        at: the latent weights.
    """

    def __init__(self, found: Estimate) -> None:
        self.found = found
        self.at = {name: found.graph.parameters[name].detach() for name in found.weights}
        self.descent = self.downhill({})
        self.term = {
            name: -0.5 * weight.quantizer.variance_vjp(self.at[name], found.curvatures[name]).to(self.at[name].dtype)
            for name, weight in found.weights.items()
            if found.curvatures[name].dim()
        }

    def loss(self, steps: Weights) -> float:
        """At the latent weights plus steps."""
        return float(self.found.graph.loss({name: self.at[name] + step for name, step in steps.items()}))

    def along(self, steps: Weights) -> Callable[[float], float]:
        return lambda t: self.loss({name: t * step for name, step in steps.items()})

    def downhill(self, steps: Weights) -> dict[str, Tensor]:
        """``-grad L`` there, of the weights that the loss depends on."""
        there = {name: (w + steps.get(name, 0)).requires_grad_() for name, w in self.at.items()}
        with torch.enable_grad():
            grads = torch.autograd.grad(self.found.graph.loss(there), list(there.values()), allow_unused=True)
        return {name: -grad for name, grad in zip(there, grads, strict=True) if grad is not None}

    def random_step(self, nearest: Weights, draw: torch.Generator) -> dict[str, Tensor]:
        """A step in a random direction, of each weight as long as its rounding."""
        steps = {}
        for name, q in nearest.items():
            noise = torch.randn(q.shape, generator=draw, dtype=torch.float32, device=q.device).to(q.dtype)
            steps[name] = noise * ((q - self.at[name]).norm() / noise.norm())
        return steps

    def cosine(self, steps: Weights, move: Weights, names: Sequence[str]) -> float:
        """Of a move with the way back from these steps, in float64."""
        back = torch.cat([-steps[name].double().flatten() for name in names])
        moved = [move[name] if name in move else torch.zeros_like(steps[name]) for name in names]
        ahead = torch.cat([each.double().flatten() for each in moved])
        lengths = float(back.norm() * ahead.norm())
        return float(back @ ahead) / lengths if lengths > 0 else math.nan

    def cosines(self, steps: Weights, there: Weights, names: Sequence[str]) -> Cosines:
        lotion = {name: move + self.term[name] if name in self.term else move for name, move in self.descent.items()}
        length = math.sqrt(sum(float(steps[name].double().square().sum()) for name in names))
        return Cosines(length, *(self.cosine(steps, move, names) for move in (there, self.descent, self.term, lotion)))

    def seen_at(self, rounded: Weights, growth: float, times: Sequence[float]) -> RoundingDiagnosis:
        steps = {name: q - self.at[name] for name, q in rounded.items()}
        there, along = self.downhill(steps), self.along(steps)
        return RoundingDiagnosis(
            loss=float(self.found.graph.loss(rounded)),
            edge=_edge(along, growth),
            line=tuple((float(t), along(t)) for t in times),
            cosines={name: self.cosines(steps, there, [name]) for name in steps},
            over_all=self.cosines(steps, there, list(steps)),
        )
