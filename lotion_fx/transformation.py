"""`transform`: puts a model under smoothing in place; and the switches and saved state of its training."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lotion_fx import term as objective
from lotion_fx.likelihood import LIKELIHOODS, likelihood_of
from lotion_fx.loss_graph import called, loss_of, pair, scalar
from lotion_fx.numerics.formats import Format, register_format, resolve
from lotion_fx.numerics.noise import NoiseLaw, resolve_noise
from lotion_fx.outside import count_terms, hook_owners
from lotion_fx.passes.attach.attach import LATENT, RR
from lotion_fx.passes.attach.probe import Code
from lotion_fx.passes.attach.usage import Use
from lotion_fx.sampling import check_placement, sample_first
from lotion_fx.state import CURVATURES, METHODS, MOMENTS, Smoothing, Weight, registry, smoothings_of, weights_of
from lotion_fx.variants import INNERS, Backend, CompiledCalls, with_own_code

Formats = Mapping[str, "str | Format | None"]


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
    finish: float | None = None,
    steps: int | None = None,
    finish_term: bool = True,
    decay: float = 0.99,
    noise: str | NoiseLaw = "randomized",
    regions: Iterable[nn.Module] | None = None,
    likelihood: Any = None,
    refresh: int = 1,
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
            held), ``"ste_scale"`` (scale differentiated), ``"rr"`` (randomly rounded forward) or ``"ptq"`` (plain
            training).
        strength: factor of the expected-loss term; 1 is the expected loss itself.
        curvature: ``"factored"`` (two vectors a weight), ``"full"`` (a float a parameter, one more product a layer),
            ``"fisher"`` (the optimizer's second moment) or ``"ggn"`` (two vectors, by a pass of its own that draws the
            labels from the model's output: Gauss-Newton curvature).
        only: parameter-name globs to a format or None, the last match winning: ``{"*.router.*": None}``. A glob more
            specific than ``"*"`` also takes what the default leaves out.
        loss_fn: puts the loss into the graph: ``"model"`` where the model returns it, or a function of (output,
            targets), to be called with the model as `training_loss`. Where a moment stream reaches from a weight to the
            loss, the loss is then itself the expected loss, at two more products a linear layer.
        moments: with ``loss_fn``, which weights take the stream: see `expected_loss`.
        inner: ``"inductor"``, ``"aot_eager"`` or ``"eager"``, what compiles the rewritten graphs.
        finish, steps: for the last share ``finish`` of ``steps`` optimizer steps, call `finish` by itself.
        finish_term: whether the term stays on during that phase.
        decay: of the curvature's moving average.
        noise: the law of the random rounding, see `noises`. Under a biased one, ``method="lotion"`` runs its training
            forward at the mean of the random weights.
        regions: modules of ``model`` to compile one by one (transformer blocks, as FSDP2 wants) instead of the whole.
        likelihood: for ``"ggn"``, what the output parametrizes: ``"categorical"`` (the default), ``"bernoulli"``,
            ``"gaussian"``, or the loss itself, such as ``F.mse_loss``; see `likelihood`.
        refresh: for ``"ggn"``, optimizer steps from one pass to the next; the curvature rests in between.
        **compile_options: torch.compile's ``mode``, ``options``, ``dynamic``, ``fullgraph``.

    Raises:
        TypeError, ValueError: naming the parameter, its value and what was expected.
    """
    mode, options = compile_options.pop("mode", None), compile_options.pop("options", None) or {}
    if unknown := sorted(set(compile_options) - {"dynamic", "fullgraph"}):
        raise TypeError(f"transform got {unknown[0]!r}: expected torch.compile's mode, options, dynamic or fullgraph")
    _check_compile_options(mode, options, inner)
    smoothing = _settings(method, strength, curvature, inner, finish, steps, finish_term, decay, noise)
    smoothing.likelihood, smoothing.refresh = _check_ggn(curvature, inner, likelihood, refresh), refresh
    regions = _check_regions(model, regions)
    if moments not in MOMENTS:
        raise ValueError(f"moments={moments!r}: expected one of {', '.join(MOMENTS)}{_near(moments, MOMENTS)}")
    smoothing.moments = moments
    smoothing.loss_fn = _check_loss(loss_fn, smoothing, regions != [model])
    _check_model(model)
    _add_weights(smoothing, model, resolve(fmt), only or {})
    _check_weights(smoothing)
    if curvature == "ggn":
        check_placement(model, smoothing)
    for weight in smoothing.weights:
        registry.add(weight)
    hook_owners(smoothing.weights)
    objective.install()
    backend = Backend(inner, mode, tuple(sorted(options.items())))
    compiled_call = CompiledCalls(backend, **compile_options)
    for region in regions:
        region._compiled_call_impl = compiled_call(region)
    if callable(loss_fn):
        smoothing.loss_call = count_terms(_with_loss(model, loss_fn, backend, compile_options), smoothing)
    call = model._compiled_call_impl or model._call_impl
    model._compiled_call_impl = count_terms(call, smoothing)
    if curvature == "ggn":
        model._compiled_call_impl = sample_first(call, model._compiled_call_impl, model, smoothing)
    return model


