"""`round_`: a transformed model's weights, rounded for good and so that the loss suffers least."""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lotion_fx.compiling import joint_vectors
from lotion_fx.deploy.weights import checked_values
from lotion_fx.estimate import quantized_in
from lotion_fx.kept_weights import KeptWeights
from lotion_fx.likelihood import LIKELIHOODS, labels_a_batch, named, parametrizing, sampled_loss
from lotion_fx.loss_graph import LossFunction, LossGraph, listed, loss_graphs
from lotion_fx.making_up import MakingUp
from lotion_fx.numerics.adaptive import METHODS, Curvature, Rounded, adaptive, cost
from lotion_fx.passes.attach.attach import LATENT, Plan
from lotion_fx.passes.attach.probe import SIDE, Code, Header, Layout
from lotion_fx.progress import with_a_bar
from lotion_fx.refining import Known, refined
from lotion_fx.scalars import check_count, check_number
from lotion_fx.state import Weight, names_of
from lotion_fx.tries import Try, format_of, known_of, scaled_by, to_nearest
from lotion_fx.vanishing import unknown

GIB = 2.0**30
THEN_ROUNDS = " + rounds"
SCALES = {"absmax": ("absmax",), "searched": ("searched",), "auto": ("absmax", "searched")}
"""What scales may be asked for, and of what they are made then: of several the batches' loss takes one."""


@dataclass(frozen=True)
class RoundedWeight:
    """What became of one weight.

    Args:
        name, format: of the weight.
        method: what rounded it: ``"descent"``, ``"two_sided"``, ``"gptq"`` or ``"nearest"``, and ``" + rounds"`` where
            these changed codes.
        share: its curvature's cost as a share of that of rounding to nearest, both of the weight as it is shifted in
            order, and in the curvature of then; nan where none is known.
        why: it was not rounded by the method that was asked for; empty where it was.
    """

    name: str
    format: str
    method: str
    share: float
    why: str


@dataclass(frozen=True)
class AdaptiveRounding:
    """What `round_` did. ``str()`` is a table.

    Args:
        weights: each of the model's quantized weights.
        latent, nearest, rounded: the mean loss of the batches, before, with all weights rounded to nearest, and now.
        scales: what scales were made of: ``"absmax"`` or ``"searched"``.
    """

    weights: tuple[RoundedWeight, ...]
    latent: float
    nearest: float
    rounded: float
    scales: str = "absmax"

    def __str__(self) -> str:
        rows = [
            [w.name, w.format, w.method, "" if math.isnan(w.share) else f"{w.share:.1%}", w.why] for w in self.weights
        ]
        headers = ["parameter", "format", "method", "cost of nearest's", "why not as asked"]
        table = tabulate(rows, headers, disable_numparse=True, maxcolwidths=[None, None, None, None, 60])
        return (
            f"{table}\nloss of the batches: {self.latent:.6g} before, {self.nearest:.6g} rounded to nearest, "
            f"{self.rounded:.6g} now, with {self.scales} scales"
        )


