"""Where a view lies in what it views, read off strides: whatever made it, a slice, a diagonal or `as_strided`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lotion_fx.passes.attach.values import Part


@dataclass(frozen=True)
class Box:
    """A tensor's elements in memory: from ``offset``, dimension ``d`` takes ``shape[d]`` steps of ``strides[d]``."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: Tensor) -> Box:
        return Box(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))


def along(view: Box, base: Box) -> tuple[frozenset[int], ...]:
    """For each dimension of a view, the dimensions of its base that a walk along it moves in.

    A step along a matrix's diagonal moves in both. Of [32, 24] seen as [64, 12], a walk along the first dimension does
    too, one along the second moves in the second alone.
    """
    long = [d for d, length in enumerate(base.shape) if length > 1 and base.strides[d] > 0]
    inward = sorted(long, key=lambda d: -base.strides[d])
    above = dict(zip(inward[1:], (base.strides[d] for d in inward), strict=False))

    def moves(length: int, stride: int, d: int) -> bool:
        start = view.offset - base.offset
        places = (start + step * stride for step in range(length if stride else 0))
        digits = ((place % above[d] if d in above else place) // base.strides[d] for place in places)
        first = next(digits, 0)
        return any(digit != first for digit in digits)

    sizes = zip(view.shape, view.strides, strict=True)
    return tuple(frozenset(d for d in long if moves(length, stride, d)) for length, stride in sizes)


def seen(part: Part, view: Box, base: Box) -> Part:
    """A part of a base, in a view of it."""
    if part.dims is None:
        return part
    return replace(part, dims=tuple(part.held_at(places) for places in along(view, base)))


def written(part: Part, view: Box, base: Box) -> Part:
    """A part of what was written into a view, in its base."""
    if part.dims is None:
        return part
    ways = along(view, base)
    return replace(
        part,
        dims=tuple(part.held_at(place for place, way in enumerate(ways) if d in way) for d in range(len(base.shape))),
    )
