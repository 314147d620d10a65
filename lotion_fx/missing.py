"""Curvature that did not come with its gradient: why, and what to do about it.

The cause is looked for when an optimizer steps, stands in the report until the next step, and is told once a weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lotion_fx import private_backward
from lotion_fx.passes.attach.attach import STE
from lotion_fx.passes.attach.probe import Code
from lotion_fx.shards import sample
from lotion_fx.state import Smoothing, Weight

IDLE = "no gradient in the last step"
IN_EVAL = "in eval() at the last step, thus trained at its rounded values; call train()"
IN_BACKWARD = "stepped inside backward(), before its curvature arrived"
NOT_CALLED = "the transformed model itself was not called before the last step"
OUTSIDE = Code.UNREACHED.reason

_ADVICE = {
    IN_EVAL: "in eval() the forward runs at rounded weights, and these train there; call train() before the training "
    "forward, and leave only dropout and normalization in eval()",
    IN_BACKWARD: "an optimizer steps inside backward(), before curvature arrives; step after it",
    NOT_CALLED: "the call that transform compiled did not run; call the transformed model itself, not its forward() or "
    "a part of it, and do not compile it again",
    OUTSIDE: "the code ran in Python, as that of recurrent modules does, what follows a graph break, and what is in "
    "none of regions=",
}


def look_for_missing(smoothing: Smoothing, weights: Sequence[Weight], gradients: Sequence[Tensor]) -> None:
    """Finds out why curvature is missing, before a step uses what there is, and warns of what nobody can have meant.

    Args:
        smoothing: the model's.
        weights: those that an optimizer is about to step, with their gradients.
    """
    told: dict[str, list[str]] = {}
    is_asked = _is_asked(smoothing)
    due = [weight for weight in weights if _is_due(weight)] if is_asked else []
    # Where no curvature is to come, those that were idle before are looked at.
    doubtful = due if is_asked else [weight for weight in weights if weight.curvature.was_idle]
    idle = _idle(doubtful, dict(zip(weights, gradients, strict=True)))
    for weight in weights:
        known = weight.curvature
        known.was_idle |= weight in idle
        known.absent = IDLE if weight in idle else _cause(weight, is_due=weight in due)
        if known.absent not in ("", IDLE) and not known.is_missed:
            known.is_missed = True
            told.setdefault(_effect(weight) + "; " + _ADVICE[known.absent], []).append(weight.name)
    for text, names in told.items():
        warnings.warn(text.format(", ".join(names)), stacklevel=2)


def has_curvature(weight: Weight) -> bool:
    """Whether a probe gathered some since the last step."""
    return weight.gathered.probe is not None and weight.gathered.probe.grad is not None


def _is_asked(smoothing: Smoothing) -> bool:
    """Whether graphs are asked for curvature in this step."""
    tally = smoothing.tally
    return tally.has_term and not tally.settings.reads_moment and (tally.pass_is_due or not tally.resting)


def _is_due(weight: Weight) -> bool:
    """Whether curvature should have come from a graph in this step, which asked for it, and did not."""
    if has_curvature(weight) or weight.gathered.in_loss:
        return False
    # Another rank's batch may have used the weight. What no graph contained in its first step with a term is known.
    return weight.smoothing.tally.group is None if weight.is_analytic else weight.curvature.code is None


def _idle(due: Sequence[Weight], gradients: Mapping[Weight, Tensor]) -> set[Weight]:
    """Those due that nothing used in this step, though they have a gradient: of zeros. May read the device."""
    if not due:
        return set()
    used = torch.stack([sample(gradients[w]).any().to(gradients[due[0]].device) for w in due]).tolist()
    return {weight for weight, is_used in zip(due, used, strict=True) if not is_used}


def _cause(weight: Weight, *, is_due: bool) -> str:
    tally = weight.smoothing.tally
    has_none = not has_curvature(weight)
    if has_none and not weight.training and tally.forward_mode != STE:
        return IN_EVAL
    outside = has_none and not weight.is_analytic and tally.has_term
    if outside and not tally.settings.reads_moment and not tally.was_called(weight):
        return NOT_CALLED
    if not is_due:
        return ""
    if private_backward.current_backward() != -1:  # from the next forward on, curvature is there first
        return "" if tally.steps_inside == tally.forwards else IN_BACKWARD
    return OUTSIDE if tally.was_called(weight) else NOT_CALLED


def _effect(weight: Weight) -> str:
    """What comes of it, with a place for the names of all weights with the same."""
    if not weight.smoothing.tally.has_term:
        return "{} trained at rounded weights"
    if weight.is_analytic:
        return "the curvature of {} did not arrive with its gradient, so the last one is kept"
    if weight.curvature.absent == OUTSIDE:
        return "no compiled graph contains {}, so the term takes the Fisher form there"
    return "the curvature of {} did not arrive with its gradient, so the term takes the Fisher form there"
