"""What a value in a graph is made of: of the model's inputs, or of weights and constants alone; and of which weights.

Three kinds of values, and one between them:

    constant    made in the graph, or a buffer: holds no weight
    held        made of weights and constants alone: holds weights
    data        depends on the model's inputs
    scaled      data that still holds weights: a weight times data, or chosen by an index that is data

What is drawn at random in the graph, in the likeness of no data, is data too, as the input of a generator is; but where
it meets a weight elementwise, and is no larger, it is noise on that weight, and constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lotion_fx.passes.dims import Dims


@dataclass(frozen=True)
class Part:
    """One weight in a value.

    Args:
        shape: the weight's.
        dims: which of the weight's dimensions each dimension of the value holds; None where no arrangement is known,
            as after a Fourier transform.
        multiplied: whether it went through a product with parameters or constants alone.
        scaled: whether it was multiplied with data, or chosen by it. It is a product's operand only where it is then
            used as a matrix: one of its dimensions is summed over, another stays.
        outer: of a scaled one, whether that data is the same along one of the weight's dimensions.
        deviation: whether it was multiplied with noise: in a sum with another weight it is a mere scale of that noise.
    """

    shape: tuple[int, ...]
    dims: Dims | None
    multiplied: bool = False
    scaled: bool = False
    outer: bool = False
    deviation: bool = False

    def long(self, dims: Iterable[int]) -> frozenset[int]:
        """Those dimensions of the weight that are longer than one."""
        return frozenset(dim for dim in dims if self.shape[dim] > 1)

    def held_at(self, places: Iterable[int]) -> frozenset[int]:
        """The weight's dimensions in some of the value's."""
        return frozenset[int]().union(*(self.dims[place] for place in places)) if self.dims else frozenset()

    def is_matrix(self, summed: Iterable[int], free: Iterable[int]) -> bool:
        """Whether a sum over some dimensions of the value leaves others, each of the weight's own."""
        if self.dims is None:
            return True
        summed_dims = self.long(self.held_at(summed))
        return bool(summed_dims) and bool(self.long(self.held_at(free)) - summed_dims)


@dataclass(frozen=True)
class Value:
    """What one tensor of a run is made of, see the module's docstring.

    Args:
        data: whether it depends on the model's inputs.
        parts: the weights that it holds, by index.
        noise: whether it was drawn at random, and depends on no inputs.
    """

    data: bool = False
    parts: Mapping[int, Part] = field(default_factory=dict)
    noise: bool = False

    def map(self, change: Callable[[Part], Part | None]) -> Value:
        """With every part changed, those left out for which there is None."""
        changed = {weight: change(part) for weight, part in self.parts.items()}
        return replace(self, parts={weight: part for weight, part in changed.items() if part is not None})


CONSTANT, DATA, NOISE = Value(), Value(data=True), Value(data=True, noise=True)


def whole(shape: Sequence[int]) -> Part:
    """A weight as it is."""
    return Part(tuple(shape), tuple(frozenset({dim}) for dim in range(len(shape))))


def lost(part: Part) -> Part | None:
    """A part after an op that rearranges by no known rule. One that a product was seen of needs no more following."""
    return None if part.multiplied or part.scaled else replace(part, dims=None)


def aligned(part: Part, old: Sequence[int], new: Sequence[int]) -> Part:
    """A part after its value was broadcast from a shape to another."""
    if part.dims is None:
        return part
    lead = len(new) - len(old)
    kept = (d if old[i] == new[i + lead] else frozenset[int]() for i, d in enumerate(part.dims))
    return replace(part, dims=(*(frozenset[int]() for _ in range(lead)), *kept))


def broadcast(value: Value, old: Sequence[int], new: Sequence[int]) -> Value:
    """A value that was broadcast from a shape to another."""
    return value.map(lambda part: aligned(part, old, new))


def merged(values: Iterable[Value]) -> Value:
    """What is made of several values elementwise, or placed side by side; all of one shape.

    A weight that stands in several stands where any of them has it; what it gave by a product is then a mere factor.
    """
    values, parts = list(values), dict[int, Part]()
    for value in values:
        for weight, part in value.parts.items():
            parts[weight] = _joined(parts[weight], part) if weight in parts else part
    data = [value for value in values if value.data]
    return Value(bool(data), parts, noise=bool(data) and all(value.noise for value in data))


def _joined(a: Part, b: Part) -> Part:
    if a.multiplied != b.multiplied:
        return b if a.multiplied else a
    if a.deviation != b.deviation:
        return b if a.deviation else a
    if a.dims is None or b.dims is None:
        return replace(a, dims=a.dims or b.dims)
    dims = tuple(x | y for x, y in zip(a.dims, b.dims, strict=True))
    return replace(a, dims=dims, scaled=a.scaled or b.scaled, outer=a.outer and b.outer)


def scaled(
    part: Part, size: Sequence[int], by: Sequence[Sequence[int]], new: Sequence[int], *, mixes: bool
) -> Part | None:
    """A weight's part after an elementwise product with data; None where the weight is a mere scale of the data.

    It is that where it holds fewer than two dimensions, or where the data varies along all of them and along others
    too, as activations do.

    Args:
        part: the weight, in a value of the shape ``size``.
        by: the shapes of the data.
        new: that of the product.
        mixes: whether the product is one of spectra, which a transform sums over.
    """
    out = aligned(part, size, new)
    if len(part.long(range(len(part.shape)))) < 2:
        return None
    padded = [(1,) * (len(new) - len(shape)) + tuple(shape) for shape in by]
    varies = [any(shape[place] > 1 for shape in padded) for place in range(len(new))]
    if out.dims is None:
        return replace(out, scaled=True) if mixes or tuple(size) == tuple(new) else None
    along = [place for place in range(len(new)) if part.long(out.dims[place])]
    outer = any(not varies[place] for place in along)
    beyond = any(varies[place] and place not in along for place in range(len(new)))
    return replace(out, scaled=True, outer=outer) if mixes or outer or not beyond else None


def placed(value: Value, dims: Callable[..., Dims], args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Value:
    """A value after an op that rearranges it, by the op's function of `passes.dims`."""

    def change(part: Part) -> Part | None:
        return replace(part, dims=None if part.dims is None else dims(part.dims, args, old, new))

    return value.map(change)