def _with_loss(model: nn.Module, loss_fn: Callable[..., Tensor], backend: Backend, options: Any) -> Callable[..., Any]:
    """A model and its loss, compiled as one."""
    reference = weakref.ref(model)  # the model's own state must not keep it alive

    def loss(inputs: Any, targets: Any) -> Tensor:
        return loss_fn(called(reference()._call_impl, inputs), targets)  # type: ignore[union-attr]

    return torch.compile(with_own_code(loss), backend=backend, **options)


def training_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a model transformed with ``loss_fn``: the expected one, or in ``eval()`` that at rounded weights.

    Args:
        batch: ``(inputs, targets)``; with ``loss_fn="model"`` the model's own arguments, a dictionary as keywords.

    Raises:
        ValueError: the model was transformed without ``loss_fn``, or the batch is not as above.
    """
    weights_of(model)
    smoothing = smoothings_of(model)[0]
    if smoothing.loss_fn is None:
        raise ValueError("model: it was transformed without a loss; pass loss_fn= to lotion_fx.transform")
    if smoothing.loss_call is None:
        return loss_of(called(model, batch))
    return scalar(smoothing.loss_call(*pair(batch)), "loss_fn")


def finish(model: nn.Module, *, term: bool = True) -> None:
    """Moves the training forward to rounded weights for the last part of training, scales differentiated.

    Args:
        term: whether the expected-loss term stays on.
    """
    weights_of(model)
    for smoothing in smoothings_of(model):
        smoothing.finishing, smoothing.finish_term = True, term


@contextlib.contextmanager
def full_precision(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, forwards run at the latent weights, whatever the mode and method."""
    with _override(model, LATENT):
        yield model


