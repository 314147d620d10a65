"""A random tensor: the elementwise mean and variance of a value that depends on randomly rounded weights, what is known
of its dependences, and the approximations made on the way. The currency of `passes.moments` and of its rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lotion_fx.private import tree_leaves, tree_map

COVARIANCE_WIDTH = 32
"""Up to this many units a linear layer's outputs keep their full covariance, [..., d, d]: what stacked random layers
need to stay exact."""


@dataclass(frozen=True)
class Note:
    """One approximation.

    Args:
        text: what was done, such as ``"second order"``.
        op: the op at which.
        sources: names of the weights whose noise it concerns.
        dropped: those of them whose covariance was dropped, which is no matter of order: the error need not be small.
    """

    text: str
    op: str
    sources: frozenset[str]
    dropped: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.op}: {self.text}"


Notes = tuple[Note, ...]


def merged(*groups: Iterable[Note]) -> Notes:
    """Notes in order, each once."""
    return tuple(dict.fromkeys(note for group in groups for note in group))


Dims = Mapping[str, frozenset[int]]


@dataclass(frozen=True)
class Random:
    """A random tensor.

    Args:
        mean, var: elementwise moments, of one shape and dtype; ``var`` is None where only the mean is known (a loss).
        independent: for each weight whose noise it depends on, the dimensions along which that noise alone makes
            mutually independent slices. Noise of several weights does where each one's does.
        cov: covariance over the last dimension, [..., d, d] with ``var`` as its diagonal; None where it is unknown or
            diagonal.
        mean_notes, var_notes: the approximations in each.
    """

    mean: Tensor
    var: Tensor | None
    independent: Dims
    cov: Tensor | None = None
    mean_notes: Notes = ()
    var_notes: Notes = ()

    @property
    def sources(self) -> frozenset[str]:
        """Names of the weights whose noise it depends on."""
        return frozenset(self.independent)

    @property
    def shape(self) -> torch.Size:
        return self.mean.shape

    @property
    def all_notes(self) -> Notes:
        return merged(self.mean_notes, self.var_notes)

    def dependent(self, *dims: int) -> frozenset[str]:
        """The weights whose noise makes elements along these dimensions dependent; one element is not."""
        asked = {dim % self.mean.dim() for dim in dims if self.mean.shape[dim] != 1}
        return frozenset(source for source, held in self.independent.items() if not asked <= held)

    def is_independent(self, *dims: int) -> bool:
        """Whether the elements along these dimensions are mutually independent."""
        return not self.dependent(*dims)

    @property
    def variance(self) -> Tensor:
        """``var``, where a rule cannot do without."""
        if self.var is None:
            raise Ended("the variance of a loss is not followed")
        return self.var


class Ended(Exception):
    """The stream cannot pass an op."""


@dataclass(frozen=True)
class Call:
    """The op under way, as its rule sees it.

    Args:
        op: its name, ``"linear"``.
        sources: the weights whose noise reaches it.
    """

    op: str
    sources: frozenset[str]

    def named(self, op: str) -> Call:
        """The same call under the name of an op that it is made of."""
        return Call(op, self.sources)

    def note(self, text: str) -> Notes:
        """An approximation made here, as a rule hands it to `derived`."""
        return (Note(text, self.op, self.sources),)

    def dropped(self, what: str, sources: frozenset[str]) -> Notes:
        """A covariance dropped here, which these weights' noise has."""
        return (Note(f"covariance between {what} dropped", self.op, self.sources, sources),) if sources else ()


Value = Tensor | Random
Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def rule(*ops: Any) -> Callable[[Rule], Rule]:
    """Registers one rule for ops (overload packets, all overloads alike).

    A rule takes a `Call` and the op's own arguments, any of whose tensors may be a `Random`, and returns what the op
    returns, random where it is. It raises `Ended` with the reason where it cannot.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def randoms(value: Any) -> list[Random]:
    """Every random tensor in nested arguments."""
    return [leaf for leaf in tree_leaves(value, is_leaf=_is_random) if isinstance(leaf, Random)]


def _is_random(value: Any) -> bool:
    return isinstance(value, Random)


def mean_of(value: Any) -> Any:
    """Nested arguments with every random tensor replaced by its mean."""
    return tree_map(lambda leaf: leaf.mean if isinstance(leaf, Random) else leaf, value, is_leaf=_is_random)


def derived(
    parents: Iterable[Random],
    mean: Tensor,
    var: Tensor | None,
    independent: Dims | None = None,
    *,
    cov: Tensor | None = None,
    mean_note: Notes = (),
    var_note: Notes = (),
    mean_uses_var: bool = False,
) -> Random:
    """A random tensor made from others, with the notes that it inherits.

    Args:
        parents: what it was made from.
        independent: as in `Random`; along no dimension by default.
        mean_note, var_note: approximations that this op adds to its mean and to its variance.
        mean_uses_var: whether its mean was made from their variances too.
    """
    parents = list(parents)
    of_means = merged(*(parent.mean_notes for parent in parents))
    everything = merged(*(parent.all_notes for parent in parents))
    if independent is None:
        independent = {source: frozenset() for parent in parents for source in parent.independent}
    mean_notes = merged(everything if mean_uses_var else of_means, mean_note)
    return Random(mean, var, independent, cov, mean_notes, merged(everything, var_note))


def along(x: Random, change: Callable[[frozenset[int]], Iterable[int]]) -> Dims:
    """The independent dimensions of each weight's noise after a change of dimensions."""
    return {source: frozenset(change(held)) for source, held in x.independent.items()}


def joined(*parts: Dims) -> Dims:
    """Of values combined element by element: noise that enters by two ways is independent along no dimension."""
    sources = [source for part in parts for source in part]
    every = {source: held for part in parts for source, held in part.items()}
    return {source: held if sources.count(source) == 1 else frozenset() for source, held in every.items()}


def weight(name: str, mean: Tensor, var: Tensor) -> Random:
    """A weight whose elements are rounded independently: where a stream begins."""
    return Random(mean, var, {name: frozenset(range(mean.dim()))})


def var_of(value: Any) -> Any:
    """The variance of a value, 0 for one that is no `Random`."""
    if isinstance(value, Random):
        return value.variance
    return torch.zeros_like(value) if isinstance(value, Tensor) else 0.0


def stretched(x: Random, shape: Sequence[int]) -> Dims:
    """The independent dimensions after broadcasting: one that is repeated is none."""
    lead = len(shape) - x.mean.dim()
    return along(x, lambda held: (i + lead for i in held if x.shape[i] == shape[i + lead]))