@torch.no_grad()
def round_(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction | None = None,
    *,
    method: str = "two_sided",
    scales: str = "absmax",
    likelihood: Any = None,
    in_order: bool | None = None,
    rounds: int = 0,
    memory: float = 4.0,
    folder: str | Path | None = None,
) -> AdaptiveRounding:
    """Rounds a transformed model's weights in place, once trained, so that the loss suffers least.

    Each weight's errors are made to cancel in its curvature ``B (x) A``, which is read off the graph of the loss on
    ``batches``: one forward and one backward pass each, at the weights as they are, in ``eval()`` mode. The weights
    then are points of their formats: `eval()`, `quantized`, `quantize` and `export` take them as they are, bit for bit.
    So does whatever loads them from a ``state_dict``, for rounded to nearest they stay the same. To train on would move
    them, but for `hold_codes`. Weights whose gradient shows no matrices are rounded to nearest, and the table says why.

    It talks to no other process: under DistributedDataParallel call it in one and export there, or in all with the same
    batches.

    Args:
        model: transformed and trained.
        batches: some eight of the training data, as `expected_loss` takes them.
        loss_fn: as `expected_loss` takes it.
        method: ``"two_sided"`` (the errors of a weight's rows and columns), ``"gptq"`` (of the dimension that products
            sum over, as GPTQ), ``"nearest"``, or ``"descent"``: two-sided, and then codes changed one by one as long as
            that lowers the cost, which takes some three times as long and is the best of them. A weight takes the
            cheapest of those up to this one; all are rounded to nearest where the batches' loss is lower so.
        scales: what each block's scale is made of: ``"absmax"``, its largest magnitude, or ``"searched"``, that share
            of it at which rounding to nearest errs least, see `searched`. For scales that many weights share, as one a
            tensor, for 2 bits, and for powers of two: there few outliers make the levels of all others coarse.
            ``"auto"`` rounds with both, which takes twice the time, and takes those of the lower loss of the batches.
        likelihood: None, or what the model's output parametrizes, as under ``transform(curvature="ggn")``, whose models
            have it already. Then gradients are those at labels that the model draws itself, four a batch, fewer
            beyond 16 batches and one from 64 on: for losses that have nearly vanished, as where a model is its own
            teacher, and whose gradients say nothing.
        in_order: weights are rounded as they run, and one whose inputs have changed by then is shifted first, by half
            of what brings back its outputs, or the sums that these go into; see `making_up`. That takes two forward
            passes over the batches more. Where the batches' loss then is above that of rounding to nearest, and for
            False, each weight is rounded as if no other were. None is True for ``"descent"`` and False for the others,
            which are the recursions as they were published.
        rounds: of changing codes once more, by the gradient that the batches' loss has at the rounded weights, see
            `refining`. Each is a pass over the batches more (and two besides), and is undone where their loss grows;
            they end where it is as low as it was before rounding, and there are none where rounding to nearest has not
            raised it, as after training at rounded weights. For many batches, some 16 or more: few are soon learned by
            heart.
        memory: GiB that curvatures may take at a time; more weights than fit are done in turns, each of which passes
            over the batches again.
        folder: where finished weights are kept until all are done, so that a call that was interrupted goes on from
            there; None keeps nothing.

    Returns:
        What became of each weight. Until it returns the model is as it was.

    Raises:
        ValueError: the model is not under lotion_fx or is sharded; no batches; a loss or batch that `expected_loss`
            refuses; values that are no finite numbers; a format that cannot keep what is rounded to it.
        TypeError: the batches are one batch.
    """
    _check(method, scales, in_order, rounds, memory)
    in_order = method == "descent" if in_order is None else in_order
    names, given = names_of(model), listed(batches)
    told = next(iter(names)).smoothing.settings.likelihood if likelihood is None else named(likelihood)
    graphs = loss_graphs(model, with_a_bar("tracing the loss", given, len(given)), loss_fn)
    in_loss = quantized_in(graphs[0], names)
    selected = {name: weight for weight, name in names.items() if weight.selected}
    latent = {name: _checked(name, weight) for name, weight in selected.items()}
    kept = KeptWeights(folder, f"{method} {told} {in_order}", graphs)
    tries = [Try(way, scaled_by(way, latent, selected)) for way in SCALES[scales]]
    for each in tries:
        found = {name: kept.load(name, each.scales, selected[name], latent[name]) for name in in_loss}
        each.done = {name: rounded for name, rounded in found.items() if rounded is not None}
        if in_order and method != "nearest":
            each.making_up = MakingUp(graphs, list(in_loss), {name: done.values for name, done in each.done.items()})
            in_loss = {name: in_loss[name] for name in (*each.making_up.order, *in_loss)}
    why: dict[str, str] = {}
    to_do = {n: weight for n, weight in in_loss.items() if rounds or any(n not in each.done for each in tries)}
    turns = list(_turns(to_do, memory * GIB / 4)) if method != "nearest" else []
    if rounds and len(turns) > 1:
        raise ValueError(_no_room(rounds, to_do.values(), memory))
    for turn in turns:
        curvatures = _curvatures(graphs, turn, told, why)
        _round(turn, tries, latent, curvatures, method, kept, keeps_views=rounds > 0)
    left = {name: weight for name, weight in selected.items() if name not in tries[0].done}
    for each in tries:
        each.making_up = None  # with what it holds of the batches
        each.done |= to_nearest(each.scaled, left, {})
    why = dict.fromkeys(left, "the loss does not depend on it") | why | unknown(graphs[0].steps, in_loss)
    best, losses = _best(graphs, in_loss, tries, latent, selected)
    if best.is_nearest and in_order:  # which is not always what is best, above all on few batches
        options = {"scales": scales, "likelihood": likelihood, "rounds": rounds, "memory": memory, "folder": folder}
        return round_(model, given, loss_fn, method=method, in_order=False, **options)
    _warn(losses, method, told)
    if best.is_nearest:  # it was trained at rounded weights, or its gradients tell nothing
        why = dict.fromkeys(best.done, f"by {method!r} the batches' loss is {losses.asked:.4g}") | why
    if rounds and best.views:
        values = {name: best.done[name].values for name in in_loss}
        values = refined(graphs, best.views, latent, values, rounds, losses.latent)
        best.done |= {name: _changed(best.done[name], view, values[name]) for name, view in best.views.items()}
        losses = losses._replace(rounded=_loss(graphs, in_loss, best.done))
    why |= dict.fromkeys(_unmoved(latent, best.done), "it lies on its levels already")
    for name, rounded in best.done.items():
        latent[name].copy_(rounded.values)
    kept.clear(list(selected))
    rows = [_row(name, weight, best.done[name], method, why.get(name, "")) for name, weight in selected.items()]
    return AdaptiveRounding(tuple(rows), losses.latent, losses.nearest, losses.rounded, best.scales)


