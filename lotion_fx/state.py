"""What is remembered about each smoothed weight, and how a tensor seen anywhere is recognized as that weight.

A weight is identified by the module and attribute that own it, never by its storage: FSDP2 hands the compiled graph a
temporary unsharded parameter and the optimizer a sharded one, both of which its module owns at some moment.
Nothing here is reachable from the model, so `state_dict`, `deepcopy` and pickling see a plain model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lotion_fx.numerics.formats import Format
from lotion_fx.numerics.noise import RANDOMIZED, NoiseLaw
from lotion_fx.passes.attach.attach import LATENT, MEAN, RR, STE, STE_SCALE, Plan
from lotion_fx.passes.attach.probe import Code, Layout
from lotion_fx.passes.attach.usage import CONTRACTION, EMBEDDING, Use
from lotion_fx.passes.moments.certificate import Certificate
from lotion_fx.private import parameters_of

METHODS = {"ptq": LATENT, "ste": STE, "ste_scale": STE_SCALE, "rr": RR, "lotion": LATENT}
MOMENTS = ("closed", "diagonal", "off")
CURVATURES = ("factored", "full", "fisher", "ggn")
_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.GroupNorm)


@dataclass(eq=False)
class Smoothing:
    """The settings of one transformed model, and where its training stands."""

    method: str
    strength: float
    curvature: str
    inner: str
    decay: float = 0.99
    finish: float | None = None
    total_steps: int | None = None
    finish_term: bool = True
    finishing: bool = False
    steps: int = 0
    override: str | None = None  # the forward inside `full_precision` or `randomized`
    weights: list[Weight] = field(default_factory=list)
    told: bool = False  # a joint graph of the forward under way counts T
    terms: Tensor | None = None  # T of the step under way, over all its backward passes
    stepped: bool = False  # an optimizer took these terms
    known_terms: Tensor | None = None  # T of the last step, over all ranks
    clip2: Tensor | None = None  # moving average of the squared clipping factor, as Adam averages squared gradients
    backward: int = -1  # the backward pass in which curvature last arrived
    forwards: int = 0
    adopted: bool = False  # came in through torch.compile(backend="lotion_fx")
    snapshot: dict[Weight, Tensor] = field(default_factory=dict)  # a few gradients as backward left them
    group: Any = None  # DistributedDataParallel's process group
    noise: NoiseLaw = RANDOMIZED
    loss_fn: Any = None  # a callable, or "model" where the model returns its loss; None where graphs hold no loss
    moments: str = "closed"  # see `expected_loss`
    calibrated: int | None = None  # at which step
    loss_call: Any = None  # model and loss_fn compiled as one
    likelihood: str | None = None  # of curvature="ggn": what the model's output parametrizes
    refresh: int = 1  # steps from one curvature pass to the next
    turn: int = 0  # steps as forwards see them: a new one begins with the first forward after an optimizer's step
    closed: bool = False  # an optimizer stepped since the last forward
    last_pass: int | None = None  # the turn of the last curvature pass
    sampling: bool = False  # the curvature pass is under way
    draws: int = 1  # labels that it drew

    @property
    def forward_mode(self) -> str:
        """The training forward: by method, or rounded with the scale differentiated once finishing.

        Under a biased noise the expected loss is taken around the mean of the random weights.
        """
        if self.finishing:
            return STE_SCALE
        return MEAN if self.method == "lotion" and not self.noise.unbiased else METHODS[self.method]

    @property
    def has_term(self) -> bool:
        return self.method == "lotion" and (self.finish_term or not self.finishing)

    @property
    def probes(self) -> bool:
        """Whether curvature is asked of the forward that comes next."""
        return self.has_term and not self.override and (self.curvature != "ggn" or self.sampling)

    @property
    def resting(self) -> bool:
        """Whether the step under way has had no curvature pass."""
        return self.curvature == "ggn" and self.last_pass != self.turn

    @property
    def pass_is_due(self) -> bool:
        return self.resting and self.turn % self.refresh == 0

    @property
    def needs_terms(self) -> bool:
        """Whether some weight's curvature takes T from the user's own loss."""
        return self.curvature != "ggn" or any(w.selected and w.code is not Code.ANALYTIC for w in self.weights)

    def add_terms(self, terms: Tensor) -> None:
        """Adds what one backward pass counted to T, which begins anew after a step."""
        self.terms = terms if self.terms is None or self.stepped else self.terms + terms
        self.stepped = False

    def backward_is_over(self) -> None:
        """Samples the gradients that Fisher curvature will read, so that later clipping can be divided out."""
        for weight in self.weights:
            master = weight.master() if weight.master else None
            if master is not None and master.grad is not None and weight.code is not Code.ANALYTIC and weight.selected:
                self.snapshot[weight] = sample(master.grad).clone()


@dataclass(eq=False)
class Weight:
    """One parameter of a transformed model.

    Args:
        name: its qualified name.
        owners: every (module, attribute) that holds it; more than one where it is tied.
        format: None where it stays in full precision.
        excluded: why, if that is known beforehand.
        forced: it was asked for by name, so no use of it can deselect it.
        uses: what the graphs do with it; None until a graph was seen.
        ema: float32 ``[payload | mass]``, see `objective`; None before the first step.
    """

    name: str
    owners: list[tuple[weakref.ref[nn.Module], str]]
    smoothing: Smoothing
    format: Format | None
    excluded: str = ""
    forced: bool = False
    shape: tuple[int, ...] = ()
    uses: list[Use] | None = None
    probe: Tensor | None = None
    ema: Tensor | None = None
    code: Code | None = None
    terms: Tensor | None = None  # what its probe's header said when it last told T
    bound: int = 0  # times its probe entered a graph in the forward that began last
    forward: int = -1
    warned: bool = False
    entered: bool = False  # the term came in through `penalty` and its backward ran
    steps: int = 0
    master: weakref.ref[Tensor] | None = None  # the parameter that the optimizer steps
    plans: dict[tuple[str, bool], Plan | None] = field(default_factory=dict)
    spec: Any = None  # of its last update, see `update`
    certificate: Certificate | None = None  # of its moment stream, where the loss is in the graph
    in_loss: bool = False  # the loss of the step under way holds its term
    gains: tuple[float, float] = (1.0, 1.0)  # of the strength in a moment stream and in the joint-graph form
    _gain: tuple[float, Tensor] | None = None
    moment: Tensor | None = None  # the optimizer's second moment, where curvature is taken from it
    _layout: Layout | None = None

    def held(self) -> Tensor | None:
        """The tensor that the owner holds now (sharded or not), None if it is gone."""
        for ref, attribute in self.owners:
            module = ref()
            if module is not None and isinstance(tensor := parameters_of(module).get(attribute), Tensor):
                return tensor
        return None

    @property
    def training(self) -> bool:
        return any(module.training for ref, _ in self.owners if (module := ref()) is not None)

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
    def layout(self) -> Layout:
        """Of its probe, and of its state unless that is the optimizer's."""
        if self._layout is None:
            self._layout = self._make_layout()
        return self._layout

    def _make_layout(self) -> Layout:
        use, kind = self.contraction, self.smoothing.curvature
        groups, rows = (use.groups, use.rows) if use else (1, self.shape[0])
        kind = {"fisher": "none", "ggn": "factored"}.get(kind, kind)
        return Layout(kind, self.shape, groups, rows)

    @property
    def stream_strength(self) -> float:
        """Of its term in a moment stream."""
        return self.smoothing.strength * self.gains[0]

    @property
    def joint_strength(self) -> float:
        """Of its term in the joint-graph form, analytic or Fisher."""
        return self.smoothing.strength * self.gains[1]

    def gain_on(self, device: torch.device) -> Tensor:
        """`stream_strength` as the 0-d tensor that a graph takes, remade where it or the device has changed."""
        now = self.stream_strength
        if self._gain is None or self._gain[0] != now or self._gain[1].device != device:
            self._gain = now, torch.tensor(now, device=device)
        return self._gain[1]

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

    def plan(self, with_grad: bool, requires_grad: bool) -> Plan | None:
        """What its node does in the next forward; None where it needs no node.

        Args:
            with_grad: whether autograd records.
            requires_grad: whether the weight does.
        """
        smoothing = self.smoothing
        mode = smoothing.override or (smoothing.forward_mode if self.training else STE)
        probing = with_grad and requires_grad and self.training and smoothing.probes
        if (mode, probing) not in self.plans:
            name = self.format.name if self.format and self.selected else None
            layout = self.layout if probing else None
            moments = smoothing.moments if probing and smoothing.loss_fn is not None else "off"
            # A saturated weight's mean is the last level, and a moment stream is about means.
            at_mean = mode == LATENT and moments != "off" and self.format is not None and self.format.saturates
            noise, forward = smoothing.noise.name, MEAN if at_mean else mode
            self.plans[mode, probing] = Plan(forward, name, self.axis, layout, noise, moments) if name else None
        plan = self.plans[mode, probing]
        return None if plan is None or plan.is_identity else plan

    def learn(self, uses: list[Use]) -> None:
        """Adds the uses that one more graph makes of this weight."""
        if self.uses is None or any(use not in self.uses for use in uses):
            self.uses = list(dict.fromkeys([*(self.uses or []), *uses]))
            self.plans.clear()
            self._layout = None

    def bind(self) -> None:
        """Counts one more use of the probe in the forward under way."""
        if self.forward != self.smoothing.forwards or self.smoothing.adopted:
            self.forward, self.bound = self.smoothing.forwards, 0
        self.bound += 1

    def drop_probe(self) -> None:
        """Forgets what the probe gathered since the last step."""
        self.terms = None
        if self.probe is not None:
            self.probe.grad = None


def sample(grad: Tensor, count: int = 32) -> Tensor:
    """A view of up to ``count`` evenly spaced elements of a gradient, of its local shard if it is a DTensor."""
    flat = local_of(grad).reshape(-1)
    return flat[:: max(1, flat.numel() // count)][:count]


def local_of(tensor: Tensor) -> Tensor:
    """A tensor's values on this rank, detached: the local shard of a DTensor, else the tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


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
                yield weight, parameters_of(module).get(attribute)


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
