"""The expected-loss term, 1/2 sum_i h_i sigma_i^2: when and how its gradient enters.

The loss's own gradient is left alone. Just before any optimizer steps, one hook turns what the probes gathered since
the last step into a curvature estimate and adds the gradient of the term to ``.grad``: after accumulation, after
reduction over ranks, after clipping. `update` holds the arithmetic; this file finds the factors that go into it, the
number of loss terms T, the loss scale, the clipping. An optimizer that makes the term in its own pass is handed the
factors instead (`TakesTerms`). Source: LOTION, arXiv 2510.08757, and docs/objective.md.
"""

from __future__ import annotations

import inspect
import math
import warnings
import weakref
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lotion_fx import variants as backend
from lotion_fx.numerics import rounding
from lotion_fx.passes.attach.probe import HEADER, Code
from lotion_fx.state import Smoothing, Weight, local_of, registry, sample, weights_of
from lotion_fx.update import FISHER, HELD, MOMENT, VECTOR, Spec, curvature_of, span_of, stored, update


def install() -> None:
    """Hooks every optimizer's step, once per process."""
    global _handles
    if not _handles:
        _handles = [register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step)]
        backend.watch_grad_scaler()


_handles: list[Any] = []
_stepping: list[torch.optim.Optimizer] = []  # one may step another inside its own step: ZeroRedundancyOptimizer does
_done: weakref.WeakSet[Weight] = weakref.WeakSet()  # weights that have their term in the outermost of those steps
_PROVISIONAL = (Code.UNREACHED, Code.UNRESOLVED)  # another graph may yet show more


@dataclass(frozen=True, eq=False)
class Term:
    """One weight's term of one step, for an optimizer that makes it: ``grad + gain d/dw 1/2 sum_i h_i sigma_i^2``.

    Args:
        weight: of which the curvature is ``h = of_moment * exp_avg_sq + of_square * grad^2``, from the second moment as
            it is before the step and ``.grad`` as it is in memory.
        of_moment, of_square: 0-d float32, one of them 0.
        gain: 0-d float32: the strength, times the loss scale if that is still in ``.grad``.
    """

    weight: Weight
    of_moment: Tensor
    of_square: Tensor
    gain: Tensor


@runtime_checkable
class TakesTerms(Protocol):
    """An optimizer with a pass of its own for the term.

    The hook leaves the gradients of parameters that `can_take` accepts alone, and puts their terms into ``terms``,
    emptied before, for the step that follows.
    """

    terms: dict[Tensor, Term]

    def can_take(self, parameter: Tensor, weight: Weight) -> bool: ...


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    """Adds the term now, or after each call of the closure where the optimizer makes the gradients itself."""
    _stepping[:] = [outer for outer in _stepping if outer is not optimizer and _is_running(outer)]
    if not _stepping:
        _done.clear()
    _stepping.append(optimizer)
    where = "kwargs" if kwargs.get("closure") is not None else "args" if len(args) > 1 and callable(args[1]) else None
    if where is None:
        add_term(optimizer)
        return None
    closure = kwargs["closure"] if where == "kwargs" else args[1]
    if isinstance(closure, _WithTerm):  # of the optimizer around this one
        return None
    closure = _WithTerm(closure, optimizer)
    return (args, {**kwargs, "closure": closure}) if where == "kwargs" else ((args[0], closure, *args[2:]), kwargs)