@contextlib.contextmanager
def randomized(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, every forward runs at a fresh randomized rounding of the weights."""
    with _override(model, RR):
        yield model


@contextlib.contextmanager
def _override(model: nn.Module, mode: str) -> Iterator[None]:
    weights_of(model)
    before = [(smoothing, smoothing.override) for smoothing in smoothings_of(model)]
    for smoothing, _ in before:
        smoothing.override = mode
    try:
        yield
    finally:
        for smoothing, previous in before:
            smoothing.override = previous


# --------------------------------------------------------------------------------------------------------- saved state


def state_dict(model: nn.Module) -> dict[str, Any]:
    """What resuming needs beside the model's and the optimizer's own state dicts, at a step boundary.

    Plain tensors, numbers and strings: `torch.save` it, load it with ``weights_only=True``.
    """
    names = names_of(model)
    phases = [
        {
            "steps": s.steps,
            "finishing": s.finishing,
            "finish_term": s.finish_term,
            "curvature": s.curvature,
            "terms": s.known_terms,
            "clip2": s.clip2,
            "calibrated": s.calibrated,
            "turn": s.turn + s.closed,
            "noise": s.noise.name,
        }
        for s in smoothings_of(model)
    ]
    weights = {
        names[weight]: {
            "uses": None if weight.uses is None else [asdict(use) for use in weight.uses],
            "ema": None if weight.ema is None else weight.ema.clone(),
            "code": None if weight.code is None else int(weight.code),
            "steps": weight.steps,
            "gains": list(weight.gains),
        }
        for weight in weights_of(model)
    }
    return {"version": 1, "phases": phases, "weights": weights}


def load_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Restores what `state_dict` gave, into a model transformed with the same arguments.

    Raises:
        ValueError: the state is of another version, curvature, noise, or set of parameters; nothing is changed then.
    """
    names, smoothings = names_of(model), smoothings_of(model)
    if state.get("version") != 1:
        raise ValueError(f"state: expected what lotion_fx.state_dict returned, version 1, got {state.get('version')!r}")
    if differing := sorted(set(names.values()) ^ set(state["weights"])):
        raise ValueError(f"state: parameters differ from the model's, first {differing[0]!r}; transform the same model")
    for setting, expected, default in (
        ("curvature", [s.curvature for s in smoothings], None),
        ("noise", [s.noise.name for s in smoothings], "randomized"),
    ):
        found = [phase.get(setting, default) for phase in state["phases"]]
        if expected != found:
            raise ValueError(
                f"state: saved with {setting}={found}, this model has {expected}; transform it the same way"
            )
    for smoothing, phase in zip(smoothings, state["phases"], strict=True):
        smoothing.steps, smoothing.finishing = phase["steps"], phase["finishing"]
        smoothing.finish_term = phase["finish_term"]
        smoothing.known_terms, smoothing.clip2 = phase["terms"], phase["clip2"]
        smoothing.calibrated = phase["calibrated"]
        smoothing.terms = None  # of the step under way, as the probes that are dropped below
        smoothing.turn, smoothing.closed, smoothing.last_pass = phase["turn"], False, None
    for weight, name in names.items():
        saved, held = state["weights"][name], weight.held()
        device = held.device if held is not None else None
        weight.learn([Use(**use) for use in saved["uses"]] if saved["uses"] is not None else [])
        weight.uses = weight.uses or None if saved["uses"] is None else weight.uses
        weight.ema = None if saved["ema"] is None else saved["ema"].to(device, copy=True)
        weight.code = None if saved["code"] is None else Code(saved["code"])
        weight.steps, weight.gains = saved["steps"], tuple(saved["gains"])
        weight.drop_probe()


def names_of(model: nn.Module) -> dict[Weight, str]:
    """Each weight's name in this model: two models may hold one weight under different names."""
    names: dict[Weight, str] = {}
    for prefix, module in model.named_modules():
        for attribute, weight in registry.owned.get(module, {}).items():
            name = f"{prefix}.{attribute}".removeprefix(".").replace("_orig_mod.", "")
            names.setdefault(weight, name)
    weights_of(model)
    return names


# ----------------------------------------------------------------------------------------------------------- arguments


def _settings(
    method: str,
    strength: float,
    curvature: str,
    inner: str,
    finish: float | None,
    steps: int | None,
    finish_term: bool,
    decay: float,
    noise: str | NoiseLaw,
) -> Smoothing:
    for name, value, known in (
        ("method", method, tuple(METHODS)),
        ("curvature", curvature, CURVATURES),
        ("inner", inner, INNERS),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}{_near(value, known)}")
    if not 0 <= strength < float("inf"):
        raise ValueError(f"strength={strength!r}: expected a finite number, 0 or more; 1 is the expected loss")
    if not 0 < decay < 1:
        raise ValueError(f"decay={decay!r}: expected a number between 0 and 1")
    if finish is not None and not 0 < finish <= 1:
        raise ValueError(f"finish={finish!r}: expected a share of the training in (0, 1], such as 0.4, or None")
    if (finish is None) != (steps is None):
        raise ValueError(f"finish={finish!r} and steps={steps!r} go together: the share and the number of all steps")
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps!r}: expected the number of optimizer steps in the whole training")
    law = resolve_noise(noise)
    return Smoothing(method, strength, curvature, inner, decay, finish, steps, finish_term, noise=law)