class _Losses(NamedTuple):
    """Mean losses of the batches: at the latent weights, as it was asked for, to nearest, and as it is taken."""

    latent: float
    asked: float
    nearest: float
    rounded: float


def _round(
    weights: Mapping[str, Weight],
    tries: Sequence[Try],
    latent: Mapping[str, Tensor],
    curvatures: Mapping[str, Curvature],
    method: str,
    kept: KeptWeights,
    *,
    keeps_views: bool,
) -> None:
    """Rounds those weights that have a curvature, in every try that has not done so."""
    for each in tries:
        each.leave({name: weight for name, weight in weights.items() if name not in curvatures})
    for name in with_a_bar("rounding weights", [name for name in weights if name in curvatures], len(curvatures)):
        for each in tries:
            if name in each.done and not keeps_views:
                continue
            view = each.view(name, weights[name], latent[name], curvatures[name])
            if name not in each.done:
                each.finish(name, adaptive(*view[:5], method, view.scaled_as))
                kept.save(name, each.scales, weights[name], latent[name], each.done[name])
            if keeps_views and None not in view.curvature:
                each.views[name] = view


def _best(
    graphs: Sequence[LossGraph],
    in_loss: Iterable[str],
    tries: Sequence[Try],
    latent: dict[str, Tensor],
    weights: Mapping[str, Weight],
) -> tuple[Try, _Losses]:
    """The try of the lowest loss of the batches, rounding to nearest included; the first of several."""
    best, asked, least = tries[0], math.nan, math.nan
    for each in itertools.chain(tries, _to_nearest(tries, latent, weights)):
        found = _loss(graphs, in_loss, each.done)
        if math.isnan(least) or found < least:
            best, least = each, found
        if not each.is_nearest:
            asked = found if math.isnan(asked) else min(asked, found)
    return best, _Losses(_loss(graphs, in_loss, {}), asked, found, least)


def _to_nearest(tries: Sequence[Try], latent: dict[str, Tensor], weights: Mapping[str, Weight]) -> Iterator[Try]:
    """All weights rounded to nearest, with each of the scales; last with those of absmax. One at a time is held."""
    by_scales = {each.scales: each for each in tries}
    for scales in sorted({*by_scales, "absmax"}, reverse=True):
        scaled = by_scales[scales].scaled if scales in by_scales else latent
        beside = by_scales.get(scales, tries[0])
        views = {n: known_of(latent[n], scaled[n], weights[n], view.curvature) for n, view in beside.views.items()}
        yield Try(scales, scaled, to_nearest(scaled, weights, beside.done), is_nearest=True, views=views)


def _check(method: str, scales: str, in_order: bool | None, rounds: int, memory: float) -> None:
    for parameter, value, expected in (("method", method, METHODS), ("scales", scales, SCALES)):
        if not isinstance(value, str) or value not in expected:
            raise ValueError(f"{parameter}={value!r}: expected one of {', '.join(expected)}")
    if in_order not in (None, True, False):
        raise ValueError(f"in_order={in_order!r}: expected True, False, or None for what is best with the method")
    check_number("memory", memory, lambda x: x > 0, "a number of GiB above 0")
    check_count("rounds", rounds, 0, "the number of rounds, 0 or more")


def _warn(losses: _Losses, method: str, likelihood: str | None) -> None:
    """Says so where the gradients cannot tell what rounding costs, or did not."""
    latent, asked, nearest, least = losses
    if asked > least:
        warnings.warn(
            f"round_: the batches' loss of {asked:.4g} is above the {least:.4g} of rounding to nearest, which is "
            "taken instead. That is as expected where a model was trained at rounded weights. Otherwise its gradients "
            "may say little, as where the loss is near 0 or the format very coarse: try more batches, batches that the "
            "model fits less well, or likelihood=",
            stacklevel=3,
        )
    elif likelihood is None and method != "nearest" and abs(latent) < 0.01 * abs(nearest):
        warnings.warn(
            f"round_: the batches' loss of {latent:.3g} is next to nothing beside the {nearest:.3g} of rounding to "
            "nearest, and its gradients say little of what rounding costs; name what the model's output parametrizes, "
            f"likelihood='gaussian' or another of {', '.join(LIKELIHOODS)}, and labels are drawn from it",
            stacklevel=3,
        )


