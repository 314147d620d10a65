"""What the gradients at a model's outputs tell of its loss, in a step that measures or guesses the term's size."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lotion_fx import private_backward
from lotion_fx.output_noise import OUTPUTS, SUMS
from lotion_fx.shards import summed

DOUBT = 4.0
"""By what factor residuals must contradict the count of loss terms to be believed before anything was measured."""

TOLD = 5 + OUTPUTS * SUMS
"""Numbers that are told of a step."""

MOST = 1024
"""Backward passes of one step that are told apart."""


class Residuals:
    """Sums over the rows of the outputs, of the backward passes whose gradients the step under way is to have.

    Where the model makes the loss itself no output has rows with a gradient, and what graphs saw at its head tells.
    """

    def __init__(self) -> None:
        self._of: dict[int, Tensor] = {}  # of each pass
        self._inside: dict[int, Tensor] = {}

    def arrived(
        self, norms: Tensor, energies: Tensor, likely: Tensor, weights: Tensor, traces: Tensor, moved: Tensor
    ) -> None:
        """The gradient of one of a model's outputs arrived in a backward pass.

        Args:
            norms, energies: 0-d, the sum over rows of the gradient's norm and of its square.
            likely, weights: 0-d, that of the square over the weight of its row in the loss, and of that weight; or nan.
            traces: 0-d, that of the trace of the loss's curvature; or nan.
            moved: what `output_noise.told_of` tells.
        """
        backward = private_backward.current_backward()
        now = torch.stack([norms, energies, likely, weights, traces]).double()
        now = torch.cat([now, moved.flatten()])
        self._of[backward] = self._of[backward] + now if backward in self._of else now
        if len(self._of) > MOST:  # no step takes them
            del self._of[next(iter(self._of))]

    def arrived_inside(self, norms: Tensor, energies: Tensor) -> None:
        """Likewise of the gradients at the head, 0-d, as a graph saw them; weights of rows do not show there."""
        told = norms.new_zeros(TOLD, dtype=torch.float64)
        told[:5] = torch.stack([norms, energies, *norms.new_full((3,), math.nan)])
        self._inside[private_backward.current_backward()] = told
        if len(self._inside) > MOST:
            del self._inside[next(iter(self._inside))]

    def keep(self, factor: Tensor) -> None:
        """Forgets the passes before the one under way if the factor, 0-d, is not 1 but 0."""
        now = private_backward.current_backward()
        for known in (self._of, self._inside):
            known.update({at: torch.where(factor, told, 0.0) for at, told in known.items() if at != now})

    def forget(self) -> None:
        """The gradients of the passes before the one under way were dropped."""
        now = private_backward.current_backward()
        self._of, self._inside = ({k: told for k, told in of.items() if k == now} for of in (self._of, self._inside))

    def clear(self) -> None:
        """Another step begins to measure."""
        self._of, self._inside = {}, {}

    def taken(self) -> Tensor | None:
        """The sums, float64 [`TOLD`], once, those of `output_noise.told_of` last; None where nothing arrived."""
        told = list((self._of or self._inside).values())
        self.clear()
        return torch.stack(told).sum(0) if told else None

    def over_ranks(
        self, terms: Tensor | float | None, loss_scale: Tensor | None, group: Any, device: torch.device
    ) -> tuple[Tensor, float, int]:
        """`taken` and T after it, of all ranks, on the CPU; the loss scale; how many ranks gradients are the mean of.

        Args:
            terms: T on this rank; None if nothing counted it, and then nothing is known.
        """
        seen, told = torch.zeros(TOLD + 1, dtype=torch.float64, device=device), self.taken()
        if told is not None and terms is not None:
            seen[:TOLD], seen[TOLD] = told, terms
        ranks = 1 if group is None else dist.get_world_size(group)
        return summed(seen, group).cpu(), 1.0 if loss_scale is None else float(loss_scale), ranks


def size_told(seen: Tensor, scale: float, ranks: int, *, counts: bool) -> float:
    """Over its counted size, what a term's is expected to be; 1 where nothing contradicts the count.

    Where every row's loss is a likelihood's of some weight, that is known. Else, where T counts, its residuals are
    taken to be about 1 in size, so that their weights show in their gradients: of a sum these are of size 1, of a mean
    over T of size 1/T. Such a guess is believed where it contradicts the count.

    Args:
        seen: of `Residuals.over_ranks`.
        scale: of the loss, in these gradients.
        ranks: over which gradients are averaged.
        counts: whether T is in the term; else its curvature is that of a loss of its own, a mean over rows.
    """
    norms, energies, likely, weights = seen[:4].tolist()
    is_known, terms, ratio = math.isfinite(likely) and likely > 0, float(seen[TOLD]), 1.0
    if counts and energies * terms > 0:
        ratio = ranks * (likely if is_known else norms) * scale / (energies * terms)
    elif is_known and not counts:  # in a mean they add to 1
        ratio = weights / scale / ranks
    is_believed = math.isfinite(ratio) and ratio > 0 and (is_known or not 1 / DOUBT < ratio < DOUBT)
    return ratio if is_believed else 1.0


def size_known(seen: Tensor, scale: float, ranks: int) -> float | None:
    """The size of a likelihood's term over T times the squared gradients of the same step; None of another loss.

    Args:
        seen, scale, ranks: as of `size_told`.
    """
    energies, trace, terms = float(seen[1]), float(seen[4]), float(seen[TOLD])
    ratio = ranks * trace * scale / (energies * terms) if energies * terms > 0 else math.nan
    return ratio if math.isfinite(ratio) and ratio > 0 else None
