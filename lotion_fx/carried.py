"""What the modules of a transformed model carry, so that whoever runs them sees the rounded weights.

Two hooks on each module that owns a weight, and on the model itself. Where our backend traces the module they do
nothing: graphs round what they are given. Where another compiler traces it, its graph ends there. Where the module runs
in Python (recurrent modules, which Dynamo skips; what a graph break or an exhausted recompile limit leaves over),
rounded weights stand in its parameters' places, and their expected-loss term takes the Fisher form at the step.

Around a call of the model itself the same happens to all weights at once, for a module may read another's weight: in
`eval()` to every weight, at values that are rounded once a version; in training to those that no graph was seen to use,
and to all as soon as the model's own forward runs in Python, as it does around a graph break.

A graph that takes the parameter itself meanwhile, out of a list or a closure, is given what stands in its place.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor

from lotion_fx import private
from lotion_fx.announcing import LOG
from lotion_fx.deployed import as_parameter, deployed, forget, forget_changed, linked, rounded, smoothed
from lotion_fx.holders import tell_of_holders
from lotion_fx.numerics.quantizer import Quantizer
from lotion_fx.passes.attach.attach import LATENT, MEAN, RR, STE, STE_SCALE
from lotion_fx.state import Smoothing, Weight, registry

MADE_ITSELF = (
    "lotion_fx compiles this model itself, so no other graph can contain it; leave fullgraph=True out of torch.compile "
    "and strict=True out of torch.export, and all that is around the model is compiled"
)
"""Shown where another compiler insists on one graph."""
_entered: weakref.WeakKeyDictionary[nn.Module, list[contextlib.ExitStack]] = weakref.WeakKeyDictionary()


_correcting = threading.Lock()  # threads may serve one model
_tracers = 0  # how many are tracing a model now, all of whose rounded weights are in place


@torch.compiler.assume_constant_result
def _may_stay() -> bool:
    """Whether a graph that Dynamo is making may contain a module; asked when it is made."""
    return _tracers > 0 or private.traces_for_us()


class StandIn(NamedTuple):
    """What stands in a parameter's place while its model runs in Python.

    Args:
        value: the rounded weight.
        parameter: whose place it takes.
        quantizer: by which it was rounded.
        until_taken: a graph that takes it takes the parameter instead, and rounds that itself.
    """

    value: Tensor
    parameter: Tensor
    quantizer: Quantizer
    until_taken: bool


class Before:
    """The hook before a module's forward.

    Args:
        weights: those that the module owns, by attribute.
        model: the transformed model that the module is; None for a part of one.

    Attributes:
        is_copy: whether the module is to become the owner of its weights yet.
        call: what calling that model runs.
    """

    def __init__(self, weights: dict[str, Weight], model: Smoothing | None = None) -> None:
        self.weights, self.model, self.is_copy = weights, model, False
        # Not in `Smoothing`: it holds the model, which nothing that the registry holds may keep alive.
        self.call: Callable[..., Any] | None = None

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_dynamo_compiling():
            _enter(self, module)
        elif not _may_stay():
            private.leave_graph(MADE_ITSELF)

    def __getattr__(self, name: str) -> Any:
        if name == "__name__":  # of a hook as torch.jit.script takes it
            raise AttributeError(
                "torch.jit.script cannot script a model that lotion_fx has transformed; use torch.export.export or "
                "torch.jit.trace on it in eval()"
            )
        raise AttributeError(name)

    def settle(self, module: nn.Module) -> None:
        """Makes a copied module the owner of its weights, and a copied model one that compiles."""
        self.is_copy = False
        if self.model is not None:
            if isinstance(private.call_of(module), _FirstCall):
                private.replace_call(module, None)  # regions are called by the module's own
            self.model.settle(module)
            for part in module.modules():  # it may have been another model's, and graphs settle nothing
                if getattr(before := private.before_of(part), "is_copy", False):
                    before.settle(part)
        for attribute, weight in self.weights.items():
            if private.parameters_of(module).get(attribute) is not None:  # it may be a parametrization's by now
                weight.is_owned_by(module, attribute)
                registry.add(weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> Before:
        made = Before(copy.deepcopy(self.weights, memo), copy.deepcopy(self.model, memo))
        made.is_copy = True
        if self.model is not None and (copied := memo.get(id(self.model.model()))) is not None:
            private.replace_call(copied, _FirstCall(copied))
        return made

    def __reduce__(self) -> Any:
        smoothing = self.model or next(iter(self.weights.values())).smoothing
        smoothing.tally.measuring.holding.put_back()  # torch.save writes values after all that it has met
        return Unpickled, (smoothing.said,)


class _FirstCall:
    """What calling a copied model runs until it is settled."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    @torch.compiler.disable(reason=MADE_ITSELF)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model()
        assert model is not None
        private.before_of(model).settle(model)
        return model(*args, **kwargs)


