"""What is remembered about each smoothed weight, and how a tensor seen anywhere is recognized as that weight.

A weight is identified by the module and attribute that own it, never by its storage: FSDP2 hands the compiled graph a
temporary unsharded parameter and the optimizer a sharded one, both of which its module owns at some moment.
Nothing here is reachable from the model, so `state_dict`, `deepcopy` and pickling see a plain model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lotion_fx import private
from lotion_fx.numerics.formats import Format
from lotion_fx.numerics.quantizer import Quantizer
from lotion_fx.passes.attach.attach import LATENT, MEAN, STE, Plan
from lotion_fx.passes.attach.probe import Code, Layout
from lotion_fx.passes.attach.usage import INNER, Use, why_not_of
from lotion_fx.settings import Settings
from lotion_fx.tally import Gathered, Tally
from lotion_fx.unseen import axis_unseen, why_not_unseen


class Smoothing:
    """One transformed model.

    Args:
        settings: what `transform` was told.

    Attributes:
        weights: its parameters, selected or not.
        tally: where its training stands.
        loss_call: model and ``loss_fn`` compiled as one, where `transform` was given a function.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.weights: list[Weight] = []
        self.tally = Tally(settings, self.weights, finish_term=settings.finish_term)
        self.loss_call: Callable[..., Any] | None = None


@dataclass(eq=False)
class Curvature:
    """What is known of one weight's curvature, from one step to the next. Written by the step's term alone.

    Args:
        code: how the graphs made it; None before the first step.
        ema: float32 ``[payload | mass]``, see `update`; None before the first step, and where ``moment`` is.
        moment: the optimizer's second moment, where curvature is taken from it.
        is_missed: whether the user was told that it did not arrive.
        spec: of the last update, with what it was made for, see `update.Spec`.
    """

    code: Code | None = None
    ema: Tensor | None = None
    moment: Tensor | None = None
    is_missed: bool = False
    spec: Any = None


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
        stepped_as: the parameter that the optimizer steps.
        uses: what the graphs do with it; None until a graph was seen.
        gathered: since the last step.
        curvature: over the steps.
        gains: of the strength, in a moment stream and in the joint-graph form.
    """

    name: str
    owners: list[tuple[weakref.ref[nn.Module], str]]
    smoothing: Smoothing
    format: Format | None
    excluded: str
    forced: bool
    shape: tuple[int, ...]
    stepped_as: weakref.ref[Tensor]
    uses: list[Use] | None = None
    gathered: Gathered = field(default_factory=Gathered)
    curvature: Curvature = field(default_factory=Curvature)
    gains: tuple[float, float] = (1.0, 1.0)
    _plans: dict[tuple[str, bool], Plan | None] = field(default_factory=dict)
    _layout: Layout | None = None
    _quantizer: Quantizer | None = None
    _gain: tuple[float, Tensor] | None = None

    @staticmethod
    def owned_by(owners: Sequence[tuple[nn.Module, str]], parameter: Tensor, **identity: Any) -> Weight:
        """A weight that knows its owners and its parameter weakly."""
        references = [(weakref.ref(module), attribute) for module, attribute in owners]
        return Weight(owners=references, shape=tuple(parameter.shape), stepped_as=weakref.ref(parameter), **identity)

    # ------------------------------------------------------------------------------------------------------- identity

    def parameter(self) -> Tensor | None:
        """The tensor that the owner holds now (sharded or not), None if it is gone."""
        for ref, attribute in self.owners:
            module = ref()
            if module is not None and isinstance(tensor := private.parameters_of(module).get(attribute), Tensor):
                return tensor
        return None

    @property
    def master(self) -> Tensor | None:
        """The parameter that the optimizer steps, None if it is gone."""
        return self.stepped_as()

    def is_stepped_as(self, parameter: Tensor) -> None:
        """An optimizer steps it as this parameter."""
        if self.stepped_as() is not parameter:
            self.stepped_as = weakref.ref(parameter)

    @property
    def training(self) -> bool:
        return any(module.training for ref, _ in self.owners if (module := ref()) is not None)

    # ------------------------------------------------------------------------------------------- what graphs say of it

    def learn(self, uses: Sequence[Use]) -> None:
        """Adds the uses that one more graph makes of this weight."""
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
    def selected(self) -> bool:
        return self.format is not None and not self.why_not

    # ---------------------------------------------------------------------------------------------------- what it does

    def plan(self, with_grad: bool, requires_grad: bool) -> Plan | None:
        """What its node does in the next forward; None where it needs no node.

        Args:
            with_grad: whether autograd records.
            requires_grad: whether the weight does.
        """
        tally = self.smoothing.tally
        mode = tally.override or (tally.forward_mode if self.training else STE)
        probing = with_grad and requires_grad and self.training and tally.probes
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
            self._gain = now, torch.tensor(now, device=device)
        return self._gain[1]


class Registry:
    """Every weight under smoothing, by owner, with a cache by tensor identity."""

    def __init__(self) -> None:
        self.owned: weakref.WeakKeyDictionary[nn.Module, dict[str, Weight]] = weakref.WeakKeyDictionary()
        self._seen: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Weight] | None]] = {}

    def add(self, weight: Weight) -> None:
        for ref, attribute in weight.owners:
            module = ref()
            assert module is not None
            self.owned.setdefault(module, {})[attribute] = weight
        self._seen.clear()

    def __getitem__(self, tensor: Any) -> Weight | None:
        """The weight that this tensor is right now, None if it is none."""
        if not isinstance(tensor, Tensor):
            return None
        hit = self._seen.get(id(tensor))
        if hit is not None and hit[0]() is tensor:
            return hit[1]() if hit[1] else None
        found = next((w for w, held in self._held() if held is tensor), None)
        self._seen[id(tensor)] = (weakref.ref(tensor), weakref.ref(found) if found else None)
        return found

    def _held(self) -> Iterator[tuple[Weight, Any]]:
        for module, attributes in self.owned.items():
            for attribute, weight in attributes.items():
                yield weight, private.parameters_of(module).get(attribute)


registry = Registry()


def smoothings_of(model: nn.Module) -> list[Smoothing]:
    """Every `Smoothing` that some weight of this model is under, in order of first appearance."""
    found: dict[Smoothing, None] = {}
    for module in model.modules():
        for weight in registry.owned.get(module, {}).values():
            found[weight.smoothing] = None
    return list(found)


def weights_of(model: nn.Module) -> list[Weight]:
    """Every weight of this model under smoothing, selected or not; raises if there is none."""
    found: dict[Weight, None] = {}
    for module in model.modules():
        found.update(dict.fromkeys(registry.owned.get(module, {}).values()))
    if not found:
        raise ValueError(
            f"model: this {type(model).__name__} is not under lotion_fx; call lotion_fx.transform(model) first, "
            "or run it once if it was compiled with torch.compile(model, backend='lotion_fx'). A deepcopy is plain."
        )
    return list(found)


def names_of(model: nn.Module) -> dict[Weight, str]:
    """Each weight's name in this model: two models may hold one weight under different names."""
    names: dict[Weight, str] = {}
    for prefix, module in model.named_modules():
        for attribute, weight in registry.owned.get(module, {}).items():
            name = f"{prefix}.{attribute}".removeprefix(".").replace("_orig_mod.", "")
            names.setdefault(weight, name)
    weights_of(model)
    return names
