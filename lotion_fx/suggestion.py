"""`suggest`: which weights to keep in 8 bits, where the loss pays most for it."""

from __future__ import annotations

import glob
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lotion_fx.arguments import check_model
from lotion_fx.choosing import Formats, weights_for
from lotion_fx.estimate import quantized_in
from lotion_fx.joint_form import curvatures_of
from lotion_fx.loss_graph import LossFunction, loss_graph
from lotion_fx.numerics.formats import Format, resolve
from lotion_fx.numerics.grids import Integer, Minifloat
from lotion_fx.numerics.quantizer import Quantizer
from lotion_fx.numerics.scales import PowerOfTwoScale
from lotion_fx.scalars import check_number
from lotion_fx.settings import Settings
from lotion_fx.state import Smoothing, Weight, names_of, registry
from lotion_fx.vanishing import tell_of_unknown, unknown

WIDE = 8
_VISITS = 100_000  # of the search: far more than it takes to be exact in all but contrived models


@dataclass(frozen=True)
class Choice:
    """One weight.

    Args:
        name: of the parameter.
        size: its elements.
        formats: the narrow and the wide one.
        costs: its term, the predicted increase of the loss, in either.
        is_wide: whether it is kept in the wide one.
        why: its costs are not known, and stand as 0; empty where they are.
    """

    name: str
    size: int
    formats: tuple[Format, Format]
    costs: tuple[float, float]
    is_wide: bool = False
    why: str = ""

    @property
    def format(self) -> Format:
        return self.formats[self.is_wide]

    @property
    def extra(self) -> int:
        """Bits that the wide format takes more, for the whole weight."""
        return self.size * (self.formats[1].grid.bits - self.formats[0].grid.bits)

    @property
    def gain(self) -> float:
        """What the wide format takes off the loss."""
        return self.costs[0] - self.costs[1]


@dataclass(frozen=True)
class Suggestion:
    """Which weights to keep in 8 bits. ``str()`` is a table.

    Args:
        only: for `transform`, with the same ``fmt``.
        bits: of a code, on average over the elements of all quantized weights; scales are not counted.
        before: the increase of the loss predicted with every weight in its narrow format.
        after: the same as suggested.
        choices: every quantized weight, the one that gains most from each bit first.
    """

    only: Mapping[Any, Any]
    bits: float
    before: float
    after: float
    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        rows = [
            (c.name, c.size, c.format.name, *(f"{x:.3g}" if not c.why else "?" for x in (*c.costs, _density(c))))
            for c in self.choices
        ]
        headers = ("parameter", "elements", "format", "cost narrow", "cost wide", "gain per bit")
        foot = (
            f"\n{self.bits:.2f} bits on average; predicted increase of the loss {self.before:.3g} -> {self.after:.3g}"
        )
        whys = [f"\n{c.name}: its costs are not known, {c.why}" for c in self.choices if c.why]
        return tabulate(rows, headers, disable_numparse=True) + foot + "".join(whys)


def suggest(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None = None,
    *,
    bits: float = 5.0,
    fmt: str | Format = "nvfp4",
    only: Formats = MappingProxyType({}),
) -> Suggestion:
    """Which weights to keep in 8 bits, so that the loss grows least at a given average width.

    Each weight's cost in a format is its expected-loss term there, ``1/2 sum_i h_i sigma_i^2``, of the curvature on
    this batch. Those kept in 8 bits are chosen to take most off the sum of all costs within the average width. The
    8-bit format is the narrow one's relative: int8 with the same blocks where these were named (``int4/128``), mxfp8
    for nvfp4, mxfp4 and mxfp6, fp8 for fp4, int8 for all others.

    Args:
        model: as it would be given to `transform`, best trained for a while; nothing of it is changed. A transformed
            one is taken in its own formats: then ``fmt`` and ``only`` say nothing, and the suggestion's ``only`` names
            each weight.
        batch, loss_fn: as `expected_loss` takes them.
        bits: of a code, on average over all quantized weights' elements.
        fmt, only: as `transform` takes them.

    Returns:
        The suggestion; ``transform(model, fmt, only=suggestion.only)`` follows it.

    Raises:
        TypeError, ValueError: what `transform` and `expected_loss` raise; or the width is below that of the narrow
            formats.
    """
    check_number("bits", bits, lambda x: 0 < x < float("inf"), "an average number of bits, such as 5.0")
    is_transformed = isinstance(model, nn.Module) and any(registry.owned.get(module) for module in model.modules())
    if is_transformed:
        names = names_of(model)
    else:
        check_model(model)
        smoothing = Smoothing(Settings(curvature="full"))
        names = {weight: weight.name for weight in weights_for(smoothing, model, resolve(fmt), only)}
    choices = _choices(model, names, batch, loss_fn)
    size = sum(choice.size for choice in choices)
    least = sum(choice.size * choice.formats[0].grid.bits for choice in choices)
    if least > bits * size:
        raise ValueError(
            f"bits={bits!r}: the formats take {least / size:.3g} on average already; ask for more, or for a narrower "
            "format by fmt="
        )
    wide = _best(choices, bits * size - least)
    choices = [replace(c, is_wide=c.name in wide) for c in choices]
    taken = least + sum(choice.extra for choice in choices if choice.is_wide)
    named = {glob.escape(c.name): c.format.name for c in choices if c.is_wide or is_transformed}
    return Suggestion(
        only={**({"*": None} if is_transformed else only), **named},
        bits=taken / size,
        before=sum(choice.costs[0] for choice in choices),
        after=sum(choice.costs[choice.is_wide] for choice in choices),
        choices=tuple(choices),
    )