class Unpickled:
    """What is left of `Before` in a file.

    Args:
        said: shared by the hooks of one model: what its user was told.
    """

    def __init__(self, said: set[str]) -> None:
        self.said = said

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_dynamo_compiling() and "unpickled" not in self.said:
            self.said.add("unpickled")
            warnings.warn(
                f"this {type(module).__name__} was unpickled and runs at its full-precision weights; call "
                "lotion_fx.transform on it to have them rounded",
                stacklevel=2,
            )


def _after(module: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_dynamo_compiling():
        _leave(module)


for _hook in (Before.__call__, Unpickled.__call__, _after):
    private.inline_only(_hook)


def carry(model: nn.Module, smoothing: Smoothing) -> None:
    """Puts the hooks on a model and on every module of it that owns a weight with a format."""
    owned: dict[nn.Module, dict[str, Weight]] = {model: {}}
    for weight in smoothing.weights:
        for ref, attribute in weight.owners if weight.format else ():
            if (module := ref()) is not None:
                owned.setdefault(module, {})[attribute] = weight
    for module, weights in owned.items():
        before, known = Before(weights, smoothing if module is model else None), private.before_of(module)
        if isinstance(known, Before):
            if known.weights == weights and known.model is before.model:
                continue
            before.call = known.call
        if known is None:
            module.register_state_dict_pre_hook(_before_saving)
            module.register_load_state_dict_pre_hook(_before_loading)
        private.hook_forward(module, before, _after)


def _before_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """What is saved are the weights' own values."""
    for weight in registry.owned.get(module, {}).values():
        weight.smoothing.tally.measuring.holding.put_back()


def _before_loading(module: nn.Module, state: Any, prefix: str, *rest: Any) -> None:
    """What is loaded replaces the weights' own values."""
    _before_saving(module, prefix, False)


@torch.compiler.disable
def _enter(before: Before, module: nn.Module) -> None:
    """A module runs in Python from here on."""
    if before.is_copy:
        before.settle(module)
    if private.is_traced_by_fx() and before.weights:
        warnings.warn(
            f"torch.fx.symbolic_trace: its graph reads {type(module).__name__}.{next(iter(before.weights))} at full "
            "precision; use torch.export.export on the model in eval()",
            stacklevel=4,
        )
    if not private.tracer():
        _forward_comes(before, module)
    stack = contextlib.ExitStack()
    if before.model is not None:
        _call_again(before, module)
        stack.enter_context(_run_in_python(before.model, module))
    else:
        if not all(weight.smoothing.is_running for weight in before.weights.values()):
            forget_changed(before.weights.values())
        stack.enter_context(standing_in(before.weights.values()))
    _entered.setdefault(module, []).append(stack)


def _forward_comes(before: Before, module: nn.Module) -> None:
    """Tells of a forward outside of any call of its model."""
    smoothings = {weight.smoothing for weight in before.weights.values() if not weight.smoothing.is_running}
    for smoothing in smoothings:
        smoothing.tally.forward_comes(trains=module.training and torch.is_grad_enabled(), of_part=True)


@torch.compiler.disable
def _leave(module: nn.Module) -> None:
    if stacks := _entered.get(module):
        stacks.pop().close()


def _call_again(before: Before, model: nn.Module) -> None:
    """Puts the model's own compiled call back where `Module.compile` has replaced it."""
    if before.call is not None and private.replaced_call(model, before.call):
        private.replace_call(model, before.call)
        warnings.warn(
            f"{type(model).__name__}.compile() after lotion_fx.transform: the transform compiles the model itself, and "
            "from the next call on that compiled call runs again; leave compile() out",
            stacklevel=4,
        )


# ---------------------------------------------------------------------------------------------------------- standing in


def all_standing_in(smoothing: Smoothing) -> contextlib.AbstractContextManager[None]:
    """Around a call of a model: rounded weights stand in for all those that graphs do not round themselves."""
    return smoothing.called(
        lambda: standing_in(_left_to_python(smoothing), sharded_apart=True, until_taken=not _is_broken(smoothing))
    )


@contextlib.contextmanager
def _run_in_python(smoothing: Smoothing, model: nn.Module) -> Iterator[None]:
    """Around a model's own forward where Python runs it, which may read any weight before a graph does."""
    with all_standing_in(smoothing):
        if not private.tracer():
            smoothing.tally.graph_ran(in_python=True)
        is_broken = _is_broken(smoothing)
        weights = [w for w in smoothing.weights if w.selected and (is_broken or not w.is_in_graphs)]
        with standing_in(weights, sharded_apart=True, until_taken=not is_broken):
            tell_of_holders(smoothing, model)
            yield


def _is_broken(smoothing: Smoothing) -> bool:
    """Whether Python runs between graphs of a model that was to be one; between regions it runs by design."""
    return smoothing.tally.has_breaks and smoothing.is_whole


def _left_to_python(smoothing: Smoothing) -> list[Weight]:
    weights = [weight for weight in smoothing.weights if weight.selected]
    at_rest = [weight for weight in weights if _at_rest(weight)]
    resting = set(at_rest)
    forget(weight for weight in weights if weight.training and weight not in resting)
    forget_changed(at_rest)
    unknown = [] if smoothing.tally.forwards > 1 else [w for w in at_rest if not w.is_known_operand]
    if unknown and (tracer := private.tracer()):
        warnings.warn(
            f"{tracer} of a model that never ran: {unknown[0].name!r} is rounded in blocks along its dimension "
            f"{unknown[0].axis}, which a run may correct; call the model once before, in eval()",
            stacklevel=2,
        )
    # In training graphs round faster; but where Python runs between them, it may read any weight.
    is_broken = _is_broken(smoothing)
    return [*at_rest, *(w for w in weights if (is_broken or not w.is_in_graphs) and w not in resting)]


@contextlib.contextmanager
def standing_in(weights: Iterable[Weight], *, sharded_apart: bool = False, until_taken: bool = False) -> Iterator[None]:
    """Inside, rounded weights stand in their owners' places.

    Args:
        sharded_apart: sharded weights are left to graphs, instead of refused.
        until_taken: graphs round those in training themselves.

    Raises:
        ValueError: the weight is sharded, or what traces the call cannot differentiate its rounding.
    """
    global _tracers
    standing: list[Weight] = []
    tracer = private.tracer()
    try:
        _tracers += bool(tracer)
        for weight in weights:
            if weight.standing is not None:
                if not until_taken and weight.standing.until_taken:
                    weight.standing = weight.standing._replace(until_taken=False)
                continue
            parameter = weight.parameter()
            if parameter is None or weight.mode == LATENT or not weight.selected:
                continue
            if isinstance(parameter, DTensor):
                if sharded_apart:
                    continue
                raise ValueError(f"no compiled graph contains {weight.name!r}, and it is sharded: put it into regions=")
            taken = until_taken and not _at_rest(weight)
            with _own_numbers(parameter, apart=taken and weight.mode == RR):
                value = _value(weight, parameter, tracer)
            weight.standing = StandIn(value, parameter, weight.quantizer, taken)
            standing.append(weight)
            _place(weight, parameter, weight.standing.value)
        yield
    finally:
        _tracers -= bool(tracer)
        for weight in standing:
            stood, weight.standing = weight.standing, None
            assert stood is not None
            _place(weight, stood.value, stood.parameter)


def _own_numbers(parameter: Tensor, *, apart: bool) -> contextlib.AbstractContextManager[None]:
    """Inside, if apart, random numbers are drawn that come again: those of the graph that is to take the parameter."""
    kind = parameter.device.type
    elsewhere: dict[str, Any] = {} if kind == "cpu" else {"device_type": kind}
    return torch.random.fork_rng([] if kind == "cpu" else [parameter.device], enabled=apart, **elsewhere)


def taken_now(weight: Weight) -> Tensor:
    """What a graph is to take for a weight that has a stand-in: the parameter, where it rounds that itself.

    The stand-in is made again where a graph has just told how the weight is blocked or used.
    """
    stood = weight.standing
    assert stood is not None
    if not _is_right(weight, stood):
        with _correcting:
            stood = weight.standing or stood
            if not _is_right(weight, stood):
                stood = weight.standing = _corrected(weight, stood)
    return stood.parameter if stood.until_taken else stood.value


def _is_right(weight: Weight, stood: StandIn) -> bool:
    """Whether what stands in for a weight is what it is rounded to, by what graphs have told so far."""
    return weight.quantizer == stood.quantizer if weight.selected else stood.value is stood.parameter


def _corrected(weight: Weight, stood: StandIn) -> StandIn:
    """Puts in a weight's place what it is rounded to by what graphs have told, the parameter where it is not."""
    value = _value(weight, stood.parameter, private.tracer()) if weight.selected else stood.parameter
    _place(weight, stood.value, value)
    if _is_broken(weight.smoothing) and "corrected" not in weight.smoothing.said:
        weight.smoothing.said.add("corrected")
        how = f"in blocks along dimension {weight.axis}" if weight.selected else "not at all"
        LOG.info(  # no warning, for nobody knows whether Python has read it
            "%r is rounded %s, as a graph has told only now: where Python has read it before in this call, outside of "
            "graphs, that was in blocks along dimension %d; call the model again",
            *(weight.name, how, stood.quantizer.axis),
        )
    return stood._replace(value=value, quantizer=weight.quantizer)


def _place(weight: Weight, old: Tensor, new: Tensor) -> None:
    for ref, attribute in weight.owners:
        module = ref()
        if module is not None and (held := private.parameters_of(module)).get(attribute) is old:
            held[attribute] = new
            private.refresh_flat_weights(module)


def _at_rest(weight: Weight) -> bool:
    """Whether it runs at the values that are deployed."""
    return (not weight.training or weight.smoothing.tally.is_frozen(weight)) and weight.mode == STE


def _value(weight: Weight, parameter: Tensor, tracer: str) -> Tensor:
    """What stands in for a parameter, its gradient passed on to it, where `private.tracer` is this."""
    mode = weight.mode
    if not tracer and not _at_rest(weight):
        made = as_parameter(smoothed(weight, parameter, mode), parameter)
        if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            made.requires_grad_(parameter.requires_grad)  # graphs are guarded by it
        return made
    if mode in (STE_SCALE, MEAN):
        raise ValueError(
            f"{tracer} cannot trace the rounding of {weight.name!r} in this mode of training; call eval(), or use "
            "lotion_fx.full_precision(model)"
        )
    if mode == RR:
        values = weight.quantizer.rr(parameter.detach())
    elif tracer in ("torch.func", "make_fx") or not _is_real(parameter):
        real = private.real_of(parameter) if tracer == "torch.export" else None
        if real is not None and _is_real(real):
            values = rounded(weight, real)
        else:
            values = weight.quantizer.rtn(parameter.detach())
        if tracer == "torch.export":
            values.requires_grad_(parameter.requires_grad)  # by which some kernels choose their way
            # torch.export takes it for a parameter that was not registered. It is a constant, and meant.
            warnings.filterwarnings("ignore", r"A model attribute `.*lifted_tensor_\d+` requires gradient")
    else:
        values = deployed(weight, parameter, is_traced=bool(tracer))
    differentiates = (
        tracer == "torch.func"
        or (torch.is_grad_enabled() and parameter.requires_grad)
        or forward_ad.unpack_dual(parameter).tangent is not None
    )
    if tracer in ("torch.export", "torch.jit.trace"):  # what is exported is not trained
        return values
    return linked(parameter, values) if differentiates else values


def _is_real(parameter: Tensor) -> bool:
    """Whether a tensor has values of its own: it is not traced, sharded, or without data."""
    return type(parameter) in (Tensor, nn.Parameter) and not parameter.is_meta and not private.is_wrapped(parameter)
