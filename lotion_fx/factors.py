"""What one step's curvatures and gradients are multiplied by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

BOUND = 0.5
"""How large a term may be beside the root mean square of gradients: of each element's, as a second moment that holds
the term's squares too tells it, or of a weight's, see `update`."""


@dataclass(frozen=True, eq=False)
class Factors:
    """What one step's curvatures and gradients are multiplied by, each made when it is first read: a step at rest reads
    no more than the gains.

    Args:
        total: T of the step, over all ranks, 0-d float32.
        gains: of each weight's term, 0-d float32.
        scale: the loss scale that backward saw.
        shrunk: by what factor the gradients shrank since the backward pass, the loss scale included.
        pending: the loss scale that is still in ``.grad``; None of none.
        clip: by which second moments' terms are bounded, as their gradients are clipped; None where there are none.
        bounded: by what terms are kept small, see `update`.
        draws: labels that curvature was drawn for in a pass of its own, whose loss nothing scaled; None of none.
        is_in: whether payloads are multiplied by ``row`` already.
    """

    total: Tensor
    gains: tuple[Tensor, ...]
    scale: Tensor | float
    shrunk: Tensor | float
    pending: Tensor | None
    clip: Tensor | None
    bounded: str
    draws: int | None
    is_in: bool = False

    @cached_property
    def row(self) -> Tensor:
        """T over the squared loss scale: of payloads, which are made of gradients as backward saw them. 0-d float32."""
        if self.is_in:
            return torch.ones_like(self.total)
        if self.draws is not None:
            return torch.full_like(self.total, 1 / self.draws)
        return (self.total / self.scale**2).float()

    @cached_property
    def gradient(self) -> Tensor:
        """T over the squared factor by which ``.grad`` was scaled or clipped: of squares of it. 0-d float32."""
        return (self.total / (self.scale * self.shrunk) ** 2).float()

    @cached_property
    def limit(self) -> Tensor:
        """Of a term, over the root of h, or of the mean square of ``.grad``, as ``bounded`` says. 0-d float32."""
        pending = 1.0 if self.pending is None else self.pending
        if self.clip is None:  # of ``.grad`` as it is: what that was scaled and clipped by is divided out
            return (torch.full_like(self.total, BOUND) * pending / (self.scale * self.shrunk)).float()
        return BOUND * pending / self.total.sqrt() * self.clip.abs()
