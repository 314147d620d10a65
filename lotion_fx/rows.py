"""What the rows of a model's output tell of its loss: T, where no joint graph counts it, and the size of its gradients.

Gradients also show which rows are a likelihood's, with which weight each. Where an output z has the gradient
``c (softmax(z) - e_y)`` in a row, that row's loss is c times a cross entropy, whatever was done to reduce it; where
``c (sigmoid(z) - y)``, with y 0 or 1, it is c times a binary one. The Gauss-Newton part of the row's curvature is then
1 / c times the square of its gradient, in the mean over labels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lotion_fx.private import tree_leaves
from lotion_fx.tally import Tally

ROWS = 256
"""So many rows of an output are looked at for a likelihood's gradient, evenly spaced."""

ALIKE = 0.03
"""How far a gradient may be from a likelihood's, relatively: half precision."""


def count_rows(out: Any, tally: Tally) -> None:
    """T is the number of rows with non-zero gradient in the first output that has rows, where no joint graph counts it.

    All of its rows where the model made the loss itself: such a graph does not show what gradient they had.

    Args:
        out: what the model returned, tensors in any nesting.
    """
    if tally.counted_in_graph or not tally.has_term or not tally.needs_loss_count or not torch.is_grad_enabled():
        return
    leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.dim()]
    if leaves:
        leaf = next((leaf for leaf in leaves if leaf.dim() > 1), leaves[0])
        every = torch.full((), leaf.shape[: leaf.dim() - 1 or 1].numel(), dtype=torch.float32, device=leaf.device)
        leaf.register_hook(lambda grad: tally.rows_counted(_rows(grad, every)))


def watch_residuals(out: Any, tally: Tally) -> None:
    """Tells a step that measures the term how large the gradients of the model's outputs are, row by row.

    Args:
        out: what the model returned, tensors in any nesting.
    """

    for leaf in tree_leaves(out) if torch.is_grad_enabled() else ():
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.dim():
            leaf.register_hook(partial(_tell, tally, leaf.detach()))


def _tell(tally: Tally, output: Tensor, grad: Tensor | None) -> None:
    if grad is not None:
        squares = grad.detach().float().square()
        energies = squares.sum(-1) if grad.dim() > 1 else squares
        likely = energy_by_likelihood(output, grad.detach())
        tally.measuring.residuals_arrived(energies.sqrt().sum(), energies.sum(), likely)


def energy_by_likelihood(output: Tensor, grad: Tensor) -> Tensor:
    """The sum over rows of the squared gradient over the weight of the row's loss, 0-d; nan where that is not told.

    Args:
        output: logits, of classes in the last dimension or in the second, or each of its own.
        grad: the loss's gradient there.
    """
    found = grad.new_full((), torch.nan, dtype=torch.float32)
    for dim in dict.fromkeys((grad.dim() - 1, 1)) if grad.dim() > 1 else ():
        rows = (x.movedim(dim, -1).reshape(-1, x.shape[dim])[:: max(1, x.numel() // x.shape[dim] // ROWS)].float()
                for x in (output, grad))  # fmt: skip
        found = torch.where(found.isnan(), _of_categories(*rows), found)
    return torch.where(found.isnan(), _of_bits(output.float(), grad.float()), found) * grad.float().square().sum()


def _of_categories(z: Tensor, g: Tensor) -> Tensor:
    """The mean of 1 / c over rows [rows, classes], by their energy, if each is ``c (softmax(z) - e_y)``; else nan."""
    label = g.argmin(1, keepdim=True)
    direction = z.softmax(1).scatter_add(1, label, torch.full_like(z, -1.0))
    c = (g * direction).sum(1) / direction.square().sum(1)
    return _inverse(c, g - c[:, None] * direction, g) if z.shape[1] > 1 else z.new_full((), torch.nan)


def _of_bits(z: Tensor, g: Tensor) -> Tensor:
    """1 / c if every element is ``c (sigmoid(z) - y)`` with y 0 or 1 and one c; else nan."""
    direction = z.sigmoid() - g.lt(0).float()
    c = (g * direction).sum() / torch.where(g != 0, direction, 0.0).square().sum()
    return _inverse(c[None], torch.where(g != 0, g - c * direction, 0.0).reshape(1, -1), g.reshape(1, -1))


def _inverse(c: Tensor, rest: Tensor, g: Tensor) -> Tensor:
    """The mean of 1 / c [rows] by the energy of g [rows, n], nan where the rest is more than rounding."""
    energy = g.square().sum(1)
    seen = energy > 0
    mean = torch.where(seen, energy / c, 0.0).sum() / energy.sum()
    holds = (rest.square().sum(1) <= ALIKE**2 * energy).all() & (~seen | (c > 0)).all()
    return torch.where(holds & mean.isfinite(), mean, torch.nan)


def _rows(grad: Tensor | None, every: Tensor) -> Tensor:
    if grad is None:
        return every
    nonzero = grad.ne(0)
    return (nonzero.any(-1) if grad.dim() > 1 else nonzero).sum().float()