def _is_running(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of this optimizer is on the stack: one that raised never came to its end."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
    if optimizer in _stepping:
        del _stepping[_stepping.index(optimizer) :]


class _WithTerm:
    """An optimizer's closure with the term added to what each call of it leaves in ``.grad``."""

    def __init__(self, closure: Any, optimizer: torch.optim.Optimizer) -> None:
        self.closure, self.optimizer, self.calls = closure, optimizer, 0

    def __call__(self) -> Any:
        with torch.enable_grad():
            loss = self.closure()
        _done.clear()
        add_term(self.optimizer, counts=self.calls == 0)
        self.calls += 1
        return loss


@torch.no_grad()
def add_term(optimizer: torch.optim.Optimizer, *, counts: bool = True) -> None:
    """Adds the expected-loss term's gradient to the ``.grad`` of every smoothed weight that an optimizer steps.

    Args:
        counts: whether this is one more step of the training.
    """
    if isinstance(optimizer, TakesTerms):
        optimizer.terms.clear()  # of a step that raised
    mine: dict[Smoothing, list[tuple[Weight, Tensor]]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            weight = registry[parameter]
            if weight is not None and weight not in _done:
                weight.master = weight.master if _is(weight.master, parameter) else weakref.ref(parameter)
                if parameter.grad is not None and weight.selected:
                    mine.setdefault(weight.smoothing, []).append((weight, parameter))
                    _done.add(weight)
    unscaled_by, pending = backend.take_grad_scale(optimizer), getattr(optimizer, "grad_scale", None)
    for smoothing, pairs in mine.items():
        # What a moment stream put into the loss needs no more, unless another graph without the loss used the weight.
        outside = [(w, p) for w, p in pairs if not w.in_loss or (w.probe is not None and w.probe.grad is not None)]
        for weight, _ in pairs:
            weight.certificate = weight.certificate if weight.in_loss else None
        if smoothing.has_term and outside:
            _Step(smoothing, optimizer, unscaled_by, pending).run(outside)
        _advance(smoothing, pairs, counts)


class _Step:
    """One optimizer's step of one model: the factors that all its weights share, then each weight's update."""

    def __init__(
        self, smoothing: Smoothing, optimizer: torch.optim.Optimizer, unscaled_by: Tensor | None, pending: Tensor | None
    ) -> None:
        self.smoothing, self.optimizer = smoothing, optimizer
        self.loss_scale = unscaled_by if unscaled_by is not None else pending
        self.pending = pending

    def run(self, pairs: list[tuple[Weight, Tensor]]) -> None:
        smoothing = self.smoothing
        self.group = smoothing.group or next((_mesh_group(p) for _, p in pairs if isinstance(p, DTensor)), None)
        terms = self._terms(pairs[0][1].device)
        loss_scale = 1.0 if self.loss_scale is None else self.loss_scale.to(terms.device)
        shrunk = self._clip(pairs)
        clip = shrunk if self.pending is not None else shrunk * loss_scale
        smoothing.known_terms = self._all(terms).float()
        self.row_factor = (terms / loss_scale**2).float()
        if smoothing.curvature == "ggn":  # of the pass's own loss, which nothing scaled
            self.row_factor = torch.full_like(self.row_factor, 1 / smoothing.draws)
        self.grad_factor = (smoothing.known_terms / (loss_scale * shrunk) ** 2).float()
        self.none = torch.zeros_like(self.grad_factor)
        clip2 = None if smoothing.clip2 is None else smoothing.clip2.to(terms.device)
        # None where the optimizer's state was loaded without ours: then from the count of its steps, weight by weight.
        self.moment_factor = None if clip2 is None else torch.where(clip2 > 0, smoothing.known_terms / clip2, self.none)
        gains = [0.0 if weight.entered else weight.joint_strength for weight, _ in pairs]
        scale = 1.0 if self.pending is None else self.pending.to(terms.device)
        self.gains = (torch.tensor(gains, device=terms.device) * scale).unbind()
        vectors = self._payloads(pairs)
        work = [self._job(*pair, vector, gain) for pair, vector, gain in zip(pairs, vectors, self.gains, strict=True)]
        update(smoothing.inner, [job for job in work if job is not None])
        if smoothing.curvature == "fisher" and not smoothing.stepped:
            now = torch.as_tensor(clip, dtype=torch.float32, device=terms.device) ** 2
            decay = self._decay(pairs[0][1])
            taken = self.optimizer.state.get(pairs[0][1], {}).get("step", 0)  # steps whose clipping nobody saw
            before = 1 - decay**taken if smoothing.clip2 is None else smoothing.clip2
            smoothing.clip2 = decay * before + (1 - decay) * now
        smoothing.stepped = True

    def _terms(self, device: torch.device) -> Tensor:
        """T: loss terms of the step on this rank, counted where its backward passes began."""
        smoothing = self.smoothing
        if smoothing.terms is None:
            if smoothing.steps == 0:
                warnings.warn(
                    "no graph tells the number of loss terms, which scales the term; it is taken as 1", stacklevel=2
                )
            return torch.ones((), device=device)
        return smoothing.terms.clamp(min=1).to(device)

    def _decay(self, parameter: Tensor) -> float:
        """Of the optimizer's moving average of squared gradients."""
        group = next(g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"]))
        return group.get("betas", (0.0, 0.999))[1]

    def _clip(self, pairs: list[tuple[Weight, Tensor]]) -> Tensor | float:
        """By what factor the gradients shrank since the backward pass, the loss scale included."""
        before = [(self.smoothing.snapshot[w], sample(_grad(p))) for w, p in pairs if w in self.smoothing.snapshot]
        before = [(then, now) for then, now in before if then.shape == now.shape and then.numel()]
        if not before:
            return 1.0 if self.pending is not None or self.loss_scale is None else 1 / self.loss_scale
        then = torch.cat([a.float() for a, _ in before]).double()
        now = torch.cat([b.float() for _, b in before]).double()
        power = then.square().sum()
        return torch.where(power > 0, (then * now).sum() / power, 1.0)

    def _all(self, value: Tensor) -> Tensor:
        if self.group is None:
            return value
        value = value.clone()
        dist.all_reduce(value, group=self.group)
        return value

    def _payloads(self, pairs: list[tuple[Weight, Tensor]]) -> list[Tensor | None]:
        """Each weight's payload of this step, None where it comes from the gradient."""
        vectors: list[Tensor | None] = []
        for weight, parameter in pairs:
            vector = weight.probe.grad if weight.probe is not None else None
            resting = self.smoothing.resting
            if not resting and (weight.code is None or weight.code in _PROVISIONAL):
                weight.code = _read_code(vector, self.smoothing)
            if resting and weight.code in (None, Code.ANALYTIC):
                vectors.append(None)
            elif weight.code is Code.ANALYTIC and (vector is not None or self.group is not None):
                # A rank whose batch did not use the weight has seen no position of it.
                empty = torch.zeros(weight.layout.payload, device=local_of(parameter).device)
                vectors.append(empty if vector is None else vector[:-HEADER])
            elif self.group is not None and self.smoothing.curvature != "fisher":
                vectors.append(self._sharded_fisher(weight, parameter))
            else:
                vectors.append(None)
        held = [w for w, _ in pairs if w.code is Code.ANALYTIC and (w.probe is None or w.probe.grad is None)]
        expected = self.smoothing.pass_is_due or not self.smoothing.resting
        if self.group is None and expected and (new := [w.name for w in held if not w.warned]):
            for weight in held:
                weight.warned = True
            warnings.warn(
                f"the curvature of {', '.join(new)} did not arrive with its gradient, so the last one is kept; it "
                "takes a forward in train() mode and a backward()",
                stacklevel=2,
            )
        if unreached := [w.name for w, _ in pairs if w.code is Code.UNREACHED and w.steps == 0]:
            warnings.warn(
                f"no compiled graph contains {', '.join(unreached)}; the term takes the Fisher form there. "
                "If that is a surprise: transform the outermost module, and call it, not its forward().",
                stacklevel=2,
            )
        return vectors if self.group is None else self._reduced(pairs, vectors)

    def _sharded_fisher(self, weight: Weight, parameter: Tensor) -> Tensor:
        """T * grad^2 as a payload of the whole weight, of which this rank fills in its shard."""
        grad, (start, stop) = local_of(_grad(parameter)), span_of(parameter)
        layout, shares = weight.layout, dist.get_world_size(self.group) if isinstance(parameter, DTensor) else 1
        h = grad.float().square() * (self.grad_factor * shares)
        if layout.kind == "full":
            inner = math.prod(layout.shape[1:])
            return torch.cat([h.new_zeros(start * inner), h.flatten(), h.new_zeros((layout.shape[0] - stop) * inner)])
        groups, rows, cols = layout.factors
        each = groups * rows // layout.shape[0]
        flat, index = h.reshape(-1, cols), torch.arange(start * each, stop * each, device=h.device)
        of_rows = h.new_zeros(groups * rows).index_copy(0, index, flat.sum(1))
        of_cols = h.new_zeros(groups, cols).index_add(0, index // rows, flat)
        return torch.cat([of_rows, of_cols.flatten(), of_rows.view(groups, rows).sum(1)])

    def _reduced(self, pairs: list[tuple[Weight, Tensor]], vectors: list[Tensor | None]) -> list[Tensor | None]:
        """The payloads averaged over ranks, in one all-reduce: each rank's own T is in its rows before."""
        flat: list[Tensor] = []
        for (weight, _), vector in zip(pairs, vectors, strict=True):
            if vector is None:
                continue
            layout, vector = weight.layout, vector.float().clone()
            if weight.code is Code.ANALYTIC:
                scaled = layout.groups * layout.rows if layout.kind == "factored" else vector.numel()
                vector[:scaled] *= self.row_factor
            flat.append(vector)
        if flat:
            joined = torch.cat(flat)
            dist.all_reduce(joined, group=self.group)
            joined /= dist.get_world_size(self.group)
            parts = iter(joined.split([v.numel() for v in flat]))
            vectors = [None if v is None else next(parts) for v in vectors]
        self.row_factor = torch.ones_like(self.row_factor)
        return vectors

    def _job(
        self, weight: Weight, parameter: Tensor, vector: Tensor | None, gain: Tensor
    ) -> tuple[Spec, list[Tensor]] | None:
        """The update of one weight and its arguments; None for an empty shard."""
        assert weight.format is not None
        local, grad = local_of(parameter), local_of(_grad(parameter))
        amax = _amax(weight, parameter)  # by all ranks, also one whose shard is empty
        if not local.numel():
            return None
        (layout, span), given = stored(weight, parameter), [] if vector is None else [vector]
        source = VECTOR if given else HELD if weight.code in (None, Code.ANALYTIC) else FISHER
        if self.smoothing.curvature == "fisher":
            moment = self.optimizer.state.get(parameter, {}).get("exp_avg_sq")
            if self._is_taken(weight, parameter, moment, gain):
                return None
            if isinstance(moment, Tensor):
                return self._moment_job(
                    weight, parameter, [local, grad, local.new_zeros(0), local_of(moment)], amax, gain
                )
        if weight.ema is None or weight.ema.numel() != layout.payload + 1:
            weight.ema = torch.zeros(layout.payload + 1, device=local.device)
        args = [local, grad, weight.ema, *given, *amax]
        args += [self.row_factor, self.grad_factor, gain]
        return Spec.of(weight, source, layout, span, args), args

    def _moment_job(
        self, weight: Weight, parameter: Tensor, args: list[Tensor], amax: list[Tensor], gain: Tensor
    ) -> tuple[Spec, list[Tensor]]:
        """The update whose curvature is the optimizer's second moment, and with no state of our own."""
        weight.ema, weight.moment = None, args[-1]
        args = [*args, *amax, self.row_factor, self._moment_factor(parameter), gain]
        layout, span = stored(weight, parameter)
        return Spec.of(weight, MOMENT, layout, span, args), args

    def _moment_factor(self, parameter: Tensor) -> Tensor:
        """Curvature over the optimizer's second moment.

        That moment is of clipped gradients: over the same average of squared clipping factors it is a weighted mean of
        unclipped squares, and no bias is left to correct.
        """
        if self.moment_factor is not None:
            return self.moment_factor
        count = torch.as_tensor(self.optimizer.state[parameter].get("step", 0), dtype=torch.float32)
        clip2 = (1 - self._decay(parameter) ** count).to(local_of(parameter).device)
        assert self.smoothing.known_terms is not None
        return torch.where(clip2 > 0, self.smoothing.known_terms / clip2, 0.0)

    def _is_taken(self, weight: Weight, parameter: Tensor, moment: Any, gain: Tensor) -> bool:
        """Hands the term to an optimizer that makes it in its own pass, if it can; True if so."""
        optimizer, has_moment = self.optimizer, isinstance(moment, Tensor)
        if not isinstance(optimizer, TakesTerms) or not (has_moment or weight.ema is None):
            return False
        if not optimizer.can_take(parameter, weight):
            return False
        factors = (self._moment_factor(parameter), self.none) if has_moment else (self.none, self.grad_factor)
        optimizer.terms[parameter] = Term(weight, *factors, gain)
        weight.ema = None
        return True


def _advance(smoothing: Smoothing, pairs: list[tuple[Weight, Tensor]], counts: bool) -> None:
    """Closes a step: probes are emptied, the step is counted, and the finishing phase begins when its time has come."""
    for weight, _ in pairs:
        weight.drop_probe()
        weight.steps += counts
        weight.entered = weight.in_loss = False
        smoothing.snapshot.pop(weight, None)
    smoothing.closed = True
    smoothing.steps = max(smoothing.steps, *(weight.steps for weight, _ in pairs))
    if smoothing.finish and smoothing.total_steps and not smoothing.finishing:
        smoothing.finishing = smoothing.steps >= round(smoothing.total_steps * (1 - smoothing.finish))


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None  # `add_term` passes on no parameter without one
    return parameter.grad


def _read_code(vector: Tensor | None, smoothing: Smoothing) -> Code:
    """How the compiled graph made this weight's curvature, from the probe's header. Reads the device once a weight."""
    if smoothing.curvature == "fisher":
        return Code.BY_CHOICE
    if vector is None:
        return Code.UNREACHED
    calls, code, _ = vector[-HEADER:].tolist()
    mean = code / calls if calls else -1.0
    return Code(int(mean)) if mean in set(Code) else Code.MIXED


def _is(reference: Any, value: Any) -> bool:
    return reference is not None and reference() is value


def _mesh_group(parameter: DTensor) -> Any:
    """The process group over which a fully sharded parameter's gradients are averaged."""
    mesh = parameter.device_mesh
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()


def _amax(weight: Weight, parameter: Tensor) -> list[Tensor]:
    """The tensor-wide absmax over all shards, for the formats that need it of a sharded weight."""
    fmt = weight.format
    assert fmt is not None
    if not isinstance(parameter, DTensor):
        return []
    _check_blocks(weight, parameter)
    if not (fmt.block == "tensor" or fmt.law.two_level):
        return []
    if fmt.block == "tensor":
        raise ValueError(
            f"fmt: {fmt.name!r} has one differentiable scale for all of {weight.name!r}, which is sharded; "
            "use a block or channel format under FSDP, such as 'int4' or 'nvfp4'"
        )
    local = local_of(parameter)
    amax = local.abs().amax().float() if local.numel() else torch.zeros((), device=local.device)
    dist.all_reduce(amax, dist.ReduceOp.MAX, group=_mesh_group(parameter))
    return [amax]


def _check_blocks(weight: Weight, parameter: DTensor) -> None:
    """Refuses shards that cut a block in two."""
    assert weight.format is not None
    (start, stop), block, length = span_of(parameter), weight.format.block, parameter.shape[0]
    if weight.axis != 0 or (start, stop) == (0, length) or block == "tensor":
        return
    if block == "channel" or any(at % int(block) and at != length for at in (start, stop)):
        raise ValueError(
            f"fmt: {weight.format.name!r} blocks {weight.name!r} along dimension 0, which is cut into shards inside a "
            f"block, at {start} or {stop}; shard another dimension, or leave it out: only={{{weight.name!r}: None}}"
        )


class _Term(torch.autograd.Function):
    """One weight's term; its backward tells the hook that the term is in the loss already."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, h: Tensor, weight: Weight) -> Tensor:
        ctx.save_for_backward(parameter, h)
        ctx.weight = weight
        assert weight.format is not None
        variance = rounding.variance(parameter, weight.format, weight.axis, law=weight.smoothing.noise)
        return 0.5 * (h * variance).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        parameter, h = ctx.saved_tensors
        ctx.weight.entered = True
        slope = rounding.variance_vjp(parameter, h, ctx.weight.format, ctx.weight.axis, law=ctx.weight.smoothing.noise)
        return (0.5 * grad * slope).to(parameter.dtype), None, None


def penalty(model: torch.nn.Module) -> Tensor:
    """The term ``strength * 1/2 sum_i h_i sigma_i^2``, 0-d and differentiable, for objectives of one's own.

    It takes the curvature gathered up to the last step: it is 0 before the first, for a method without term, and for
    weights whose term is in the loss itself (``loss_fn``). A step whose backward pass ran through it gets no second
    term from the optimizer's hook.

    Raises:
        ValueError: the model is not under lotion_fx, or its parameters are sharded.
    """
    total = None
    for weight in weights_of(model):
        held = weight.held()
        if held is None or not weight.selected or not weight.smoothing.has_term:
            continue
        if isinstance(held, DTensor):
            raise ValueError(f"model: {weight.name!r} is sharded; penalty needs whole weights, use the step's term")
        total = held.new_zeros((), dtype=torch.float32) if total is None else total
        h = curvature_of(weight, held)
        if h is not None:
            total = total + weight.joint_strength * _Term.apply(held, h, weight)
    return next(model.parameters()).new_zeros((), dtype=torch.float32) if total is None else total
