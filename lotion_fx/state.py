"""What is remembered about each smoothed weight, and how a tensor seen anywhere is recognized as that weight.

A weight is identified by the module and attribute that own it, never by its storage: FSDP2 hands the compiled graph a
temporary unsharded parameter and the optimizer a sharded one, both of which its module owns at some moment.
A model reaches this through the hooks that it carries (`carried`): its `state_dict` is that of a plain model, a copy is
under smoothing as the model is. No weak reference is ever made to a tensor: `torch.utils.swap_tensors`, and so FSDP2's
``model.to()``, refuses one that has any.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lotion_fx import private
from lotion_fx.gathered import Gathered
from lotion_fx.names import plain_name
from lotion_fx.numerics.formats import Format
from lotion_fx.numerics.quantizer import Quantizer
from lotion_fx.passes.attach.attach import LATENT, MEAN, STE, Plan
from lotion_fx.passes.attach.probe import Code, Layout
from lotion_fx.passes.attach.usage import INNER, Use, why_not_of
from lotion_fx.registry import Registry
from lotion_fx.scalars import shown
from lotion_fx.settings import Settings
from lotion_fx.tally import Tally
from lotion_fx.unseen import axis_unseen, is_told_by_module, why_not_unseen

if TYPE_CHECKING:
    from lotion_fx.carried import StandIn


class Smoothing:
    """One transformed model.

    Args:
        settings: what `transform` was told.

    Attributes:
        weights: its parameters, selected or not.
        tally: where its training stands.
        model: what `transform` was given, weakly.
        is_whole: whether it is compiled as one, and not by regions.
        compile: makes a copy of the model call compiled code, as `transform` made the model.
        bring_up_to_date: makes the weights those that the model holds now, see `members`.
        seen_changes: `Registry.changes` when it last did.
        loss_call: model and ``loss_fn`` compiled as one, where `transform` was given a function.
        said: what the user was told, once each.
        places: of a copy's weights, until the copy is settled: (path of the module, attribute, weight).
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.weights: list[Weight] = []
        self.tally = Tally(settings, self.weights)
        self.model: Callable[[], nn.Module | None] = _nothing
        self.is_whole = True
        self.compile: Callable[[nn.Module], None] | None = None
        self.bring_up_to_date: Callable[[Smoothing, nn.Module], None] | None = None
        self.seen_changes = 0
        self.loss_call: Callable[..., Any] | None = None
        self.said: set[str] = set()
        self.places: list[tuple[str, str, Weight]] = []
        self._calls, self._around, self._lock = 0, contextlib.ExitStack(), threading.RLock()

    @property
    def is_running(self) -> bool:
        """Whether a call of the model is under way."""
        return self._calls > 0

    @contextlib.contextmanager
    def called(self, around: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
        """Inside, a call of the model is under way.

        Args:
            around: what is to be entered with the first of several calls at a time, and left with the last: threads may
                serve one model, and a model may call itself.
        """
        with self._lock:
            if not self._calls:
                self._around.enter_context(around())
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if not self._calls:
                    self._around.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Smoothing:
        """That of a copy of the model, where its training stands included."""
        memo[id(self)] = made = Smoothing(self.settings)
        made.is_whole = self.is_whole
        made.compile, made.bring_up_to_date = self.compile, self.bring_up_to_date
        made.seen_changes = self.seen_changes
        self.tally.measuring.holding.copied(memo)
        made.weights.extend(copy.deepcopy(weight, memo) for weight in self.weights)
        made.tally.restore(copy.deepcopy(self.tally.saved()))
        copies = dict(zip(self.weights, made.weights, strict=True))
        for path, module in model.named_modules() if (model := self.model()) is not None else ():
            held = registry.owned.get(module, {}).items()
            made.places += [(path, attribute, copies[w]) for attribute, w in held if w in copies]
        return made

    def take_in(self, model: nn.Module) -> None:
        """Takes in what was put into the model since it was last looked through."""
        if self.seen_changes != registry.changes and self.bring_up_to_date is not None:
            self.seen_changes = registry.changes
            self.bring_up_to_date(self, model)

    def settle(self, model: nn.Module) -> None:
        """Finds the weights of a copy in it, and compiles it."""
        self.model, places, self.places = weakref.ref(model), self.places, []
        for path, attribute, weight in places:
            weight.is_owned_by(model.get_submodule(path), attribute)
        for weight in dict.fromkeys(weight for _, _, weight in places):
            registry.add(weight)
        if self.compile is not None:
            self.compile(model)


def _nothing() -> None:
    """A weak reference to what is not there yet."""


@dataclass(eq=False)
class Curvature:
    """What is known of one weight's curvature, from one step to the next. Written by the step's term alone.

    Args:
        code: how the graphs made it; None before the first step.
        ema: float32 ``[payload | mass]``, see `update`; None before the first step, and where ``moment`` is.
        moment: the optimizer's second moment, where curvature is taken from it.
        absent: why it did not come with the last step's gradient, see `missing`; empty where it did.
        is_missed: whether the user was told so.
        was_idle: whether a step had a gradient of zeros for it once, as of a layer that some batches leave out.
        specs: of the last updates, by their source, each with what it was made for, see `update.Spec`.
    """

    code: Code | None = None
    ema: Tensor | None = None
    moment: Tensor | None = None
    absent: str = ""
    is_missed: bool = False
    was_idle: bool = False
    specs: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Weight:
    """One parameter of a transformed model.

    Args:
        name: its qualified name.
        owners: every (module, attribute) that holds it; more than one where it is tied.
        smoothing: of the model.
        format: None where it stays in full precision.
        excluded: why, if that is known beforehand.
        forced: it was asked for by name, so no use of it can deselect it.
        shape: as the model holds it.
        shard: the sharded parameter that the optimizer steps, which the owner does not hold at all times; else None.
        uses, is_in_graphs: what is done with it, None until a graph was seen; whether compiled graphs round it.
        gathered: since the last step.
        curvature: over the steps.
        gains: of the strength, in a moment stream and in the joint-graph form.
        standing: what stands in the parameter's place now, see `carried`.
    """

    name: str
    owners: list[tuple[weakref.ref[nn.Module], str]]
    smoothing: Smoothing
    format: Format | None
    excluded: str
    forced: bool
    shape: tuple[int, ...]
    shard: Tensor | None
    uses: list[Use] | None = None
    is_in_graphs: bool = False
    gathered: Gathered = field(default_factory=Gathered)
    curvature: Curvature = field(default_factory=Curvature)
    gains: tuple[float, float] = (1.0, 1.0)
    standing: StandIn | None = None
    _plans: dict[tuple[str, bool], Plan | None] = field(default_factory=dict)
    _layout: Layout | None = None
    _quantizer: Quantizer | None = None
    _gain: tuple[float, Tensor] | None = None

    @staticmethod
    def owned_by(owners: Sequence[tuple[nn.Module, str]], parameter: Tensor, **identity: Any) -> Weight:
        """A weight that knows its owners weakly."""
        references = [(weakref.ref(module), attribute) for module, attribute in owners]
        weight = Weight(owners=references, shape=tuple(parameter.shape), shard=None, **identity)
        weight.is_stepped_as(parameter)
        return weight

    def __deepcopy__(self, memo: dict[int, Any]) -> Weight:
        """That of a copy of the model, which is to find its owners."""
        smoothing = copy.deepcopy(self.smoothing, memo)
        if id(self) not in memo:
            known = self.curvature
            memo[id(self)] = replace(
                self,
                smoothing=smoothing,
                owners=[],
                shard=None,
                gathered=Gathered(steps=self.gathered.steps),
                curvature=Curvature(known.code, None if known.ema is None else known.ema.clone()),
                standing=None,
                _plans={},
                _gain=None,
            )
        return memo[id(self)]

    # ------------------------------------------------------------------------------------------------------- identity

    def is_owned_by(self, module: nn.Module, attribute: str) -> None:
        """One more module holds it."""
        if not any(ref() is module and name == attribute for ref, name in self.owners):
            self.owners.append((weakref.ref(module), attribute))
        if isinstance(parameter := self.parameter(), DTensor):
            self.is_stepped_as(parameter)

    def _held(self) -> Iterator[Tensor]:
        """The tensor that each owner holds now, sharded or not."""
        for ref, attribute in self.owners:
            held = None if (module := ref()) is None else private.parameters_of(module).get(attribute)
            if isinstance(held, Tensor):
                yield held

    def tensors(self) -> list[Tensor]:
        """Every tensor that is this weight at this moment: one unless it is sharded, tied, or has a stand-in."""
        apart = self.shard if self.standing is None else self.standing.parameter  # one that is sharded has none
        return [*self._held()] if apart is None else [apart, *self._held()]

    def parameter(self) -> Tensor | None:
        """The tensor that the first owner holds now (sharded or not), None if it is gone."""
        return next(self._held(), None)

    @property
    def master(self) -> Tensor | None:
        """The parameter that the optimizer steps; None if it is gone, or while another tensor stands in for it."""
        if self.standing is not None:
            return self.standing.parameter
        held = self.parameter() if self.shard is None else self.shard
        return held if isinstance(held, nn.Parameter) else None

    def is_stepped_as(self, parameter: Tensor) -> None:
        """An optimizer steps it as this parameter."""
        self.shard = parameter if isinstance(parameter, DTensor) else None

    def is_now(self, tensor: Tensor) -> bool:
        """Whether this tensor is the weight at this moment."""
        for ref, attribute in self.owners:  # plainly: it is asked many times a step
            if (module := ref()) is not None and private.parameters_of(module).get(attribute) is tensor:
                return True
        return tensor is (self.shard if self.standing is None else self.standing.parameter)

    @property
    def training(self) -> bool:
        return any(module.training for ref, _ in self.owners if (module := ref()) is not None)

    # ------------------------------------------------------------------------------------------- what graphs say of it

    def learn(self, uses: Sequence[Use], *, in_graph: bool = False) -> None:
        """Adds uses that were found of this weight, ``in_graph``: by one that rounds it itself."""
        self.is_in_graphs |= in_graph
        if self.uses is None or any(use not in self.uses for use in uses):
            self.uses = list(dict.fromkeys([*(self.uses or []), *uses]))
            self._plans.clear()
            self._layout = self._quantizer = None

    @property
    def contraction(self) -> Use | None:
        """The use that fixes blocks and factors: the first product whose axis is known, else the first use."""
        uses = self.uses or []
        known = [use for use in uses if use.is_product]
        return next(iter([*(use for use in known if use.axis is not None), *known, *uses]), None)

    @property
    def axis(self) -> int:
        """The dimension that blocks run along; its module's where no graph tells."""
        use = self.contraction
        return axis_unseen(self._held_by, self.shape) if use is None or use.axis is None else use.axis

    @property
    def _held_by(self) -> list[tuple[nn.Module | None, str]]:
        return [(ref(), attribute) for ref, attribute in self.owners]

    @property
    def quantizer(self) -> Quantizer:
        """How it is rounded; of a weight with a format."""
        if self._quantizer is None:
            assert self.format is not None, f"{self.name} stays in full precision"
            self._quantizer = Quantizer(self.format, self.axis, self.smoothing.settings.noise)
        return self._quantizer

    @property
    def layout(self) -> Layout:
        """Of its probe, and of its state unless that is the optimizer's."""
        if self._layout is None:
            self._layout = self._make_layout()
        return self._layout

    def _make_layout(self) -> Layout:
        use, kind = self.contraction, self.smoothing.settings.curvature
        groups, rows = (use.groups, use.rows) if use else (1, self.shape[0])
        kind = {"fisher": "none", "ggn": "factored"}.get(kind, kind)
        direct = all(other.kind != INNER for other in self.uses or ())
        return Layout(kind, self.shape, groups, rows, direct)

    @property
    def is_analytic(self) -> bool:
        """Whether the graphs make its curvature by a contraction of squares."""
        return self.curvature.code is Code.ANALYTIC

    @property
    def why_not(self) -> str:
        """Why this weight is not quantized; empty if it is."""
        if self.format is None or self.forced:
            return "" if self.format else self.excluded
        if self.uses is None:
            return why_not_unseen(self._held_by, self.shape)
        return why_not_of(self.uses)

    @property
    def is_known_operand(self) -> bool:
        """Whether its use is known, from graphs or from its module."""
        return self.uses is not None or is_told_by_module(self._held_by)

    @property
    def selected(self) -> bool:
        return self.format is not None and not self.why_not

    # ---------------------------------------------------------------------------------------------------- what it does

    @property
    def mode(self) -> str:
        """The forward that it is to take now."""
        tally = self.smoothing.tally
        return tally.override or (tally.mode_of(self) if self.training else STE)

    def plan(self, with_grad: bool, requires_grad: bool) -> Plan | None:
        """What its node does in the next forward; None where it needs no node, as where a rounded weight stands in.

        Args:
            with_grad: whether autograd records.
            requires_grad: whether the weight does.
        """
        mode = self.mode if self.standing is None or self.standing.until_taken else LATENT
        probing = with_grad and requires_grad and self.training and self.smoothing.tally.probes
        if (mode, probing) not in self._plans:
            self._plans[mode, probing] = self._planned(mode, probing) if self.selected else None
        plan = self._plans[mode, probing]
        return None if plan is None or plan.is_identity else plan

    def _planned(self, mode: str, probing: bool) -> Plan:
        settings, quantizer = self.smoothing.settings, self.quantizer
        moments = settings.moments if probing and settings.loss_fn is not None else "off"
        # A saturated weight's mean is the last level, and a moment stream is about means.
        at_mean = mode == LATENT and moments != "off" and quantizer.format.saturates
        return Plan(MEAN if at_mean else mode, quantizer, self.layout if probing else None, moments)

    @property
    def stream_strength(self) -> float:
        """Of its term in a moment stream."""
        return 1.0 if self.smoothing.tally.plain else self.smoothing.settings.strength * self.gains[0]

    @property
    def joint_strength(self) -> float:
        """Of its term in the joint-graph form, analytic or Fisher."""
        return 1.0 if self.smoothing.tally.plain else self.smoothing.settings.strength * self.gains[1]

    def gain_on(self, device: torch.device) -> Tensor:
        """`stream_strength` as the 0-d tensor that a graph takes, remade where it or the device has changed."""
        now = self.stream_strength
        if self._gain is None or self._gain[0] != now or self._gain[1].device != device:
            self._gain = now, torch.tensor(now, dtype=torch.float32, device=device)
        return self._gain[1]


registry = Registry()


def _modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """The modules, copies among them settled."""
    for module in model.modules():
        before = private.before_of(module)
        if getattr(before, "is_copy", False):
            before.settle(module)
        smoothing = getattr(before, "model", None)
        if smoothing is not None:
            smoothing.take_in(module)
        yield module


def smoothings_of(model: nn.Module) -> list[Smoothing]:
    """Every `Smoothing` that some weight of this model is under, in order of first appearance."""
    found: dict[Smoothing, None] = {}
    for module in _modules_of(model):
        for weight in registry.owned.get(module, {}).values():
            found[weight.smoothing] = None
    return list(found)


def weights_of(model: nn.Module) -> list[Weight]:
    """Every weight of this model under smoothing, selected or not; raises if there is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={shown(model)}: expected a transformed nn.Module, not {type(model).__name__}")
    found: dict[Weight, None] = {}
    for module in _modules_of(model):
        found.update(dict.fromkeys(registry.owned.get(module, {}).values()))
    if not found:
        raise ValueError(
            f"model: this {type(model).__name__} is not under lotion_fx; call lotion_fx.transform(model) first, "
            "or run it once if it was compiled with torch.compile(model, backend='lotion_fx')"
        )
    return list(found)


def names_of(model: nn.Module) -> dict[Weight, str]:
    """Each weight's name in this model, whose parameters hold their own values from here on.

    Two models may hold one weight under different names.
    """
    weights_of(model)
    for smoothing in smoothings_of(model):
        smoothing.tally.measuring.holding.put_back()
    names: dict[Weight, str] = {}
    for prefix, module in model.named_modules():
        for attribute, weight in registry.owned.get(module, {}).items():
            names.setdefault(weight, plain_name(f"{prefix}.{attribute}".removeprefix(".")))
    return names