def _choices(model: nn.Module, names: Mapping[Weight, str], batch: Any, loss_fn: Any) -> list[Choice]:
    """Every quantized weight with its costs, the greatest gain for each bit first."""
    for weight, name in names.items():
        if isinstance(weight.parameter(), DTensor):
            raise ValueError(f"model: {name!r} is sharded; suggest needs whole weights")
    graph = loss_graph(model, batch, loss_fn)
    weights = quantized_in(graph, names)
    curvatures = curvatures_of(graph, weights, loss_fn)
    whys = unknown(graph.steps, weights)
    tell_of_unknown("suggest, which leaves it narrow", whys, stacklevel=4)
    choices = []
    for name, weight in weights.items():
        assert weight.format is not None
        formats = (weight.format, wide_of(weight.format))
        h = curvatures[name][0] if name in curvatures else torch.zeros((), dtype=torch.float32)
        costs = [_cost(weight, fmt, graph.parameters[name].detach(), h) for fmt in formats]
        size = graph.parameters[name].numel()
        choices.append(Choice(name, size, formats, (costs[0], costs[1]), why=whys.get(name, "")))
    return sorted(choices, key=_density, reverse=True)


def _cost(weight: Weight, fmt: Format, values: Tensor, h: Tensor) -> float:
    variance = Quantizer(fmt, weight.axis, weight.smoothing.settings.noise).variance(values)
    return float(0.5 * (h * variance.float()).sum(dtype=torch.float64))


def wide_of(fmt: Format) -> Format:
    """The 8-bit format that stands beside a narrower one; one of 8 bits stands beside itself."""
    if fmt.grid.bits >= WIDE:
        return fmt
    if fmt.law.two_level or isinstance(fmt.law, PowerOfTwoScale):
        return resolve("mxfp8")
    wide = "fp8" if isinstance(fmt.grid, Minifloat) else "int8"
    _, slash, option = fmt.name.partition("/")
    return resolve(wide + slash + option) if isinstance(fmt.grid, (Integer, Minifloat)) else resolve("int8")


# ---------------------------------------------------------------------------------------------------------- the choice


def _density(choice: Choice) -> float:
    return choice.gain / choice.extra if choice.extra else 0.0


def _best(choices: Sequence[Choice], room: float) -> set[str]:
    """The names of those to widen, with the greatest gain that has room: a knapsack, by branch and bound.

    A branch is left where even with a part of the next weight, which no choice can have, it gains no more than the best
    so far. The first branch is the greedy choice; after `_VISITS` the best so far is taken.

    Args:
        choices: the greatest gain for each bit first.
        room: bits for all extras together.
    """
    items = [choice for choice in choices if choice.extra and choice.gain > 0]
    extras = list(accumulate((item.extra for item in items), initial=0))
    gains = list(accumulate((item.gain for item in items), initial=0.0))

    def bound(first: int, left: float) -> float:
        """What the items from the first on gain at most: the densest that fill the room, the last in part."""
        last = bisect_right(extras, extras[first] + left) - 1
        rest = left - (extras[last] - extras[first])
        part = _density(items[last]) * rest if last < len(items) else 0.0
        return gains[last] - gains[first] + part

    best, found = 0.0, _Taken(None, None)
    stack = [(0, room, 0.0, found)]
    for _ in range(_VISITS):
        if not stack:
            break
        index, left, gain, taken = stack.pop()
        if gain > best:
            best, found = gain, taken
        if index == len(items) or gain + bound(index, left) <= best:
            continue
        item = items[index]
        stack.append((index + 1, left, gain, taken))
        if item.extra <= left:
            stack.append((index + 1, left - item.extra, gain + item.gain, _Taken(item, taken)))
    return found.names()


class _Taken(NamedTuple):
    """A weight that is widened, and those before it."""

    last: Choice | None
    before: _Taken | None

    def names(self) -> set[str]:
        names, node = set(), self
        while node.last is not None and node.before is not None:
            names.add(node.last.name)
            node = node.before
        return names
