"""The parameters of a model that hold noisy values for the step under way, so that the term's size can be measured.

From each of such a step's forwards until its backward pass is over they *hold* the noisy values, so that all that reads
them computes with the same ones: recomputation, a head applied outside of the model, other compilers, shards. They hold
their own values again before anything else looks: a step, of any model's optimizer, or one that a GradScaler skips; a
forward in `eval()` or without gradients, or that a step has no more of; a `state_dict`, loading one, a pickle, a
function of this package. A backward pass that comes after such a look finds the noisy ones again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from lotion_fx import private, private_backward
from lotion_fx.held import Held, can_be_measured, is_partial
from lotion_fx.shards import local_of, sample, shared_amax

if TYPE_CHECKING:
    from lotion_fx.state import Weight

_under_way: weakref.WeakSet[Holding] = weakref.WeakSet()  # those of a step that measures
_changing = threading.Lock()  # of that set


def optimizer_comes(own: Iterable[Holding]) -> None:
    """An optimizer is about to step: no parameters are noisy from here on, for it and what follows to read.

    One that steps inside a backward pass leaves alone what the rest of the pass needs; models that other threads train
    are left to those.

    Args:
        own: of the models that have weights among its parameters.
    """
    if _under_way and private_backward.current_backward() == -1:
        step_may_be_skipped()
        for holding in own:
            holding.put_back()


def step_may_be_skipped() -> None:
    """No parameters are noisy any more, of models that this thread trains."""
    with _changing:
        for holding in [holding for holding in _under_way if not holding.held]:
            _under_way.discard(holding)
        mine = [holding for holding in _under_way if holding.thread == threading.get_ident()]
    for holding in mine:
        holding.put_back()
        holding.is_anew = True


def _in_python(method: Callable[..., None]) -> Callable[..., None]:
    """Noise is drawn again to be compared with: the same to the last bit, which another compiler's code is not."""
    return torch.compiler.disable(torch.no_grad()(method))


class Holding:
    """Of one model.

    Attributes:
        held: the weights that take part in the measurement under way.
        steps: how many came before the step that it is of.
        thread: that ran the last forward which was to measure.
        stays: whether a part of the model ran at the noisy values by itself: nothing tells of its backward pass.
        is_anew: whether the forward to come may be the first of that step once more, for an optimizer was asked for it.
    """

    def __init__(self) -> None:
        self.held: dict[Weight, Held] = {}
        self.steps, self.thread, self.stays, self.is_anew = -1, 0, False, False

    @property
    def is_noisy(self) -> bool:
        """Whether any parameter holds noisy values."""
        return any(not held.is_back for held in self.held.values())

    @_in_python
    def begin(self, weights: Iterable[Weight], steps: int, amplitude: float, *, of_part: bool) -> None:
        """The parameters that can be measured come to hold noisy values, in the step after so many."""
        self.steps, self.thread, self.stays = steps, threading.get_ident(), of_part
        for place, weight in enumerate(weights):
            if can_be_measured(weight) and (parameter := weight.master) is not None:
                local, amax = local_of(parameter), shared_amax(weight.quantizer, parameter)
                known = steps * 1_000_003 + place, amax[0] if amax else None
                held = Held(local.clone(), private.version_of(local), *known, amplitude)
                self.held[weight] = held
                local.data.copy_(held.noisy(weight, parameter, held.own))
        with _changing:
            _under_way.add(self)

    @_in_python
    def go_on(self, *, of_part: bool = False) -> None:
        """They hold the same noisy values again; one that was changed since is left as it is, and tells nothing."""
        self.stays |= of_part
        for weight, held in list(self.held.items()):
            if not held.is_back or (parameter := weight.master) is None or not can_be_measured(weight):
                continue
            if held.has_moved(weight, parameter):
                del self.held[weight]
                continue
            local, noisy = local_of(parameter), held.own
            held.own, held.is_back = local.clone(), False
            local.data.copy_(noisy)

    def put_back(self, weights: Iterable[Weight] | None = None) -> None:
        """Parameters hold their own values again: of these weights, or of all.

        Not counted as a change in place, for a backward pass may be to come.
        """
        if self.held:
            self._put_back(list(self.held) if weights is None else weights)

    @_in_python
    def _put_back(self, weights: Iterable[Weight]) -> None:
        for weight in weights:
            held = self.held.get(weight)
            if held is None or held.is_back or (parameter := weight.master) is None:
                continue
            local, own = local_of(parameter), held.own
            held.is_back, held.own = True, local.clone()
            if (back := held.back_from_moved(weight, parameter, own)) is None:
                local.data.copy_(own)
            else:  # someone has moved it meanwhile: the move stays, and tells nothing
                local.data.add_(back)
                del self.held[weight]

    def drop(self) -> None:
        """The measurement under way is given up."""
        self.put_back()
        self.held.clear()

    # ------------------------------------------------------------------------------------------------- backward passes

    @property
    def pass_to_come(self) -> int | None:
        """What a backward pass of the forward under way tells `backward_comes`; None where that reads own values."""
        return self.steps if self.is_noisy else None

    def backward_comes(self, forward: int | None) -> None:
        """A backward pass comes through the outputs of a forward: it is to find the values that the forward had."""
        if forward == self.steps:
            self.go_on()

    def backward_ended(self) -> None:
        """The pass is over. Samples of the gradients tell by what they are scaled or clipped from here.

        Not where a loop averages them over processes by itself.
        """
        for weight, held in self.held.items():
            parameter = weight.master if weight.smoothing.settings.process_group is None else None
            grad = None if parameter is None else parameter.grad
            held.seen = None if grad is None or is_partial(grad) else sample(grad).clone()
        if not self.stays:  # else another may be to come
            self.put_back()

    # ---------------------------------------------------------------------------------------------------------- copies

    def copied(self, memo: Mapping[int, Any]) -> None:
        """The model is copied, and what was copied of it so far gets its own values."""
        for weight, held in self.held.items():
            if not held.is_back and (copied := memo.get(id(weight.master))) is not None:
                local_of(copied).data.copy_(held.own)
        self.put_back()
