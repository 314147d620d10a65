"""The expected-loss term, 1/2 sum_i h_i sigma_i^2, of one optimizer's step.

What the probes gathered since the last step becomes a curvature estimate, and the gradient of the term is added to
``.grad``; the loss's own gradient is left alone. `update` holds the arithmetic; this file finds the factors that go
into it, the loss count T, the loss scale, the clipping. An optimizer that makes the term in its own pass is handed the
factors instead (`TakesTerms`). Source: LOTION, arXiv 2510.08757, and docs/objective.md.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lotion_fx import alike, private_backward
from lotion_fx.factors import Factors
from lotion_fx.optimizers import ascending
from lotion_fx.passes.attach.part import Part
from lotion_fx.passes.attach.probe import HEADER, Code, Header
from lotion_fx.passes.attach.sharded import gathered, is_cut
from lotion_fx.shards import Ranks, local_of, over_shards, part_of, sample, settle, shared_amax, summed
from lotion_fx.state import Smoothing, Weight
from lotion_fx.update import FISHER, GRADIENT, KEPT, MOMENT, VECTOR, Spec, curvature_of, gathered_in, stored, total_of

STRONG = 4.0
"""A strength above this may make the term outweigh the loss, and is kept within bounds."""

_PROVISIONAL = (None, Code.UNREACHED, Code.UNRESOLVED)  # another graph may yet show more
_UNCOUNTED = "nothing counted the loss terms of this step, which scale the term, so they are taken as 1"
Pairs = Sequence[tuple[Weight, Tensor]]  # each with the parameter that the optimizer steps


@dataclass(frozen=True, eq=False)
class Term:
    """One weight's term of one step, for an optimizer that makes it: ``grad + gain d/dw 1/2 sum_i h_i sigma_i^2``.

    Args:
        weight: of which the curvature is ``h = of_moment * exp_avg_sq + of_square * grad^2``, from the second moment as
            it is before the step and ``.grad`` as it is in memory.
        of_moment, of_square: 0-d float32, one of them 0.
        gain: 0-d float32: the strength, times the loss scale if that is still in ``.grad``.
        limit: 0-d float32: how large the term may be, times the root of ``h``.
    """

    weight: Weight
    of_moment: Tensor
    of_square: Tensor
    gain: Tensor
    limit: Tensor


@runtime_checkable
class TakesTerms(Protocol):
    """An optimizer with a pass of its own for the term.

    The hook leaves the gradients of parameters that `can_take` accepts alone, and puts their terms into ``terms``,
    emptied before, for the step that follows.
    """

    terms: dict[Tensor, Term]

    def can_take(self, parameter: Tensor, weight: Weight) -> bool: ...


class Own(NamedTuple):
    """What one weight's term is multiplied by, and how large it may be, see `update`; 0-d float32."""

    gain: Tensor
    limit: Tensor | None