def _check_ggn(curvature: str, inner: str, likelihood: Any, refresh: int) -> str | None:
    """The likelihood's name, None for the curvatures that ask for none."""
    if curvature != "ggn":
        for name, value, default in (("likelihood", likelihood, None), ("refresh", refresh, 1)):
            if value != default:
                raise ValueError(f"{name}={value!r} is for curvature='ggn', and curvature={curvature!r}; leave it out")
        return None
    if inner == "eager":
        raise ValueError("curvature='ggn' is made in the joint graph, and inner='eager' compiles none; try 'aot_eager'")
    if not isinstance(refresh, int) or refresh < 1:
        raise ValueError(f"refresh={refresh!r}: expected the number of steps between two curvature passes, 1 or more")
    likelihood = "categorical" if likelihood is None else likelihood
    if not isinstance(likelihood, str):
        return likelihood_of(likelihood)
    if likelihood not in LIKELIHOODS:
        expected = f"expected one of {', '.join(LIKELIHOODS)}, or the loss{_near(likelihood, LIKELIHOODS)}"
        raise ValueError(f"likelihood={likelihood!r}: {expected}")
    return likelihood


def _check_loss(loss_fn: Any, smoothing: Smoothing, regions: bool) -> Any:
    if loss_fn is None:
        return None
    if loss_fn != "model" and not callable(loss_fn):
        raise ValueError(
            f"loss_fn={loss_fn!r}: expected a function of (output, targets), 'model' (it returns its loss) or None"
        )
    why = ""
    if smoothing.method != "lotion":
        why = f"method={smoothing.method!r} has no expected loss; leave loss_fn out"
    elif smoothing.curvature == "ggn":
        why = "curvature='ggn' draws labels outside of any loss; choose 'factored', 'full' or 'fisher'"
    elif smoothing.inner == "eager":
        why = "inner='eager' makes no graph; choose 'aot_eager' or 'inductor'"
    elif regions:
        why = "with regions= no graph holds the whole loss; compile the whole model"
    if why:
        raise ValueError(f"loss_fn={loss_fn!r}: {why}")
    return loss_fn


def _check_compile_options(mode: str | None, options: Mapping[str, Any], inner: str) -> None:
    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(modes)}{_near(mode, modes)}")
    known = set(torch._inductor.list_options())
    for name in options:
        if name not in known:
            raise ValueError(f"options: {name!r} is no option of Inductor{_near(name, known)}")
    if inner != "inductor" and (mode or options):
        raise ValueError(f"mode={mode!r} and options are Inductor's, and inner={inner!r}; leave them out")


