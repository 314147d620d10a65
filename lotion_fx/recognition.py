"""Which losses show in the gradient at a model's output, and with which weight.

Where an output z has the gradient ``c (softmax(z) - e_y)`` in each row, the row's loss is c times a cross entropy,
whatever reduced it; where ``c (sigmoid(z) - y)``, with y 0 or 1, it is c times a binary one. The loss's curvature there
has the trace ``c (1 - sum p^2)`` or ``c p (1 - p)``, p the probabilities: 1 / c times the square of the gradient in the
mean over labels drawn from the model, and more than that of labels which it has learned by heart.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

ROWS = 256
"""So many rows of an output are looked at, evenly spaced: logits are the largest tensors there are."""

ALIKE = 0.03
"""How far a gradient may be from a likelihood's, relatively: half precision."""


def row_weights(output: Tensor, grad: Tensor) -> Tensor:
    """What shows of the weights c that a loss gives to rows; float32 [3], nan where they do not show.

    Args:
        output: logits, of classes in the last dimension or in the second, or each of its own.
        grad: the loss's gradient there, of the same shape; of either, any floating dtype.

    Returns:
        The mean over rows of 1 / c, by the square of their gradient; the sum of c, which is 1 for a mean; and the trace
        of the curvature over the square of the gradient, of all rows together.
    """
    found = (
        grad.new_full((3,), torch.nan, dtype=torch.float32) if grad.is_floating_point() else torch.full((3,), torch.nan)
    )
    if isinstance(output, DTensor) or output.is_nested or not output.is_floating_point() or not output.numel():
        return found
    for dim in dict.fromkeys((output.dim() - 1, 1)) if output.dim() > 1 else ():
        rows = output.numel() // output.shape[dim]
        found = torch.where(found.isnan(), _of_categories(_some(output, dim), _some(grad, dim), rows), found)
    return torch.where(found.isnan(), _of_bits(_some(output, -1), _some(grad, -1), output.numel()), found)


def _some(x: Tensor, dim: int) -> Tensor:
    """Float32 [rows, n] of a tensor with rows along one dimension; of a vector, its elements as rows of one."""
    rows = x.movedim(dim, -1).reshape(-1, x.shape[dim]) if x.dim() > 1 else x[:, None]
    return rows[:: max(1, len(rows) // ROWS)].float()


def _of_categories(z: Tensor, g: Tensor, rows: int) -> Tensor:
    """Of [n, classes], which stand for so many rows, if each of them is ``c (softmax(z) - e_y)``, else nan."""
    if z.shape[1] < 2:
        return z.new_full((3,), torch.nan)
    p = z.softmax(1)
    direction = p.scatter_add(1, g.argmin(1, keepdim=True), torch.full_like(z, -1.0))
    return _told(g, direction, 1 - p.square().sum(1), 1.0, rows)


def _of_bits(z: Tensor, g: Tensor, elements: int) -> Tensor:
    """The same where each element that has a gradient is ``c (sigmoid(z) - y)``, with y 0 or 1 and one c; else nan."""
    p, g = z.sigmoid().reshape(1, -1), g.reshape(1, -1)
    direction = torch.where(g != 0, p - g.lt(0).float(), 0.0)
    trace = torch.where(g != 0, p * (1 - p), 0.0).sum(1)
    return _told(g, direction, trace, (g != 0).float().mean(), elements)


def _told(g: Tensor, direction: Tensor, of_one: Tensor, share: Tensor | float, count: int) -> Tensor:
    """What `row_weights` returns of rows of g [rows, n], which are c times a direction but for rounding, else nan.

    Args:
        of_one: [rows], the trace of a row's curvature where c is 1.
        share, count: what the mean c is multiplied by.
    """
    c = (g * direction).sum(1) / direction.square().sum(1)
    energy, rest = g.square().sum(1), (g - c[:, None] * direction).square().sum(1)
    seen = energy > 0
    inverse = torch.where(seen, energy / c, 0.0).sum() / energy.sum()
    trace = torch.where(seen, c * of_one, 0.0).sum() / energy.sum()
    holds = (rest <= ALIKE**2 * energy).all() & (~seen | (c > 0)).all() & inverse.isfinite() & trace.isfinite()
    told = torch.stack([inverse, torch.where(seen, c, 0.0).mean() * share * count, trace])
    return torch.where(holds, told, torch.nan)
