"""Which dimensions of a weight each dimension of a rearranged tensor holds, op by op.

Each function takes the dimensions held before, the op's arguments, and the shapes before and after.
"""

from __future__ import annotations

from typing import Any

Dims = tuple[frozenset[int], ...]  # for each dimension of a tensor, the weight's dimensions it holds


def same(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    """Of an op that keeps every dimension where it is, if not all of it."""
    return dims


def permute(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    return tuple(dims[d] for d in args[1])


def transpose(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    swapped = list(dims)
    swapped[args[1]], swapped[args[2]] = swapped[args[2]], swapped[args[1]]
    return tuple(swapped)


def unsqueeze(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    at = args[1] % len(new)
    return (*dims[:at], frozenset(), *dims[at:])


def drop(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    return tuple(d for i, d in enumerate(dims) if i != args[1] % len(dims))


def expand(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    return (*(frozenset[int]() for _ in range(len(new) - len(dims))), *dims)


def repeat(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    """Copies, one after the other along any dimension."""
    return expand(dims, args, old, new)


def index(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    """Advanced indexing, as experts are gathered: indices side by side give way to their own dimensions, in place.

    One index of one dimension permutes or chooses, so that its dimension still holds what it did; of others none does.
    """
    places = [place for place, chosen in enumerate(args[1]) if chosen is not None]
    together = places == list(range(places[0], places[0] + len(places)))
    first = places[0] if together else 0
    rest = [d for place, d in enumerate(dims) if place not in places]
    gathered = [frozenset[int]() for _ in range(len(new) - len(rest))]
    if len(places) == 1 and len(gathered) == 1:
        gathered = [dims[first]]
    return (*rest[:first], *gathered, *rest[first:])


def as_complex(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    """Pairs of reals, the last dimension, as one number."""
    return dims[:-1]


def as_real(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    return (*dims, frozenset())


def reshape(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    """Matches dimensions of equal running product; a merged or split dimension holds all that went into it."""
    result: list[frozenset[int]] = []
    i = j = 0
    while j < len(new):
        a, b, held, start = 1, 1, frozenset[int](), j
        while True:
            if a <= b and i < len(old):
                a, held, i = a * old[i], held | dims[i], i + 1
            elif j < len(new):
                b, j = b * new[j], j + 1
            if (a == b and j > start) or (i >= len(old) and j >= len(new)):
                break
        result += [held] * (j - start)
    return tuple(result)


def reverse(dims: Dims, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    return tuple(reversed(dims))
