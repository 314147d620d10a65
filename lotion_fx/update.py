"""One weight's update at a step: its curvature state moves, and the term's gradient is added to ``grad``.

Per weight a float32 state vector holds

    factored   EMA of [ T * rows | cols | norm | 1 ]      h = rows * cols / (norm * mass), rank one in each group
    full       EMA of [ T * h | 1 ]                       h = h / mass
    fisher     the optimizer's ``exp_avg_sq`` times T, and no state; an EMA of T * grad^2 where there is none

whose last element, the mass, is what bias correction divides by. A weight that no graph proves linear takes T * grad^2
as its h in the first two, reduced to rows and columns in the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lotion_fx.alike import make_of
from lotion_fx.numerics.quantizer import Quantizer
from lotion_fx.numerics.rounding import written
from lotion_fx.passes.attach.part import Part
from lotion_fx.passes.attach.probe import Layout
from lotion_fx.passes.attach.sharded import is_cut
from lotion_fx.passes.lower import lower
from lotion_fx.shards import local_of, part_of
from lotion_fx.state import Weight

VECTOR, FISHER, MOMENT, KEPT = "vector", "fisher", "moment", "kept"  # where an update takes its curvature from
GRADIENT = "gradient"  # what bounds a term beside `MOMENT`


@dataclass(frozen=True, eq=False)
class Spec:
    """All that the code of one weight's update depends on; called with its arguments, it is that update.

    Args:
        source: ``"vector"`` (a payload is given), ``"fisher"`` (from the gradient), ``"moment"`` (exp_avg_sq is given),
            ``"kept"`` (the state as it is).
        quantizer: whose noise's variance is the term's.
        part: of the weight that this rank holds.
        decay: of the EMA.
        tensors: of the arguments.
        bounded: by what the term is kept small, `MOMENT`, `GRADIENT` or nothing: see `_update_one`.
        kernel: whether a Triton kernel adds the term, see `passes.lower`.
    """

    source: str
    quantizer: Quantizer
    part: Part
    decay: float
    tensors: tuple[Any, ...]
    bounded: str = ""
    kernel: bool = False

    @staticmethod
    def of(weight: Weight, source: str, part: Part, bounded: str, args: Sequence[Tensor]) -> Spec:
        """The one `Spec` of this make: equal ones are the same object, found again without comparing them."""
        tensors = make_of(args)
        quantizer, decay = weight.quantizer, weight.smoothing.tally.decay
        key = (source, quantizer, part, decay, tensors, bounded)
        known = weight.curvature.specs.get(source)
        if known is None or known[0] != key:
            fmt, axis, arch, (local, grad) = quantizer.format, quantizer.axis, lower.arch_of(args[0].device), args[:2]
            kernel = (
                arch is not None
                and grad.is_contiguous()
                and not bounded
                and lower.prefers_kernel("term", local, fmt, axis, arch)
            )
            spec = Spec(source, quantizer, part, decay, tensors, bounded, kernel)
            known = weight.curvature.specs[source] = key, _specs.setdefault(key, spec)
        return known[1]

    def __call__(self, args: Sequence[Tensor]) -> None:
        _update_one(self, args)


_specs: dict[Any, Spec] = {}


def dense(state: Tensor, part: Part) -> Tensor:
    """h over a part of a weight, float32, from a state vector; 0 where nothing was seen yet.

    Args:
        state: ``[payload | mass]`` of the whole weight.
    """
    layout, mass = part.layout, state[-1]
    if layout.kind != "factored":
        h = part.cut(state[:-1].view(layout.shape))
        return torch.where(mass > 0, h / mass, 0.0)
    rows, cols = factors(state, layout)
    if part.is_whole:
        return (rows[:, :, None] * cols[:, None, :]).reshape(part.shape)
    index = part.rows(state.device)
    by_row = cols[index // layout.rows].index_select(1, part.columns(state.device))
    return (rows.reshape(-1)[index][:, None] * by_row).reshape(part.shape)


def factors(state: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """[groups, rows] and [groups, columns] of a factored h, whose product is h itself; 0 where nothing was seen yet."""
    rows, cols, norm = layout.split(state)
    divisor = norm * state[-1]
    is_seen = divisor > torch.finfo(torch.float32).tiny  # else h has underflowed, and the reciprocal is infinite
    return rows, torch.where(is_seen, 1 / divisor, 0.0)[:, None] * cols


def marginals(h: Tensor, layout: Layout) -> Tensor:
    """The factored payload [rows | cols | norm] whose rank-one product is nearest a full h (Adafactor, eq. 1)."""
    h = h.reshape(layout.factors)
    return torch.cat([h.sum(2).flatten(), h.sum(1).flatten(), h.sum((1, 2))])


def _update_one(spec: Spec, args: Sequence[Tensor]) -> None:
    """Moves one weight's state and adds the term's gradient to its ``grad``, both in place.

    ``args``: weight, grad, its state (moment: exp_avg_sq), the payload (vector), amax_tensor if the format needs one
    from elsewhere, and 0-d what h is multiplied by (none of a state that is kept), the gain of the term, and its
    ``limit`` if it is bounded. A payload is multiplied by T over the squared loss scale, the square of ``grad`` by T
    over the squared factor by which it was scaled or clipped, exp_avg_sq by what makes it a mean of such squares.

    Where h is read from a second moment that holds the squares of the term as well, the term is at most ``limit`` times
    the root of h, half of the gradients' root mean square: so it can no more than double that moment's root, and what
    it is made of does not grow with it. Under an optimizer that divides by no such root a strong term is at most
    ``limit``, half of the root of the weight's mean squared gradient: bound by weights it could grow with them.
    """
    weight, grad, state, *given = args
    limit = given.pop() if spec.bounded else None
    gain, layout, h, moved = given.pop(), spec.part.layout, None, None
    if spec.source == KEPT:
        moved = state
    elif spec.source == MOMENT:
        h = state.float() * given.pop()
    else:
        factor = given.pop()
        if spec.source == VECTOR:
            payload = layout.scaled(given.pop(0).float(), factor)
        else:
            squared = grad.float().square() * factor
            payload = marginals(squared, layout) if layout.kind == "factored" else squared.reshape(-1)
        fresh = torch.cat([payload, payload.new_ones(1)])
        # A step that overflowed in half precision teaches nothing.
        moved = torch.where(payload.sum().isfinite(), torch.lerp(state, fresh, 1 - spec.decay), state)
        moved = written(moved) if layout.kind == "factored" else moved  # short, and read by every element
        state.copy_(moved)
    amax = given[0] if given else None
    if spec.kernel:
        _add_by_kernel(spec, weight, grad, h, moved, 0.5 * gain, amax)
        return
    h = dense(moved, spec.part) if moved is not None else h
    assert h is not None
    term = 0.5 * gain * spec.quantizer.variance_vjp(weight, h.view(weight.shape), amax_tensor=amax)
    if limit is not None:
        reach = limit * h.view(weight.shape).sqrt() if spec.bounded == MOMENT else limit
        term = torch.minimum(torch.maximum(term, -reach), reach)
    grad.add_(term.to(grad.dtype))


def _add_by_kernel(
    spec: Spec,
    weight: Tensor,
    grad: Tensor,
    h: Tensor | None,
    state: Tensor | None,
    factor: Tensor,
    amax: Tensor | None,
) -> None:
    """Adds the term's gradient in one pass over the weight, where h is factored without making it."""
    from lotion_fx.kernels.smooth import add_term  # Triton is not everywhere

    layout, cols, rows = spec.part.layout, None, 1
    if state is not None and layout.kind == "factored" and spec.part.is_whole:
        by_row, by_col = factors(state, layout)
        h, cols, rows = by_row.reshape(-1), by_col.reshape(-1), layout.rows
    elif state is not None:
        h = dense(state, spec.part)
    assert h is not None
    h = h if cols is not None else h.reshape(weight.shape).contiguous()
    add_term(grad, weight, h, cols, rows, factor, *spec.quantizer.constants, amax)


