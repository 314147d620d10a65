"""`transform`: puts a model under smoothing in place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lotion_fx import optimizer_hooks, private
from lotion_fx.arguments import check_compile_options, check_model, check_regions, check_weights, checked, scheduled
from lotion_fx.calls import CompiledCalls, outermost, with_own_code
from lotion_fx.carried import carry
from lotion_fx.choosing import Formats, weights_for
from lotion_fx.loss_graph import called, loss_of, pair, scalar
from lotion_fx.members import take_in, watch
from lotion_fx.numerics.formats import Format, resolve
from lotion_fx.numerics.noise import NoiseLaw, resolve_noise
from lotion_fx.parts import compile_parts
from lotion_fx.sampling import check_placement, sample_first
from lotion_fx.scale_training import check_scales
from lotion_fx.settings import Settings
from lotion_fx.state import Smoothing, registry, smoothings_of, weights_of
from lotion_fx.variants import Backend


def transform(
    model: nn.Module,
    fmt: str | Format = "nvfp4",
    *,
    method: str = "lotion",
    strength: float = 1.0,
    curvature: str = "factored",
    only: Formats | None = None,
    loss_fn: Callable[..., Tensor] | str | None = None,
    moments: str = "closed",
    inner: str = "inductor",
    schedule: str | Sequence[tuple[str, float]] | None = None,
    start: float | None = None,
    finish: float | None = None,
    finish_term: bool = True,
    steps: int | None = None,
    pull: float = 10.0,
    decay: float = 0.99,
    noise: str | NoiseLaw = "randomized",
    regions: Iterable[nn.Module] | str | None = None,
    likelihood: Any = None,
    refresh: int | None = None,
    calibrate: bool = True,
    process_group: Any = None,
    **compile_options: Any,
) -> nn.Module:
    """Puts a model under quantization-aware training, compiled in place.

    The same object comes back: same class, parameters, ``state_dict`` keys and hooks. Train it as before. In ``eval()``
    its forward runs at the rounded weights that would be deployed.

    Args:
        model: any module with floating-point parameters on a real device.
        fmt: format of every weight of two or more dimensions that reaches a contraction, except embeddings and what is
            tied to them; see `formats`.
        method: ``"lotion"`` (full-precision forward plus the expected-loss term), ``"ste"`` (rounded forward, scale
            held), ``"ste_scale"`` (scale differentiated), ``"rr"`` (randomly rounded forward), ``"ptq"`` (plain
            training), ``"cage"`` (``"ste"``, with a pull to the rounded values in the last fifth of ``steps``) or
            ``"scales"`` (codes held, the scales of blocks trained: see `hold_codes`).
        strength: factor of the expected-loss term; 1 is the expected loss itself.
        curvature: ``"factored"`` (two vectors a weight), ``"full"`` (a float a parameter, one more product a layer),
            ``"fisher"`` (the optimizer's second moment) or ``"ggn"`` (two vectors, by a pass of its own that draws the
            labels from the model's output: Gauss-Newton curvature).
        only: which parameters get another format, or None: ``{"*.router.*": None, nn.Conv2d: "int8"}``. A key is a glob
            of parameter names; a class of modules, for the parameters of all such modules and of what is inside them;
            or a predicate of (name, parameter). Entries are looked at in their order, and **the last that matches
            wins**; what none matches has ``fmt``. A value is a format, None for full precision, or ``...`` for ``fmt``.
            A key with a format also takes what the default leaves out, such as embeddings, but for ``"*"``; a class
            takes parameters of two or more dimensions alone. A tied parameter has each of its names. See `preset`.
        loss_fn: puts the loss into the graph: ``"model"`` where the model returns it, or a function of (output,
            targets), to be called with the model as `training_loss`. Where a moment stream reaches from a weight to the
            loss, the loss is then itself the expected loss, at two more products a linear layer.
        moments: with ``loss_fn``, which weights take the stream: see `expected_loss`.
        inner: ``"inductor"``, ``"aot_eager"`` or ``"eager"``, what compiles the rewritten graphs.
        schedule: the phases of one training, with shares that add to 1, as ``(("plain", 0.6), ("lotion", 0.2),
            ("ste_scale", 0.2))``; instead of ``method``. ``"plain"`` is what ``method="ptq"`` does, ``"lotion"``,
            ``"ste"``, ``"ste_scale"`` and ``"rr"`` what the methods do, ``"finish"`` is ``"ste_scale"`` with the
            expected-loss term, ``"cage"`` is ``"ste"`` with the pull and ``"scales"`` what `hold_codes` does.
            ``"auto"`` chooses what was measured to be good for ``fmt`` and ``noise``, see docs/accuracy.md. Curvature
            is gathered from the first phase with the term on, and its size is measured from that phase's second step. A
            training whose optimizer was saved in a plain phase, or under ``method="ptq"``, goes on under any schedule
            and format.
        start: plain training for this first share of ``steps``, then ``method``.
        finish, finish_term: for the last share ``finish`` of ``steps``, the phase ``"finish"``, or without
            ``finish_term`` the phase ``"ste_scale"``; `finish` does it by hand.
        steps: optimizer steps in the whole training, for schedules.
        pull: the largest factor of ``"cage"``'s pull, see `lotion_fx.pull`.
        decay: of the curvature's moving average.
        noise: the law of the random rounding, see `noises`; ``"adaptive"`` trains for weights that `round_` rounds in
            the end. Under a biased one ``method="lotion"`` runs its training forward at the mean of random weights.
        regions: modules of ``model`` to compile one by one (transformer blocks, as FSDP2 wants) instead of the whole;
            ``"blocks"`` finds them, and compiles equal ones once: see `lotion_fx.blocks`.
        likelihood: for ``"ggn"``, what the output parametrizes: ``"categorical"`` (the default), ``"bernoulli"``,
            ``"gaussian"``, or the loss itself, such as ``F.mse_loss``; see `likelihood`.
        calibrate: measures the size of the term, whatever the loss: the forwards of a few early steps, then of one in
            two hundred, run at randomly moved weights, and log the loss there; where the loss is recognized as no
            likelihood's, as many again give outputs with a little noise. False takes it as counted, which is right for
            a mean over independent likelihood terms.
        refresh: one optimizer step of so many gathers curvature, which rests in between; by default each of the first
            1000 with a term, then one of 4, for which the graphs are compiled anew. For ``"ggn"`` by default each.
        process_group: over which your own loop averages ``.grad``, where neither DistributedDataParallel nor FSDP2
            does; such as ``torch.distributed.group.WORLD``.
        **compile_options: torch.compile's ``mode``, ``options``, ``dynamic``, ``fullgraph``.

    Raises:
        TypeError, ValueError: naming the parameter, its value and what was expected.
    """
    mode, options = compile_options.pop("mode", None), compile_options.pop("options", None) or {}
    check_compile_options(mode, options, inner, compile_options)
    regions = check_regions(model, regions)
    to, law = resolve(fmt), resolve_noise(noise)
    phases = scheduled(method, to, law, schedule, start, finish, finish_term, steps)
    settings = Settings(
        method=method,
        strength=strength,
        curvature=curvature,
        inner=inner,
        decay=decay,
        noise=law,
        schedule=phases,
        pull=pull,
        loss_fn=loss_fn,
        moments=moments,
        calibrate=calibrate,
        process_group=process_group,
    )
    check_model(model)
    smoothing = Smoothing(checked(settings, likelihood, refresh, by_regions=regions != [model]))
    smoothing.model, smoothing.is_whole = weakref.ref(model), regions == [model]
    chosen = to, {} if only is None else only
    _find_weights(smoothing, model, *chosen)
    carry(model, smoothing)
    optimizer_hooks.install()
    watch()
    smoothing.seen_changes, smoothing.bring_up_to_date = registry.changes, partial(take_in, *chosen)
    paths = [path for path, module in model.named_modules() if module in set(regions)]
    smoothing.compile = partial(_compile, Backend(inner, mode, tuple(sorted(options.items()))), paths, compile_options)
    smoothing.compile(model)
    return model


def _find_weights(smoothing: Smoothing, model: nn.Module, fmt: Format, only: Formats) -> None:
    """Takes in the model's weights, if all of them can be."""
    smoothing.weights.extend(weights_for(smoothing, model, fmt, only))
    check_weights(smoothing)
    if smoothing.settings.schedule.holds_codes:
        check_scales(smoothing.weights)
    check_placement(model, smoothing)
    for weight in smoothing.weights:
        registry.add(weight)


def _compile(backend: Backend, regions: Iterable[str], options: dict[str, Any], model: nn.Module) -> None:
    """Makes the model's call the compiled one."""
    before = private.before_of(model)
    smoothing = before.model
    compiled_call = CompiledCalls(model, backend, **options)
    for path in regions:
        region = model.get_submodule(path)
        private.replace_call(region, compiled_call(region))
    if callable(smoothing.settings.loss_fn):
        loss = _with_loss(model, smoothing.settings.loss_fn, backend, options)
        smoothing.loss_call = outermost(loss, model, smoothing)
    call = private.call_of(model)
    before.call = outermost(call, model, smoothing)
    if smoothing.settings.samples_labels:
        before.call = sample_first(call, before.call, model, smoothing)
    private.replace_call(model, before.call)
    if smoothing.is_whole:
        compile_parts(model, smoothing, backend, **options)


def _with_loss(model: nn.Module, loss_fn: Callable[..., Tensor], backend: Backend, options: Any) -> Callable[..., Any]:
    """A model and its loss, compiled as one."""
    reference = weakref.ref(model)  # the model's own state must not keep it alive

    def loss(inputs: Any, targets: Any) -> Tensor:
        return loss_fn(called(private.plain_call(reference()), inputs), targets)  # type: ignore[arg-type]

    return torch.compile(with_own_code(loss, model), backend=backend, **options)


def training_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a model transformed with ``loss_fn``: the expected one, or in ``eval()`` that at rounded weights.

    Args:
        batch: ``(inputs, targets)``; with ``loss_fn="model"`` the model's own arguments, a dictionary as keywords.

    Raises:
        ValueError: the model was transformed without ``loss_fn``, or the batch is not as above.
    """
    weights_of(model)
    smoothing = smoothings_of(model)[0]
    if smoothing.settings.loss_fn is None:
        raise ValueError("model: it was transformed without a loss; pass loss_fn= to lotion_fx.transform")
    if smoothing.loss_call is None:
        return loss_of(called(model, batch))
    return scalar(smoothing.loss_call(*pair(batch)), "loss_fn")
