"""The oracle of expected losses: every rounding of a few weights, its probability and its loss, in float64.

Differentiable: probabilities and rounded values are functions of the weights through the blocks' scales, so that the
gradient of the sum is the whole gradient of the expected loss. A snapped scale passes its gradient straight through.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import Format

Up = Callable[[Tensor], Tensor]


def unbiased(d: Tensor) -> Tensor:
    """Randomized rounding: the upper level's probability is the fractional position."""
    return d


def two_points(w: Tensor, fmt: Format, axis: int = -1, up: Up = unbiased) -> tuple[Tensor, Tensor, Tensor]:
    """The lower and the upper rounding of each weight and the upper one's probability, flat; past the grid its end."""
    blocks = rounding.to_blocks(w, fmt, axis)
    snapped = rounding.scale(w.detach(), fmt, axis)
    raw = blocks.abs().amax(-1, keepdim=True) / fmt.grid.max
    s = snapped + (raw - raw.detach())
    z = blocks / s
    lo, hi = fmt.grid.neighbours((blocks / snapped).detach())
    gap = torch.where(hi > lo, hi - lo, 1.0)
    p = torch.where(hi > lo, up((z - lo) / gap), 0.0)
    return tuple(rounding.from_blocks(part, fmt, axis, w.shape).flatten() for part in (lo * s, hi * s, p))  # type: ignore[return-value]


def expectation(
    function: Callable[[list[Tensor]], Tensor], weights: list[Tensor], fmt: Format, up: Up = unbiased
) -> Tensor:
    """``sum over all roundings of probability * function(rounded weights)``; at most 14 weights in all."""
    low, high, p = (torch.cat(parts) for parts in zip(*(two_points(w, fmt, up=up) for w in weights), strict=True))
    assert len(p) <= 14
    bits = torch.tensor(list(itertools.product([False, True], repeat=len(p))))
    sizes, shapes = [w.numel() for w in weights], [w.shape for w in weights]

    def at(flat: Tensor) -> Tensor:
        return function([part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)])

    losses = torch.vmap(at)(torch.where(bits, high, low))
    return (torch.where(bits, p, 1 - p).prod(1) * losses).sum()