class Step:
    """One optimizer's step of one model.

    Args:
        smoothing: the model's.
        optimizer: about to step.
        pairs: its weights that need a term, with their parameters, which have a ``.grad``.
        unscaled_by: the loss scale that a GradScaler divided out of the gradients already.
        pending: the loss scale that is still in the gradients.
    """

    def __init__(
        self,
        smoothing: Smoothing,
        optimizer: torch.optim.Optimizer,
        pairs: Pairs,
        unscaled_by: Tensor | None,
        pending: Tensor | None,
    ) -> None:
        self.settings, self.tally = smoothing.settings, smoothing.tally
        self.optimizer, self.pairs, self.pending = optimizer, pairs, pending
        self.loss_scale = unscaled_by if unscaled_by is not None else pending
        for _, parameter in pairs:
            settle(parameter)
        self.ranks = {w: Ranks.of(p, self.tally.mesh) for w, p in pairs if isinstance(p, DTensor)}
        self.group = self.tally.group or next((ranks.batch for ranks in self.ranks.values() if ranks.batch), None)
        self.device = pairs[0][1].device
        told = self.tally.loss_count
        self.loss_count = None if told is None else self.tally.terms.over_parts(told)
        self.is_resting = self.tally.resting
        self.noisy: set[Weight] = set()
        self.groups: dict[Tensor, dict[str, Any]] = {}
        self.moment_factors: dict[tuple[Tensor | float, float], Tensor] = {}

    def run(self) -> None:
        """Moves every weight's curvature, and adds its term or hands it over."""
        for weight, parameter in self.pairs if self.settings.reads_moment else ():
            if isinstance(moment := self._moment_of(parameter), Tensor):
                weight.curvature.moment = local_of(moment)
                weight.gathered.moment_has(self._steps_before(weight, parameter), self._decay(parameter))
        tally = self.tally
        known = self.pending, self.loss_scale, self.loss_count, self.group
        self.noisy = tally.measuring.observe(self.pairs, self.optimizer, *known, curvature_of, total_of)
        shrunk = self._shrunk()
        factors = self._factors(shrunk)
        vectors = self._payloads(factors)
        if self.group is not None or self.ranks:
            vectors = self._reduced(vectors, factors.row)
            factors = replace(factors, is_in=True)
        if tally.measuring.looks and not self.is_resting:
            tally.measuring.lags(self._gathered(vectors, factors))
        each = zip(self.pairs, vectors, map(Own, factors.gains, self._limits(factors)), strict=True)
        jobs = []
        for (weight, parameter), vector, own in each:
            if is_cut(weight.quantizer, parameter):
                self._add_to_cut(weight, parameter, vector, factors, own)
            elif (job := self._job(weight, parameter, vector, factors, own)) is not None:
                jobs.append(job)
        alike.run(self.settings.inner, jobs)
        if self.settings.reads_moment:
            self.tally.clipped(self._clip(shrunk), self._decay(self.pairs[0][1]), self._steps_before(*self.pairs[0]))
            for weight, parameter in self.pairs:
                if not isinstance(steps := self._steps_before(weight, parameter), Tensor):  # which will count by itself
                    weight.gathered.moment_has(steps + 1, self._decay(parameter))
        self.tally.took_in()

    # --------------------------------------------------------------------------------------------------------- factors

    def _factors(self, shrunk: Tensor | float) -> Factors:
        scale = 1.0 if self.loss_scale is None else self._on(self.loss_scale)
        total = summed(self._loss_count(), self.group).float()
        self.tally.counted(total)
        rising = ascending(self.optimizer)
        strengths = [
            0.0 if w.gathered.in_objective else self.tally.strength_of(w) * (-1.0 if p in rising else 1.0)
            for w, p in self.pairs
        ]
        gains = torch.tensor(strengths, dtype=torch.float32, device=self.device)
        pending = None if self.pending is None else self._on(self.pending).float()
        gains = gains if pending is None else gains * pending
        clip = None
        if self.settings.reads_moment:  # of clipped gradients; what is added to them is too, or its squares feed it
            clip = torch.as_tensor(self._clip(shrunk), dtype=torch.float32, device=self.device)
            if not self.tally.measuring.draws:  # else its size holds the clipping
                reads = [self._has_moment(p) for _, p in self.pairs]
                gains = torch.where(torch.tensor(reads, device=self.device), gains * clip, gains)
        draws = self.tally.draws if self.settings.samples_labels else None
        bounded = self._bound()
        clip = clip if bounded == MOMENT else None
        return Factors(total, gains.unbind(), scale, shrunk, pending, clip, bounded, draws)

    def _bound(self) -> str:
        """By what terms are kept small."""
        reads = self.settings.reads_moment
        if reads and self._has_moment(self.pairs[0][1]):
            return MOMENT
        is_strong = self.settings.strength > STRONG
        if any("dampening" in group for group in self.optimizer.param_groups):  # as SGD alone has
            return GRADIENT if reads or is_strong else ""
        return GRADIENT if reads and is_strong else ""

    def _limits(self, factors: Factors) -> list[Tensor | None]:
        """How large each weight's term may be, see `update`; None where it is not bounded."""
        if factors.bounded != GRADIENT:
            return [factors.limit if factors.bounded else None] * len(self.pairs)
        squares = torch.stack([local_of(_grad(p)).square().sum(dtype=torch.float64).view(1) for _, p in self.pairs])
        squares = over_shards(squares, [p for _, p in self.pairs])[:, 0]
        roots = [(x / p.numel()).sqrt().float() for x, (_, p) in zip(squares, self.pairs, strict=True)]
        return [(factors.limit * root).nan_to_num(0.0, math.inf) for root in roots]  # of a gradient that was zeroed 0

    def _on(self, factor: Tensor) -> Tensor:
        return factor.to(self.device)

    def _loss_count(self) -> Tensor:
        """T: loss terms of the step on this rank, counted where its backward passes began."""
        count = self.loss_count
        if count is None:
            if self.tally.term_steps == 0 and self.tally.steps_inside != self.tally.forwards:
                warnings.warn(f"{_UNCOUNTED}; {self._why_uncounted()}", stacklevel=2)
            return torch.ones((), dtype=torch.float32, device=self.device)
        return self._on(count.clamp(min=1))

    def _why_uncounted(self) -> str:
        if private_backward.current_backward() != -1:
            return "an optimizer steps inside backward(), before they are counted; step after it"
        if not any(self.tally.was_called(weight) for weight, _ in self.pairs):
            return "call the transformed model itself, not its forward() or a part of it"
        return "no output of the model had a gradient"

    @property
    def _ranks(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def _averaged_over(self, weight: Weight) -> int:
        """What divides the sum over ranks of a weight's payloads."""
        of_own = self.settings.samples_labels or not weight.is_analytic  # labels, or made of the step's gradient
        return self._ranks if of_own else self._ranks**2

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        if not self.groups:
            self.groups = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        return self.groups[parameter]

    def _decay(self, parameter: Tensor) -> float:
        """Of the optimizer's moving average of squared gradients."""
        decay: float = self._group_of(parameter).get("betas", (0.0, 0.999))[1]
        return decay

    def _steps_before(self, weight: Weight, parameter: Tensor) -> Tensor | float:
        """How many steps the optimizer has taken, by its own count for the parameter or the group, else by ours."""
        own = self.optimizer.state.get(parameter, {}).get("step", self._group_of(parameter).get("step"))
        if own is None:
            return weight.gathered.steps if isinstance(self._moment_of(parameter), Tensor) else 0
        return own

    def _shrunk(self) -> Tensor | float:
        """By what factor the gradients shrank since the backward pass, the loss scale included.

        Of a loop that averages them over processes since then, only the loss scale is known.
        """
        known = self.tally.gradients if self.settings.process_group is None else {}
        before = [(known[weight], sample(_grad(p))) for weight, p in self.pairs if weight in known]
        before = [(then, now) for then, now in before if then.shape == now.shape and then.numel()]
        if not before:
            return 1.0 if self.pending is not None or self.loss_scale is None else 1 / self.loss_scale
        then = torch.cat([a.float() for a, _ in before]).double()
        now = torch.cat([b.float() for _, b in before]).double()
        power = then.square().sum()
        return torch.where(power > 0, (then * now).sum() / power, 1.0)

    def _clip(self, shrunk: Tensor | float) -> Tensor | float:
        """By what factor gradients are clipped, which is that without the loss scale that is divided out of them."""
        return shrunk if self.loss_scale is None or self.pending is not None else shrunk * self._on(self.loss_scale)

    # -------------------------------------------------------------------------------------------------------- payloads

    def _payloads(self, factors: Factors) -> list[Tensor | None]:
        """Each weight's payload of this step, None where it comes from the gradient or rests."""
        return [self._payload(weight, parameter, factors) for weight, parameter in self.pairs]

    def _payload(self, weight: Weight, parameter: Tensor, factors: Factors) -> Tensor | None:
        vector = weight.gathered.probe.grad if weight.gathered.probe is not None else None
        if not self.is_resting and weight.curvature.code in _PROVISIONAL:
            weight.curvature.code = self._code(vector)
        if self.is_resting and self._rests(weight):
            return None
        if weight.is_analytic and (vector is not None or self.group is not None):
            # A rank whose batch did not use the weight has seen no position of it.
            device = local_of(parameter).device
            empty = torch.zeros(weight.layout.payload, dtype=torch.float32, device=device)
            return empty if vector is None else vector[:-HEADER]
        if (self.group is not None or weight in self.ranks) and not self.settings.reads_moment:
            return self._sharded_fisher(weight, parameter, factors.gradient)
        return None

    def _rests(self, weight: Weight) -> bool:
        """Whether a weight keeps its curvature in a step that gathers none.

        Passes of their own, which is all that ``"ggn"`` saves, tell nothing of squared gradients.
        """
        return weight.is_analytic or weight.curvature.code is None or not self.settings.samples_labels

    def _code(self, vector: Tensor | None) -> Code:
        """How the compiled graph made a weight's curvature. Reads the device once a weight."""
        if self.settings.reads_moment:
            return Code.BY_CHOICE
        return Code.UNREACHED if vector is None else Header.of(vector).common_code

    def _sharded_fisher(self, weight: Weight, parameter: Tensor, factor: Tensor) -> Tensor:
        """T * grad^2 as a payload of the whole weight, of which this rank fills in its shard."""
        shards = self.ranks[weight].shards if weight in self.ranks else 1  # the mean over ranks divides by them
        h = local_of(_grad(parameter)).float().square() * (factor * shards)
        return part_of(parameter, weight.layout).marginals(h)

    def _reduced(self, vectors: Sequence[Tensor | None], row: Tensor) -> list[Tensor | None]:
        """The payloads of the whole weights, with T in them: joined from shards, then summed over ranks."""
        known = {}
        for (weight, _), vector in zip(self.pairs, vectors, strict=True):
            if vector is not None:
                vector = vector.float()
                known[weight] = weight.layout.scaled(vector, row) if weight.is_analytic else vector
        for group in dict.fromkeys(ranks.model for ranks in self.ranks.values() if ranks.model is not None):
            shards = [w for w in known if w in self.ranks and self.ranks[w].model is group]
            known |= _summed(group, {weight: known[weight] / self.ranks[weight].copies for weight in shards})
        if self.group is not None:
            # A step's gradient is the mean over W ranks, in which rank r's terms have 1/W of the gradients that its
            # payload P_r was made of: one process makes T sum_r P_r / W^2, whoever has how many of the T terms.
            known = _summed(self.group, {w: v / self._averaged_over(w) for w, v in known.items()})
        return [known.get(weight) for weight, _ in self.pairs]

    def _gathered(self, vectors: Sequence[Tensor | None], factors: Factors) -> dict[Weight, float]:
        """The sum of the curvature that this step itself gathered, of each weight. Reads the device."""
        pairs = [(weight, p) for weight, p in self.pairs if not is_cut(weight.quantizer, p)]
        known = {w: vector for (w, _), vector in zip(self.pairs, vectors, strict=True) if vector is not None}
        squared = [(weight, p) for weight, p in pairs if weight not in known and not weight.is_analytic]
        sums = [gathered_in(vector.float(), weight.layout) * factors.row for weight, vector in known.items()]
        if squared:
            squares = [local_of(_grad(p)).float().square().sum(dtype=torch.float64).view(1) for _, p in squared]
            sums += (over_shards(torch.stack(squares), [p for _, p in squared])[:, 0] * factors.gradient).unbind()
        weights = [*known, *(weight for weight, _ in squared)]
        return dict(zip(weights, torch.stack(sums).tolist(), strict=True)) if sums else {}

    # ------------------------------------------------------------------------------------------------------------ jobs

    def _job(
        self, weight: Weight, parameter: Tensor, vector: Tensor | None, factors: Factors, own: Own
    ) -> tuple[Spec, list[Tensor]] | None:
        """The update of one weight and its arguments; None of an empty shard, and where an optimizer makes the term."""
        amax = shared_amax(weight.quantizer, parameter)  # by all ranks, also one whose shard is empty
        local, grad, part = local_of(parameter), local_of(_grad(parameter)), stored(weight, parameter)
        if not local.numel():
            return None
        return self._update(weight, parameter, (local, grad, part, local_of), [vector, *amax], factors, own)

    def _add_to_cut(self, weight: Weight, parameter: Tensor, vector: Tensor | None, factors: Factors, own: Own) -> None:
        """Updates a weight of which no rank can scale its own shard: whole on every rank, one weight at a time."""
        grad, part = gathered(_grad(parameter)), stored(weight, parameter)
        whole = gathered(parameter).detach(), grad, Part.whole(part.layout), gathered
        job = self._update(weight, parameter, whole, [vector], factors, own)
        assert job is not None  # no optimizer takes the term of a sharded weight
        alike.run(self.settings.inner, [job])
        local_of(_grad(parameter)).copy_(part.cut(grad))

    def _update(
        self,
        weight: Weight,
        parameter: Tensor,
        held: tuple[Tensor, Tensor, Part, Callable[[Tensor], Tensor]],
        given: list[Tensor | None],
        factors: Factors,
        own: Own,
    ) -> tuple[Spec, list[Tensor]] | None:
        """The update of what is held of a weight: values, gradient, part, and how the like of its tensors is had."""
        known, (values, grad, part, held_of) = weight.curvature, held
        vector, *amax = given
        payload = [] if vector is None else [vector]
        is_kept = known.code in (None, Code.ANALYTIC) or (self.is_resting and self._rests(weight))
        source = VECTOR if payload else KEPT if is_kept else FISHER
        state, factor = known.ema, None
        if self.settings.reads_moment:
            moment = self._moment_of(parameter)
            if self._is_taken(weight, parameter, moment, factors, own):
                return None
            if isinstance(moment, Tensor):  # no state of our own then
                known.ema = None
                source, payload, state, factor = MOMENT, [], held_of(moment), self._moment_factor(weight, factors)
        if source != MOMENT and (state is None or state.numel() != part.layout.payload + 1):
            state = known.ema = torch.zeros(part.layout.payload + 1, dtype=torch.float32, device=values.device)
        assert state is not None
        if source in (VECTOR, FISHER):
            factor = factors.row if source == VECTOR else factors.gradient
            if weight in self.noisy:  # curvature at other weights, and what is not finite teaches none
                factor = factor * math.nan
        scalars = (x for x in (*amax, factor, own.gain, own.limit) if x is not None)
        args = [values, grad, state, *payload, *scalars]
        return Spec.of(weight, source, part, factors.bounded, args), args

    def _has_moment(self, parameter: Tensor) -> bool:
        """Whether the optimizer averages squared gradients, or is to begin with its first step."""
        is_new = not self.optimizer.state.get(parameter)
        return isinstance(self._moment_of(parameter), Tensor) or (is_new and "betas" in self._group_of(parameter))

    def _moment_of(self, parameter: Tensor) -> Any:
        """The optimizer's second moment, if it has one."""
        return self.optimizer.state.get(parameter, {}).get("exp_avg_sq")

    def _moment_factor(self, weight: Weight, factors: Factors) -> Tensor:
        """Curvature over the optimizer's second moment, 0-d: weights of as many steps have the same."""
        steps = weight.gathered.moment_steps
        if not isinstance(steps, Tensor) or steps.device.type == "cpu":  # else it is not waited for
            steps = float(steps)
        key = steps, weight.gathered.moment_decay
        if key not in self.moment_factors:
            self.moment_factors[key] = self.tally.clipping.over_moment(factors.total, *key)
        return self.moment_factors[key]

    def _is_taken(self, weight: Weight, parameter: Tensor, moment: Any, factors: Factors, own: Own) -> bool:
        """Hands the term to an optimizer that makes it in its own pass, if it can; True if so."""
        optimizer, has_moment = self.optimizer, isinstance(moment, Tensor)
        if (
            not isinstance(optimizer, TakesTerms)
            or not (has_moment or weight.curvature.ema is None)
            or own.limit is None
        ):
            return False
        if not optimizer.can_take(parameter, weight):
            return False
        zero = torch.zeros_like(factors.total)
        pair = (self._moment_factor(weight, factors), zero) if has_moment else (zero, factors.gradient)
        optimizer.terms[parameter] = Term(weight, *pair, own.gain, own.limit)
        weight.curvature.ema = None
        return True


def _summed(group: Any, vectors: dict[Weight, Tensor]) -> dict[Weight, Tensor]:
    """Vectors summed over ranks, in one all-reduce."""
    if not vectors:
        return {}
    joined = summed(torch.cat(list(vectors.values())), group)
    return dict(zip(vectors, joined.split([v.numel() for v in vectors.values()]), strict=True))


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None  # the hook passes on no parameter without one
    return parameter.grad
