"""What is remembered about each smoothed weight, and how a tensor seen anywhere is recognized as that weight.

A weight is identified by the module and attribute that own it, never by its storage: FSDP2 hands the compiled graph a
temporary unsharded parameter and the optimizer a sharded one, both of which its module owns at some moment.
No weak reference is ever made to a tensor: `torch.utils.swap_tensors`, and so FSDP2's ``model.to()``, refuses one that
has any. Nothing here is reachable from the model, so `state_dict`, `deepcopy` and pickling see a plain model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lotion_fx import private
from lotion_fx.numerics.formats import Format
from lotion_fx.numerics.quantizer import Quantizer
from lotion_fx.passes.attach.attach import LATENT, MEAN, STE, Plan
from lotion_fx.passes.attach.probe import Code, Layout
from lotion_fx.passes.attach.usage import CONTRACTION, EMBEDDING, Use
from lotion_fx.scalars import shown
from lotion_fx.settings import Settings
from lotion_fx.tally import Gathered, Tally

_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.GroupNorm)


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
        absent: why it did not come with the last step's gradient, see `missing`; empty where it did.
        is_missed: whether the user was told so.
        spec: of the last update, with what it was made for, see `update.Spec`.
    """

    code: Code | None = None
    ema: Tensor | None = None
    moment: Tensor | None = None
    absent: str = ""
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
        shard: the sharded parameter that the optimizer steps, which the owner does not hold at all times; else None.
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
    shard: Tensor | None
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
        """A weight that knows its owners weakly."""
        references = [(weakref.ref(module), attribute) for module, attribute in owners]
        weight = Weight(owners=references, shape=tuple(parameter.shape), shard=None, **identity)
        weight.is_stepped_as(parameter)
        return weight

    # ------------------------------------------------------------------------------------------------------- identity

    def _held(self) -> Iterator[Tensor]:
        """The tensor that each owner holds now, sharded or not."""
        for ref, attribute in self.owners:
            module = ref()
            if module is not None and isinstance(tensor := private.parameters_of(module).get(attribute), Tensor):
                yield tensor

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is this weight at this moment: one unless it is sharded or tied."""
        if self.shard is not None:
            yield self.shard
        yield from self._held()

    def parameter(self) -> Tensor | None:
        """The tensor that the first owner holds now (sharded or not), None if it is gone."""
        return next(self._held(), None)

    @property
    def master(self) -> Tensor | None:
        """The parameter that the optimizer steps; None if it is gone, or while another tensor stands in for it."""
        held = self.parameter() if self.shard is None else self.shard
        return held if isinstance(held, nn.Parameter) else None

    def is_stepped_as(self, parameter: Tensor) -> None:
        """An optimizer steps it as this parameter."""
        self.shard = parameter if isinstance(parameter, DTensor) else None

    def is_now(self, tensor: Tensor) -> bool:
        """Whether this tensor is the weight at this moment."""
        return any(each is tensor for each in self.tensors())

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
        """The use that fixes blocks and factors: the first contraction whose axis is known, else the first use."""
        uses = self.uses or []
        known = [use for use in uses if use.kind == CONTRACTION]
        return next(iter([*(use for use in known if use.axis is not None), *known, *uses]), None)

    @property
    def axis(self) -> int:
        """The dimension that blocks run along; the last one where no graph tells."""
        use = self.contraction
        return len(self.shape) - 1 if use is None or use.axis is None else use.axis

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
        return Layout(kind, self.shape, groups, rows)

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
            modules = [ref() for ref, _ in self.owners]
            return "a lookup table or norm" if any(isinstance(m, _LOOKUPS + _NORMS) for m in modules) else ""
        kinds = {use.kind for use in self.uses}
        if EMBEDDING in kinds:
            return "embedding, tied to a contraction" if CONTRACTION in kinds else "embedding"
        if CONTRACTION not in kinds:
            return "reaches no contraction" + (f": used by {self.uses[0].op}" if self.uses else ": unused")
        return ""

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
    """Every weight under smoothing, by owner, with a cache by tensor identity.

    A cached id says which weight to ask, never that the tensor is that weight: ids are used again.
    """

    def __init__(self) -> None:
        self.owned: weakref.WeakKeyDictionary[nn.Module, dict[str, Weight]] = weakref.WeakKeyDictionary()
        self._seen: dict[int, weakref.ref[Weight]] = {}

    def add(self, weight: Weight) -> None:
        for ref, attribute in weight.owners:
            module = ref()
            assert module is not None
            self.owned.setdefault(module, {})[attribute] = weight

    def __getitem__(self, tensor: Any) -> Weight | None:
        """The weight that this tensor is right now, None if it is none."""
        return self._cached(tensor) or self.find([tensor])[0]

    def find(self, tensors: Iterable[Any]) -> list[Weight | None]:
        """The weight that each of these is right now, None where it is none; all owners are asked once at most."""
        tensors = list(tensors)
        found = [self._cached(tensor) for tensor in tensors]
        if not all(weight is not None or not isinstance(t, Tensor) for t, weight in zip(tensors, found, strict=True)):
            held = self._ask_owners()
            found = [weight or held.get(id(tensor)) for tensor, weight in zip(tensors, found, strict=True)]
        return found

    def _cached(self, tensor: Any) -> Weight | None:
        reference = self._seen.get(id(tensor))
        weight = reference() if reference is not None else None
        return weight if weight is not None and weight.is_now(tensor) else None

    def _ask_owners(self) -> dict[int, Weight]:
        """Every weight by the ids that it has now, which are cached."""
        weights = dict.fromkeys(weight for attributes in self.owned.values() for weight in attributes.values())
        now = {id(tensor): weight for weight in weights for tensor in weight.tensors()}
        if len(self._seen.keys() | now) > 2 * len(weights):  # FSDP2's weights have two ids; more are of the past
            self._seen.clear()
        self._seen.update((key, weakref.ref(weight)) for key, weight in now.items())
        return now


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
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={shown(model)}: expected a transformed nn.Module, not {type(model).__name__}")
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
    weights_of(model)
    names: dict[Weight, str] = {}
    for prefix, module in model.named_modules():
        for attribute, weight in registry.owned.get(module, {}).items():
            name = f"{prefix}.{attribute}".removeprefix(".").replace("_orig_mod.", "")
            names.setdefault(weight, name)
    return names
