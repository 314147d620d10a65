"""The expected-loss term: 1/2 sum_i h_i sigma_i^2, its curvature h, and how its gradient enters at the step.

Source: docs/objective.md; LOTION, arXiv 2510.08757. The loss's own gradient is left alone. Just before any optimizer
steps, one hook turns what the probes gathered since the last step into a curvature estimate and adds the gradient of the
term to ``.grad``: after accumulation, after reduction over ranks, after clipping. Per weight a float32 state vector holds

    factored   EMA of [ T * rows | cols | norm | 1 ]      h = rows * cols / (norm * mass), rank one in each group
    full       EMA of [ T * h | 1 ]                       h = h / mass
    fisher     the optimizer's ``exp_avg_sq`` times T, and no state; an EMA of T * grad^2 where there is none

whose last element, the mass, is what bias correction divides by. A weight that no graph proves linear takes T * grad^2
as its h in the first two, reduced to rows and columns in the first.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lotion_fx import backend, rounding
from lotion_fx.formats import Format
from lotion_fx.passes.probe import HEADER, Code, Layout
from lotion_fx.state import Smoothing, Weight, local_of, registry, sample, weights_of

CHUNK = 16  # weights in one compiled update at most, which bounds the time to compile it

VECTOR, FISHER, MOMENT = "vector", "fisher", "moment"  # where an update takes its curvature from


@dataclass(frozen=True, eq=False)
class Spec:
    """All that the code of one weight's update depends on.

    Args:
        source: ``"vector"`` (a payload is given), ``"fisher"`` (from the gradient), ``"moment"`` (exp_avg_sq is given).
        fmt, axis: the quantizer.
        layout: of the whole weight.
        span: [start, stop) of its dimension 0 on this rank.
        decay: of the EMA.
        tensors: shape, stride, dtype and device of each argument.
    """

    source: str
    fmt: Format
    axis: int
    layout: Layout
    span: tuple[int, int]
    decay: float
    tensors: tuple[Any, ...]

    @staticmethod
    def of(weight: Weight, source: str, layout: Layout, span: tuple[int, int], args: Sequence[Tensor]) -> Spec:
        """The one `Spec` of this make: equal ones are the same object, found again without comparing them."""
        tensors = tuple((t.shape, t.stride(), t.dtype, t.device) for t in args)
        key = (source, weight.format, weight.axis, layout, span, weight.smoothing.decay, tensors)
        if weight.spec is None or weight.spec[0] != key:
            assert weight.format is not None
            spec = Spec(source, weight.format, weight.axis, layout, span, weight.smoothing.decay, tensors)
            weight.spec = key, _specs.setdefault(key, spec)
        return weight.spec[1]


_specs: dict[Any, Spec] = {}


# ---------------------------------------------------------------------------------------------- curvature from state


def dense(state: Tensor, layout: Layout, span: tuple[int, int]) -> Tensor:
    """h over ``shape[0]`` in [start, stop), float32, from a state vector; 0 where nothing was seen yet.

    Args:
        state: ``[payload | mass]``.
        layout: of the whole weight.
        span: start and stop along the weight's dimension 0.
    """
    mass = state[-1]
    shape = (span[1] - span[0], *layout.shape[1:])
    inner = math.prod(layout.shape[1:])
    if layout.kind != "factored":
        h = state[span[0] * inner : span[1] * inner].view(shape)
        return torch.where(mass > 0, h / mass, 0.0)
    rows, cols, norm = layout.split(state)
    divisor = norm * mass
    cols = torch.where(divisor > 0, 1 / divisor, 0.0)[:, None] * cols
    if span == (0, layout.shape[0]):
        return (rows[:, :, None] * cols[:, None, :]).reshape(shape)
    each = layout.groups * layout.rows // layout.shape[0]  # rows of the factorization in one index of dimension 0
    index = torch.arange(span[0] * each, span[1] * each, device=state.device)
    return (rows.reshape(-1)[index][:, None] * cols[index // layout.rows]).reshape(shape)


def marginals(h: Tensor, layout: Layout) -> Tensor:
    """The factored payload [rows | cols | norm] whose rank-one product is nearest a full h (Adafactor, eq. 1)."""
    h = h.reshape(layout.factors)
    return torch.cat([h.sum(2).flatten(), h.sum(1).flatten(), h.sum((1, 2))])


# ------------------------------------------------------------------------------------------------------- the update


def _update_one(spec: Spec, args: Sequence[Tensor]) -> None:
    """Moves one weight's state and adds the term's gradient to its ``grad``, both in place.

    ``args``: weight, grad, state, the payload (vector) or exp_avg_sq (moment) if any, amax_tensor if the format needs
    one from elsewhere, and last the 0-d ``row_factor`` (T over the squared loss scale), ``grad_factor`` (T over the
    squared factor by which ``grad`` was scaled or clipped) and ``gain``.
    """
    weight, grad, state, *given, row_factor, grad_factor, gain = args
    layout = spec.layout
    if spec.source == MOMENT:
        h = given.pop(0).float() * grad_factor
    else:
        if spec.source == VECTOR:
            payload = given.pop(0).float()
            scaled = layout.groups * layout.rows if layout.kind == "factored" else payload.numel()
            payload = torch.cat([payload[:scaled] * row_factor, payload[scaled:]])
        else:
            squared = grad.float().square() * grad_factor
            payload = marginals(squared, layout) if layout.kind == "factored" else squared.reshape(-1)
        fresh = torch.cat([payload, payload.new_ones(1)])
        # A step that overflowed in half precision teaches nothing.
        moved = torch.where(payload.sum().isfinite(), torch.lerp(state, fresh, 1 - spec.decay), state)
        state.copy_(moved)
        h = dense(moved, layout, spec.span)
    term = rounding.variance_vjp(weight, h.view(weight.shape), spec.fmt, spec.axis, amax_tensor=given[0] if given else None)
    grad.add_((0.5 * gain * term).to(grad.dtype))


_compiled: dict[tuple[str, tuple[Spec, ...]], Callable[..., Any]] = {}


def _update(inner: str, work: Sequence[tuple[Spec, list[Tensor]]]) -> None:
    """Runs the updates of all weights in as few compiled calls as there are layers.

    Weights of equal make, the same matrix of every layer, are dealt out one to a call, and kinds that occur equally
    often go together. So each kind is compiled once, however deep the model.
    """
    alike: dict[Spec, list[list[Tensor]]] = {}
    for spec, args in work:
        alike.setdefault(spec, []).append(args)
    by_count: dict[int, list[Spec]] = {}
    for spec, jobs in alike.items():
        by_count.setdefault(len(jobs), []).append(spec)
    for count, kinds in by_count.items():
        for start in range(0, len(kinds), CHUNK):
            specs = tuple(kinds[start : start + CHUNK])
            for turn in range(count):
                flat = [tensor for spec in specs for tensor in alike[spec][turn]]
                if (inner, specs) not in _compiled:
                    _compiled[inner, specs] = backend.compile_function(_many(specs), flat, inner)
                _compiled[inner, specs](*flat)


def _many(specs: tuple[Spec, ...]) -> Callable[..., None]:
    counts = [len(spec.tensors) for spec in specs]

    def update(*flat: Tensor) -> None:
        at = 0
        for spec, count in zip(specs, counts, strict=True):
            _update_one(spec, flat[at : at + count])
            at += count

    return update


# ---------------------------------------------------------------------------------------------------------- the step


def install() -> None:
    """Hooks every optimizer's step, once per process."""
    global _handle
    if _handle is None:
        _handle = register_optimizer_step_pre_hook(_before_step)
        backend.watch_grad_scaler()