def term_of(weight: Weight) -> Tensor | None:
    """This rank's ``1/2 sum_i h_i sigma_i^2`` of one weight, 0-d, without strength; None before a step and frozen."""
    parameter = weight.parameter()
    has_term = weight.selected and not weight.smoothing.tally.is_frozen(weight)
    h = curvature_of(weight, parameter) if parameter is not None and has_term else None
    if parameter is None or h is None:
        return None
    size = weight.smoothing.tally.measuring.size(weight)
    return 0.5 * size * (h * weight.quantizer.variance(local_of(parameter))).sum()


def curvature_of(weight: Weight, parameter: Tensor) -> Tensor | None:
    """h over this rank's part of a weight, float32; None before its first step."""
    known, tally = weight.curvature, weight.smoothing.tally
    if known.moment is not None and tally.last_loss_count is not None:
        steps, decay = weight.gathered.moment_steps, weight.gathered.moment_decay
        return known.moment.float() * tally.clipping.over_moment(tally.last_loss_count, steps, decay)
    return None if known.ema is None else dense(known.ema, stored(weight, parameter))


def total_of(weight: Weight, parameter: Tensor) -> Tensor:
    """The sum of `curvature_of`, float64 [1], without making it where it is factored; 0 before the first step."""
    state, part = weight.curvature.ema, stored(weight, parameter)
    if state is not None and part.layout.kind == "factored" and part.is_whole:
        rows, cols = factors(state, part.layout)
        return (rows.sum(1, dtype=torch.float64) * cols.sum(1, dtype=torch.float64)).sum().view(1)
    h = curvature_of(weight, parameter)
    h = torch.zeros((), device=parameter.device) if h is None else h
    return h.sum(dtype=torch.float64).view(1)


def gathered_in(payload: Tensor, layout: Layout) -> Tensor:
    """The sum of the h that one step's payload is of, 0-d float64, without making it where it is factored."""
    if layout.kind != "factored":
        return payload.sum(dtype=torch.float64)
    rows, cols = factors(torch.cat([payload, payload.new_ones(1)]), layout)
    return (rows.sum(1, dtype=torch.float64) * cols.sum(1, dtype=torch.float64)).sum()


def stored(weight: Weight, parameter: Tensor) -> Part:
    """The part that this rank's shard is of what a weight's state is of: the whole weight, or the shard itself."""
    if not weight.smoothing.settings.reads_moment:
        return part_of(parameter, weight.layout)
    if is_cut(weight.quantizer, parameter):  # its updates are made whole
        return part_of(parameter, Layout("full", weight.shape, 1, weight.shape[0]))
    local = local_of(parameter)
    return Part.whole(Layout("full", tuple(local.shape), 1, local.shape[0]))
