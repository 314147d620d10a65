"""What the rows of a model's output tell of its loss: T, where no joint graph counts it, and their gradients' size."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lotion_fx import private_backward
from lotion_fx.output_noise import told_of
from lotion_fx.private import tree_flatten, tree_leaves, tree_unflatten
from lotion_fx.recognition import row_weights
from lotion_fx.shards import local_of, rows_of
from lotion_fx.tally import Tally

if TYPE_CHECKING:
    from lotion_fx.state import Weight


def count_rows(out: Any, tally: Tally) -> None:
    """T is the number of rows with non-zero gradient in the first output that has rows, where no joint graph counts it.

    All of its rows where the model made the loss itself: such a graph does not show what gradient they had.

    Args:
        out: what the model returned, tensors in any nesting.
    """
    if not tally.has_term or not tally.needs_loss_count or not torch.is_grad_enabled():
        return
    leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.dim()]
    learning = [weight for weight in tally.weights if _learns(weight)]
    if leaves and learning:
        leaf = next((leaf for leaf in leaves if leaf.dim() > 1), leaves[0])
        local = local_of(leaf)
        rows = local.shape[: local.dim() - 1 or 1].numel()
        tally.terms.gave(rows)
        if not tally.counted_in_graph:
            every = torch.full((), rows, dtype=torch.float32, device=leaf.device)
            trained = [] if tally.override else [weight for weight in learning if weight.training]
            leaf.register_hook(lambda grad: _count(tally, grad, every, trained))


def _count(tally: Tally, grad: Tensor | None, every: Tensor, trained: list[Weight]) -> None:
    """A backward pass begins, whose loss terms are the output's rows, of gradients of these weights or of what else."""
    if grad is not None and private_backward.is_batched(grad):  # which fills no weight's
        return
    count = _rows(grad, every)
    fills = _fills_grad(trained)
    if fills or not trained:
        tally.rows_counted(count, to_gradients=fills)
        return
    backwards = tally.backwards

    def ended() -> None:  # what reentrant checkpointing recomputes has a backward pass of its own, and counts there
        if tally.backwards == backwards:
            tally.rows_counted(count, to_gradients=False)

    private_backward.after_backward(ended)


def _fills_grad(weights: list[Weight]) -> bool:
    """Whether the backward pass under way adds to the ``.grad`` of any. Of shards nothing tells, and they count."""
    parameters = (weight.master for weight in weights)
    return any(isinstance(p, DTensor) or private_backward.adds_to_grad_of(p) for p in parameters if p is not None)


def _learns(weight: Weight) -> bool:
    """Whether a weight is trained, and not merely something before it, as a generator is through a frozen critic."""
    parameter = weight.master
    return weight.selected and parameter is not None and parameter.requires_grad


def watched(out: Any, tally: Tally) -> Any:
    """Tells a step that measures the term, or guesses its size, of backward passes and what gradients outputs have.

    Row by row, and with each row's weight in the loss.

    Args:
        out: what the model returned, tensors in any nesting.

    Returns:
        The same; with noise where the step is to have that.
    """
    if not torch.is_grad_enabled():
        return out
    leaves, structure = tree_flatten(out)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    forward, is_moved = tally.measuring.holding.pass_to_come, False
    for place, i in enumerate(places):
        noise = tally.measuring.outputs.noise(leaves[i].detach(), place) if leaves[i].dim() else None
        if noise is not None:
            leaves[i], is_moved = leaves[i] + noise, True
        leaves[i].register_hook(partial(_tell, tally, forward, leaves[i].detach(), noise, place))
    return tree_unflatten(leaves, structure) if is_moved else out


def _tell(
    tally: Tally, forward: int | None, output: Tensor, noise: Tensor | None, place: int, grad: Tensor | None
) -> None:
    tally.measuring.holding.backward_comes(forward)
    if grad is None or private_backward.is_batched(grad):
        return
    if not _fills_grad([weight for weight in tally.weights if _learns(weight)]):
        return
    private_backward.after_backward(tally.measuring.holding.backward_ended)
    if grad.dim():
        if grad.is_complex():
            output, grad = (torch.view_as_real(each.resolve_conj()).flatten(-2) for each in (output, grad))
        moved = told_of(place, output, noise, grad.detach())
        output, grad = rows_of(output), rows_of(grad)
        squares = grad.detach().float().square()
        energies = squares.sum(-1) if grad.dim() > 1 else squares
        energy = _whole(energies.sum())
        inverse, weights, trace = _whole(row_weights(output, grad.detach())).unbind()
        told = _whole(energies.sqrt().sum()), energy, energy * inverse, weights, energy * trace
        tally.measuring.residuals.arrived(*told, moved)


def _whole(told: Tensor) -> Tensor:
    """What all ranks of tensor parallelism tell together, where each has a part of an output."""
    return told.full_tensor() if isinstance(told, DTensor) else told


def _rows(grad: Tensor | None, every: Tensor) -> Tensor:
    if grad is None:
        return every
    nonzero = local_of(grad).ne(0)
    return (nonzero.any(-1) if nonzero.dim() > 1 else nonzero).sum().float()