def _no_room(rounds: int, weights: Iterable[Weight], memory: float) -> str:
    return (
        f"rounds={rounds}: they need the curvatures of all weights at a time, which take "
        f"{sum(_layout(weight).payload for weight in weights) * 4 / GIB:.3g} GiB, and memory={memory}; "
        "raise memory, or leave rounds out"
    )


def _changed(rounded: Rounded, known: Known, values: Tensor) -> Rounded:
    """What became of a weight in the rounds."""
    if torch.equal(values, rounded.values):
        return rounded
    error = (known.latent - values).reshape(known.shape)
    return rounded._replace(values=values, cost=cost(error, known.curvature), method=rounded.method + THEN_ROUNDS)


def _checked(name: str, weight: Weight) -> Tensor:
    parameter = checked_values(name, weight)
    if isinstance(parameter, DTensor):
        raise ValueError(
            f"model: {name!r} is sharded; round_ needs whole weights: load them into a model in one process"
        )
    return parameter


def _layout(weight: Weight) -> Layout:
    return replace(weight.layout, kind="kronecker")


def _turns(weights: Mapping[str, Weight], most: float) -> Iterator[dict[str, Weight]]:
    """The weights, as many at a time as have no more than so many values of curvature together, and at least one."""
    turn: dict[str, Weight] = {}
    size = 0
    for name, weight in weights.items():
        payload = _layout(weight).payload
        if turn and size + payload > most:
            yield turn
            turn, size = {}, 0
        turn[name] = weight
        size += payload
    if turn:
        yield turn


def _curvatures(
    graphs: Sequence[LossGraph], weights: Mapping[str, Weight], likelihood: str | None, why: dict[str, str]
) -> dict[str, Curvature]:
    """The curvature of each weight that has one, summed over the batches; ``why`` is told of the others."""
    at = {list(graphs[0].parameters).index(name): name for name in weights}
    plans = {i: Plan(LATENT, weights[name].quantizer, _layout(weights[name])) for i, name in at.items()}
    sums: dict[str, Tensor] = {}
    known: dict[Any, Any] = {}
    labels = labels_a_batch(len(graphs))
    for turn, graph in enumerate(with_a_bar("curvatures", graphs, len(graphs))):
        losses = [lambda outputs: outputs[0]] if likelihood is None else _drawn(likelihood, turn, labels)
        with graph.same_draws():
            vectors = joint_vectors(graph.gm, graph.inputs({}), plans, losses, known)
        for i, (vector, _) in vectors.items():
            sums[at[i]] = sums[at[i]] + vector if at[i] in sums else vector
    found = {}
    for name, vector in sums.items():
        layout = _layout(weights[name])
        code, curvature = Header.of(vector).common_code, Curvature(*layout.matrices(vector))
        if code is not Code.ANALYTIC:
            why[name] = code.reason
        elif not vector[: layout.payload].isfinite().all():
            raise ValueError(f"batches: the gradient of their loss by {name!r} holds values that are no finite numbers")
        else:
            found[name] = curvature
    return found


def _drawn(likelihood: str, seed: int, labels: int) -> list[Callable[[Sequence[Tensor]], Tensor]]:
    """Losses of a graph's outputs at labels drawn from the prediction; a batch draws the same ones in every turn."""
    generators: dict[torch.device, torch.Generator] = {}

    def loss(outputs: Sequence[Tensor]) -> Tensor:
        output = parametrizing(outputs[1:], likelihood)
        device = output.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        return sampled_loss(output, likelihood, generators[device])

    return [loss] * labels


def _loss(graphs: Sequence[LossGraph], weights: Iterable[str], done: Mapping[str, Rounded]) -> float:
    """The mean loss of the batches, with what became of these weights in their places."""
    changed = {name: done[name].values for name in weights if name in done}
    return statistics.fmean(float(graph.loss(changed)) for graph in graphs)


def _unmoved(latent: Mapping[str, Tensor], done: Mapping[str, Rounded]) -> list[str]:
    return [name for name, rounded in done.items() if torch.equal(latent[name], rounded.values)]


def _row(name: str, weight: Weight, rounded: Rounded, asked: str, why: str) -> RoundedWeight:
    share = rounded.cost / rounded.nearest if rounded.nearest > 0 else math.nan
    first = rounded.method.removesuffix(THEN_ROUNDS)
    if first == asked:
        why = ""
    elif not why:
        is_long = max(weight.layout.factors[1:]) > SIDE
        cheapest = f"it costs least by {first!r}" if rounded.nearest > 0 else "its gradients vanish"
        why = f"more than {SIDE} rows or columns, which get no matrix" if is_long else cheapest
    return RoundedWeight(name, format_of(weight)[0].name, rounded.method, share, why)