_handle: Any = None
_PROVISIONAL = (Code.UNREACHED, Code.UNRESOLVED)  # another graph may yet show more


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    """Adds the term now, or after each call of the closure where the optimizer makes the gradients itself."""
    where = "kwargs" if kwargs.get("closure") is not None else "args" if len(args) > 1 and callable(args[1]) else None
    if where is None:
        add_term(optimizer)
        return None
    closure = kwargs["closure"] if where == "kwargs" else args[1]

    def with_term() -> Any:
        with torch.enable_grad():
            loss = closure()
        add_term(optimizer)
        return loss

    return (args, {**kwargs, "closure": with_term}) if where == "kwargs" else ((args[0], with_term, *args[2:]), kwargs)


@torch.no_grad()
def add_term(optimizer: torch.optim.Optimizer) -> None:
    """Adds the expected-loss term's gradient to the ``.grad`` of every smoothed weight that an optimizer steps."""
    mine: dict[Smoothing, list[tuple[Weight, Tensor]]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            weight = registry[parameter]
            if weight is not None:
                weight.master = weight.master if _is(weight.master, parameter) else weakref.ref(parameter)
                if parameter.grad is not None and weight.selected:
                    mine.setdefault(weight.smoothing, []).append((weight, parameter))
    unscaled_by, pending = backend.take_grad_scale(optimizer), getattr(optimizer, "grad_scale", None)
    for smoothing, pairs in mine.items():
        if smoothing.has_term:
            _Step(smoothing, optimizer, unscaled_by, pending).run(pairs)
        _advance(smoothing, pairs)


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
        clip = self._clip(pairs)
        self.row_factor = (terms / loss_scale**2).float()
        self.grad_factor = (self._all(terms) / (loss_scale * clip) ** 2).float()
        gains = [0.0 if smoothing.entered else smoothing.strength * weight.strength for weight, _ in pairs]
        scale = 1.0 if self.pending is None else self.pending.to(terms.device)
        self.gains = (torch.tensor(gains, device=terms.device) * scale).unbind()
        vectors = self._payloads(pairs)
        work = [self._job(*pair, vector, gain) for pair, vector, gain in zip(pairs, vectors, self.gains, strict=True)]
        _update(smoothing.inner, [job for job in work if job is not None])

    def _terms(self, device: torch.device) -> Tensor:
        """T: loss terms of the step on this rank, counted where the backward began, over all its micro-batches."""
        smoothing = self.smoothing
        if smoothing.terms is None:
            smoothing.terms = torch.ones((), device=device)
            first = smoothing.first
            if first is not None and first.probe is not None and first.probe.grad is not None:
                calls, _, terms = first.probe.grad[-HEADER:]
                smoothing.terms = torch.where(terms > 0, terms / calls * first.fires, smoothing.terms)
            elif smoothing.rows is None and smoothing.steps == 0:
                warnings.warn("no graph tells the number of loss terms, which scales the term; it is taken as 1", stacklevel=2)
            if smoothing.rows is not None:
                smoothing.terms = smoothing.rows.clamp(min=1)
        return smoothing.terms.to(device)

    def _clip(self, pairs: list[tuple[Weight, Tensor]]) -> Tensor | float:
        """By what factor the gradients shrank since the backward pass, the loss scale included."""
        before = [(self.smoothing.snapshot[w], sample(p.grad)) for w, p in pairs if w in self.smoothing.snapshot]
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
            if weight.code is None or weight.code in _PROVISIONAL:
                weight.code = _read_code(vector, self.smoothing)
            if weight.code is Code.ANALYTIC and vector is not None:
                vectors.append(vector[:-HEADER])
            elif self.group is not None and self.smoothing.curvature != "fisher":
                vectors.append(self._sharded_fisher(weight, parameter))
            else:
                vectors.append(None)
        if unreached := [w.name for w, _ in pairs if w.code is Code.UNREACHED and w.steps == 0]:
            warnings.warn(
                f"no compiled graph contains {', '.join(unreached)}; the expected-loss term takes the Fisher form there. "
                "If that is a surprise: transform the outermost module, and call it, not its forward().",
                stacklevel=2,
            )
        return vectors if self.group is None else self._reduced(pairs, vectors)

    def _sharded_fisher(self, weight: Weight, parameter: Tensor) -> Tensor:
        """T * grad^2 as a payload of the whole weight, of which this rank fills in its shard."""
        grad, (start, stop) = local_of(parameter.grad), _span(parameter)
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
        local, grad, span = local_of(parameter), local_of(parameter.grad), _span(parameter)
        if not local.numel():
            return None
        layout, given = weight.layout, [] if vector is None else [vector]
        source = VECTOR if given else FISHER
        if self.smoothing.curvature == "fisher":
            layout, span = Layout("full", tuple(local.shape), 1, local.shape[0]), (0, local.shape[0])
            moment = self.optimizer.state.get(parameter, {}).get("exp_avg_sq")
            if isinstance(moment, Tensor):
                return self._moment_job(weight, parameter, local, grad, local_of(moment), layout, gain)
        if weight.ema is None or weight.ema.numel() != layout.payload + 1:
            weight.ema = torch.zeros(layout.payload + 1, device=local.device)
        args = [local, grad, weight.ema, *given, *_amax(weight, parameter)]
        args += [self.row_factor, self.grad_factor, gain]
        return Spec.of(weight, source, layout, span, args), args

    def _moment_job(
        self, weight: Weight, parameter: Tensor, local: Tensor, grad: Tensor, moment: Tensor, layout: Layout, gain: Tensor
    ) -> tuple[Spec, list[Tensor]]:
        """The update whose curvature is the optimizer's second moment, bias-corrected, so with no state of our own."""
        assert weight.format is not None
        group = next(g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"]))
        count = self.optimizer.state[parameter].get("step", 0)
        decay = group.get("betas", (0.0, 0.999))[1]
        seen = 1 - decay ** torch.as_tensor(count, dtype=torch.float32, device=local.device)
        factor = torch.where(seen > 0, self.grad_factor / seen, 0.0)
        args = [local, grad, local.new_zeros(0), moment, *_amax(weight, parameter), self.row_factor, factor, gain]
        return Spec.of(weight, MOMENT, layout, (0, local.shape[0]), args), args


def _advance(smoothing: Smoothing, pairs: list[tuple[Weight, Tensor]]) -> None:
    """Closes a step: probes are emptied, the step is counted, and the finishing phase begins when its time has come."""
    for weight, _ in pairs:
        weight.drop_probe()
        weight.steps += 1
        smoothing.snapshot.pop(weight, None)
    smoothing.first = smoothing.rows = None
    smoothing.entered = False
    smoothing.steps = max(smoothing.steps, *(weight.steps for weight, _ in pairs))
    if smoothing.finish and smoothing.total_steps and not smoothing.finishing:
        smoothing.finishing = smoothing.steps >= round(smoothing.total_steps * (1 - smoothing.finish))


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


def _span(parameter: Tensor) -> tuple[int, int]:
    """The part of dimension 0 that this rank holds."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    return backend.local_span(parameter)


def _mesh_group(parameter: DTensor) -> Any:
    """The process group over which a fully sharded parameter's gradients are averaged."""
    mesh = parameter.device_mesh
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()


def _amax(weight: Weight, parameter: Tensor) -> list[Tensor]:
    """The tensor-wide absmax over all shards, for the formats that need it of a sharded weight."""
    fmt = weight.format
    assert fmt is not None
    if not isinstance(parameter, DTensor) or not (fmt.block == "tensor" or fmt.law.two_level):
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


# -------------------------------------------------------------------------------------------------- the term as a value


def term_of(weight: Weight) -> Tensor | None:
    """This rank's ``1/2 sum_i h_i sigma_i^2`` of one weight, 0-d, without strength; None where there is no curvature."""
    held, state = weight.held(), weight.ema
    if held is None or state is None or weight.format is None or not weight.selected:
        return None
    local = local_of(held)
    layout, span = _stored(weight, held)
    sigma2 = rounding.variance(local, weight.format, weight.axis)
    return 0.5 * (dense(state, layout, span) * sigma2).sum()


def _stored(weight: Weight, held: Tensor) -> tuple[Layout, tuple[int, int]]:
    """The layout of a weight's state, and the part of it that this rank's shard is."""
    if weight.smoothing.curvature != "fisher":
        return weight.layout, _span(held)
    local = local_of(held)
    return Layout("full", tuple(local.shape), 1, local.shape[0]), (0, local.shape[0])


class _Term(torch.autograd.Function):
    """One weight's term; its backward tells the hook that the term is in the loss already."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, h: Tensor, weight: Weight) -> Tensor:
        ctx.save_for_backward(parameter, h)
        ctx.weight = weight
        assert weight.format is not None
        return 0.5 * (h * rounding.variance(parameter, weight.format, weight.axis)).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        parameter, h = ctx.saved_tensors
        ctx.weight.smoothing.entered = True
        slope = rounding.variance_vjp(parameter, h, ctx.weight.format, ctx.weight.axis)
        return (0.5 * grad * slope).to(parameter.dtype), None, None


def penalty(model: torch.nn.Module) -> Tensor:
    """The expected-loss term ``strength * 1/2 sum_i h_i sigma_i^2``, 0-d and differentiable, for objectives of one's own.

    It takes the curvature gathered up to the last step, so it is 0 before the first. A step whose backward pass ran
    through it gets no second term from the optimizer's hook.

    Raises:
        ValueError: the model is not under lotion_fx, its parameters are sharded, or its curvature is the optimizer's.
    """
    total = None
    for weight in weights_of(model):
        held = weight.held()
        if held is None or not weight.selected or not weight.smoothing.has_term:
            continue
        if isinstance(held, DTensor):
            raise ValueError(f"model: {weight.name!r} is sharded; penalty needs whole weights, use the step's term")
        if weight.smoothing.curvature == "fisher" and weight.ema is None and weight.steps:
            raise ValueError("model: curvature='fisher' lies in the optimizer; penalty needs 'factored' or 'full'")
        total = held.new_zeros((), dtype=torch.float32) if total is None else total
        if weight.ema is not None:
            layout, span = _stored(weight, held)
            gain = weight.smoothing.strength * weight.strength
            total = total + gain * _Term.apply(held, dense(weight.ema, layout, span), weight)
    assert total is not None
    return total