def _near(value: Any, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(str(value), list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: expected an nn.Module, not {type(model).__name__}")
    holds = any(registry.owned.get(module) for module in model.modules())
    if holds or any(registry[parameter] is not None for parameter in model.parameters()):
        raise ValueError(
            f"model: this {type(model).__name__} is already transformed, or holds a part that is; transform a model "
            "once, the outermost module"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"model: {name!r} is not initialized yet; run the model once before transform")
    if not any(True for _ in model.parameters()):
        raise ValueError(f"model: this {type(model).__name__} has no parameters; transform it after they are made")


def _check_regions(model: nn.Module, regions: Iterable[nn.Module] | None) -> list[nn.Module]:
    if regions is None:
        return [model]
    inside, chosen = set(model.modules()), list(regions)
    if not chosen:
        raise ValueError("regions=[]: expected the modules to compile one by one, or None for the whole model")
    for region in chosen:
        if region not in inside:
            raise ValueError(f"regions: {type(region).__name__} is no submodule of the model")
    return chosen


def _add_weights(smoothing: Smoothing, model: nn.Module, fmt: Format, only: Formats) -> None:
    """One `Weight` per parameter, tied ones once, with the format that the globs and the default give it."""
    owners: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    names: dict[Tensor, list[str]] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((module, attribute))
                names.setdefault(parameter, []).append(f"{prefix}.{attribute}".removeprefix("."))
    every = [name for group in names.values() for name in group]
    chosen = {glob: _known(value) for glob, value in only.items()}
    for pattern in only:
        if not fnmatch.filter(every, pattern):
            prefixes = {name.rpartition(".")[0] for name in every}
            raise ValueError(
                f"only: the glob {pattern!r} matches no parameter{_near(pattern.strip('*.'), [*every, *prefixes])}"
            )
    for parameter, held in owners.items():
        glob = _last_match(names[parameter], only)
        forced = glob is not None and glob != "*" and chosen[glob] is not None
        given, excluded = (_known(fmt), "") if glob is None else (chosen[glob], f"excluded by only={{{glob!r}: None}}")
        if parameter.dim() < 2 and not forced:
            given, excluded = None, "fewer than two dimensions" if given is not None else excluded
        weight = Weight(
            names[parameter][0],
            [(weakref.ref(module), attribute) for module, attribute in held],
            smoothing,
            given,
            excluded if given is None else "",
            forced,
            tuple(parameter.shape),
            master=weakref.ref(parameter),
        )
        smoothing.weights.append(weight)


def _last_match(names: list[str], globs: Iterable[str]) -> str | None:
    matching = [glob for glob in globs if any(fnmatch.fnmatchcase(name, glob) for name in names)]
    return matching[-1] if matching else None


def _known(fmt: str | Format | None) -> Format | None:
    """A format that its own name resolves to: graphs hold formats by name."""
    if fmt is None:
        return None
    found = resolve(fmt)
    try:
        if resolve(found.name) == found:
            return found
    except ValueError:
        pass
    return register_format(found.name, found)


def _check_weights(smoothing: Smoothing) -> None:
    for weight in smoothing.weights:
        parameter = weight.held()
        assert parameter is not None
        if weight.format is None:
            continue
        if not parameter.is_floating_point():
            raise TypeError(
                f"model: {weight.name!r} is {parameter.dtype}, expected a floating-point weight; it cannot be trained, "
                f"so leave it out with only={{{weight.name!r}: None}}"
            )
        if parameter.is_meta:
            raise ValueError(f"model: {weight.name!r} is on the meta device; materialize the model before transform")
        if not bool(torch.isfinite(parameter.detach()).all()):
            local = parameter.detach()
            where = torch.nonzero(~torch.isfinite(local))[0].tolist() if type(local) is Tensor else "some element"
            raise ValueError(f"model: {weight.name!r} is not finite at {where}; repair the checkpoint before transform")
    if not any(weight.format is not None for weight in smoothing.weights):
        raise ValueError("model: no parameter is left to quantize; a weight needs two dimensions, or a glob in only")


# ------------------------------------------------------------------------------------------- torch.compile(backend=...)

_OURS = ("fmt", "method", "strength", "curvature", "inner", "decay", "noise")


def dynamo_backend(gm: Any, example_inputs: Any, *, mode: str | None = None, options: Any = None) -> Any:
    """The backend behind ``torch.compile(model, backend="lotion_fx")``.

    The parameters that a graph uses come under smoothing as the graph is compiled. ``options`` may hold `transform`'s
    own ``fmt``, ``method``, ``strength``, ``curvature``, ``inner``, ``decay`` and ``noise``; the rest are Inductor's.
    """
    options = dict(options or {})
    ours = {name: options.pop(name) for name in _OURS if name in options}
    key = (mode, tuple(sorted(ours.items())))
    fmt = resolve(ours.pop("fmt", "nvfp4"))
    settings = {"method": "lotion", "strength": 1.0, "curvature": "factored", "inner": "inductor", "decay": 0.99}
    settings |= {"noise": "randomized", **ours}
    if settings["curvature"] == "ggn":
        raise ValueError("curvature='ggn' needs the model's call, which no backend sees; use transform(model)")
    _check_compile_options(mode, options, str(settings["inner"]))
    objective.install()

    def adopt(root: nn.Module, name: str, owner: nn.Module, attribute: str, parameter: Tensor) -> None:
        smoothings = _adopting.setdefault(root, {})
        if key not in smoothings:
            smoothings[key] = _settings(finish=None, steps=None, finish_term=True, **settings)  # type: ignore[arg-type]
            smoothings[key].adopted = True
        small = parameter.dim() < 2
        weight = Weight(
            name,
            [(weakref.ref(owner), attribute)],
            smoothings[key],
            None if small else _known(fmt),
            "fewer than two dimensions" if small else "",
            shape=tuple(parameter.shape),
            master=weakref.ref(parameter),
        )
        smoothings[key].weights.append(weight)
        registry.add(weight)

    return Backend(str(settings["inner"]), mode, tuple(sorted(options.items())), adopt)(gm, example_inputs)


_adopting: weakref.WeakKeyDictionary[nn.Module, dict[Any, Smoothing]] = weakref.WeakKeyDictionary()
