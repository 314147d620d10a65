"""Updates that no hook sees: an optimizer that is none of torch's, a step by hand, a ``step`` that was replaced.

They train plainly, and no moment tells it but that weights change under forwards that record gradients, though no hook
saw a step of them. Samples of the values are compared at a few forwards, until a step is seen; `tell` says the rest.
Forwards at other tensors than the model's parameters, as `torch.func` has them, are counted.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lotion_fx.by_hand import PATIENCE
from lotion_fx.shards import sample
from lotion_fx.state import Smoothing, Weight

_CHANGES = 2  # at least: a checkpoint that was loaded changes weights once


@dataclass(eq=False)
class _Watched:
    """A weight that no hook has seen: its values when last looked at, and how often they had changed."""

    weight: weakref.ref[Weight]
    seen: Tensor
    changes: int = 0

    def look(self) -> None:
        weight = self.weight()
        now = None if weight is None else _sample(weight)
        if now is not None and now.shape == self.seen.shape and not torch.equal(now, self.seen):
            self.seen, self.changes = now, self.changes + 1


@dataclass(eq=False)
class _Watch:
    """Of one model: forwards in training so far, its weights, and after which forward it was last asked of.

    Attributes:
        elsewhere: how many other forwards in training ran at other tensors than its parameters.
    """

    forwards: int = 0
    weights: list[_Watched] = field(default_factory=list)
    asked: int = 0
    elsewhere: int = 0


_watches: weakref.WeakKeyDictionary[Smoothing, _Watch] = weakref.WeakKeyDictionary()


def look(smoothing: Smoothing, model: nn.Module, tracer: str) -> None:
    """A call of a model begins, in what `private.tracer` says."""
    trains, watch = model.training and torch.is_grad_enabled(), _watches.setdefault(smoothing, _Watch())
    if trains and _is_elsewhere(smoothing):
        watch.elsewhere += 1
    elif tracer:
        return
    elif not trains:
        tell(smoothing)
    elif not watch.forwards:
        weights = [weight for weight in smoothing.weights if _is_unseen(weight)]
        watch.forwards = 1
        watch.weights = [_Watched(weakref.ref(w), now) for w in weights if (now := _sample(w)) is not None]
    elif watch.weights:
        watch.forwards += 1
        if watch.forwards <= 4 or watch.forwards & (watch.forwards - 1) == 0:  # rarer and rarer: it reads the device
            _look_again(watch)


def tell(smoothing: Smoothing) -> None:
    """Says once which weights were trained though no hook saw it."""
    watch, tally = _watches.get(smoothing), smoothing.tally
    if watch is None or not tally.has_term or "unhooked" in smoothing.said:
        return
    if watch.elsewhere >= PATIENCE and not tally.steps:
        smoothing.said.add("unhooked")
        warnings.warn(
            f"{watch.elsewhere} training forwards ran at other tensors than the model's parameters (torch.func), and "
            "no step of a torch.optim optimizer was seen: they had no expected-loss term, and what eval() rounds are "
            "the model's parameters; train these, by such an optimizer or with lotion_fx.apply_term(parameters) before "
            "each update by hand",
            stacklevel=3,
        )
        return
    if not watch.weights:
        return
    if not tally.steps and tally.backwards >= PATIENCE:
        return  # said already
    if watch.asked != watch.forwards:  # in a loop of evaluation its first call looks
        watch.asked = watch.forwards
        _look_again(watch)
    names = [w.name for each in watch.weights if each.changes >= _CHANGES and (w := each.weight()) is not None]
    if names:
        smoothing.said.add("unhooked")
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(
            f"{names[0]!r}{others} changed, and no step of a torch.optim optimizer was seen: trained without the "
            "expected-loss term; step by such an optimizer, or call "
            "lotion_fx.apply_term(parameters) before each update by hand",
            stacklevel=3,
        )


def _look_again(watch: _Watch) -> None:
    watch.weights = [each for each in watch.weights if (w := each.weight()) is not None and _is_unseen(w)]
    for each in watch.weights:
        each.look()


def _is_elsewhere(smoothing: Smoothing) -> bool:
    """Whether other tensors stand in the places of the model's parameters."""
    first = next((weight for weight in smoothing.weights if weight.selected), None)
    return first is not None and first.master is None and first.parameter() is not None


def _is_unseen(weight: Weight) -> bool:
    if not weight.selected:  # steps are counted of the others alone; before the first graph it may not be known
        return False
    return not weight.gathered.steps and (master := weight.master) is not None and master.requires_grad


def _sample(weight: Weight) -> Tensor | None:
    master = weight.master
    return None if master is None or master.is_meta else sample(master.detach()).clone()
