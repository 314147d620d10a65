"""The compiler backend.

Dynamo calls `Backend` with a forward graph. The graph is compiled once per *plan*, the tuple of what each of its
weights needs: training or evaluation, its phase, with or without a probe. Which plan holds is decided at every call by
looking at the weights that come in: one compiled graph serves many modules, and nothing else tells them apart.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lotion_fx import passes, private, private_threads
from lotion_fx.announcing import announcer
from lotion_fx.blocks import BLOCKS, MANY, depth
from lotion_fx.carried import taken_now
from lotion_fx.compiling import compile_graph, fake_gain, fake_probe
from lotion_fx.partial_backward import tell_of_backward
from lotion_fx.passes.attach.attach import Plan
from lotion_fx.passes.attach.usage import Use, weight_uses
from lotion_fx.passes.lower import lower
from lotion_fx.passes.moments.certificate import Certificate
from lotion_fx.passes.pipeline import ForwardState, run
from lotion_fx.state import Weight, registry


@dataclass(frozen=True)
class Backend:
    """What `torch.compile(backend=...)` is given. Equal backends share compiled code across modules.

    Args:
        inner: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        mode, options: torch.compile's own, for Inductor; options as sorted pairs.
        adopt: called with each placeholder and its tensor, to register parameters that no `transform` did.
    """

    inner: str = "inductor"
    mode: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    adopt: Callable[[fx.Node, Any], None] | None = None

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        return Variants(self, gm, example_inputs)


@dataclass(frozen=True)
class _Compiled:
    """One variant of a graph.

    Args:
        run: takes the graph's inputs, then a gain for each weight in the moment stream, then the probes.
        probed: the inputs that are weights with a probe, in the order of these.
        stream: the weights in the moment stream, in the order of the gains, each with its certificate.
    """

    run: Callable[..., Any]
    probed: Sequence[int]
    stream: Mapping[int, Certificate]


class Variants:
    """One Dynamo graph, compiled once for each plan that its weights were seen to need."""

    known: ClassVar[weakref.WeakSet[Variants]] = weakref.WeakSet()

    def __init__(self, backend: Backend, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.backend, self.gm = backend, gm
        self.context = private.current_context()
        nodes = gm.graph.find_nodes(op="placeholder")
        # Kept, for every variant must reuse their symbols.
        self.inputs = [private.fake_input(x, self.context) for x in example_inputs]
        live = [private.live_tensor(node, x) for node, x in zip(nodes, example_inputs, strict=True)]
        if backend.adopt:
            for node, x in zip(nodes, live, strict=True):
                backend.adopt(node, x)
        self.candidates = [i for i, weight in enumerate(registry.find(live)) if weight is not None]
        for index in self.candidates:
            self.inputs[index] = _leaf(self.inputs[index])
        self.uses = _uses(gm, example_inputs, self.candidates)
        self.taught: weakref.WeakKeyDictionary[Weight, set[int]] = weakref.WeakKeyDictionary()
        self.compiled: dict[tuple[tuple[int, Plan], ...], _Compiled] = {}
        self.is_released = False
        self.known.add(self)
        self._variant(self._plans(live, self._weights(live))[0])

    def __call__(self, *args: Any) -> Any:
        if any(isinstance(x, private.FakeTensor) for x in args):
            return self._rehearse(args)
        if not self.is_released:
            with private_threads.compiling():  # another thread may compile from them
                private.release_tensors(self.gm, self.context)
            self.is_released = True
        held = self._weights(args)
        plans, weights = self._plans(args, held)
        args = _with_stand_ins(args, held)
        compiled = self._variant(plans)
        if weights:
            next(iter(weights.values())).smoothing.tally.graph_ran()
        for index, certificate in compiled.stream.items():
            weights[index].gathered.entered_loss(certificate)
        gains = [weights[index].gain_on(args[index].device) for index in compiled.stream]
        if not compiled.probed:
            return self._differentiable_once(compiled.run(*args, *gains))
        tally = weights[compiled.probed[0]].smoothing.tally
        tally.graph_runs([weights[index] for index in compiled.probed], counts=self.backend.inner != "eager")
        probes = [tally.probe_for(weights[i], args[i]) for i in compiled.probed]
        if tally.steps_inside is not None:
            args = tuple(_Later.apply(x) if i in compiled.probed else x for i, x in enumerate(args))
        outputs = self._differentiable_once(compiled.run(*args, *gains, *probes))
        if tally.mesh is not None:
            tally.terms.gave_outputs(outputs)
        has_node = self.backend.inner != "eager"
        tell_of_backward(outputs, tally, [weights[index] for index in compiled.probed if has_node])
        return outputs

    def _differentiable_once(self, outputs: Any) -> Any:
        """A graph's outputs, whose backward pass refuses to be differentiated where it cannot be."""
        if self.backend.inner != "eager":
            first = next((x for x in outputs if isinstance(x, Tensor) and x.grad_fn is not None), None)
            if first is not None:
                first.register_hook(_refuse_second_derivatives)
        return outputs

    def _rehearse(self, args: Sequence[Any]) -> Any:
        """DDP's graph splitter runs each compiled part once on fakes, which are nobody's weights."""
        plans, compiled = next(iter(self.compiled.items()))
        gains = [args[i].new_ones((), dtype=torch.float32) for i in compiled.stream]
        return compiled.run(*args, *gains, *(fake_probe(args[i], dict(plans)[i]) for i in compiled.probed))

    def _weights(self, args: Sequence[Any]) -> dict[int, Weight]:
        """The weight that each of this call's arguments is, where it is one."""
        found = registry.find(args[index] for index in self.candidates)
        return {index: weight for index, weight in zip(self.candidates, found, strict=True) if weight is not None}

    def _plans(self, args: Sequence[Any], held: Mapping[int, Weight]) -> tuple[dict[int, Plan], dict[int, Weight]]:
        """What each of this call's weights needs, and which of them need anything, by argument."""
        with_grad = torch.is_grad_enabled()
        plans: dict[int, Plan] = {}
        weights: dict[int, Weight] = {}
        for index, weight in held.items():
            if index not in self.taught.setdefault(weight, set()):
                if index in self.uses:
                    # One that shares another's graph is used as the other is.
                    weight.learn(self.uses[index], in_graph=True)
                if isinstance(args[index], DTensor):
                    weight.smoothing.tally.is_divided_over(args[index].device_mesh)
                self.taught[weight].add(index)
            plan = None if weight.format is None else weight.plan(with_grad, args[index].requires_grad)
            if plan is not None:
                plans[index], weights[index] = plan, weight
        return plans, weights

    def _variant(self, plans: Mapping[int, Plan]) -> _Compiled:
        key = tuple(plans.items())
        if key not in self.compiled:
            with private_threads.compiling():
                if key not in self.compiled:  # another thread may have been first
                    self.compiled[key] = self.compile(plans, self.backend)
        return self.compiled[key]

    def compile(self, plans: Mapping[int, Plan], backend: Backend) -> _Compiled:
        """Runs `passes.FORWARD` over the graph and hands the outcome to the inner compiler."""
        with private.within(self.context):
            arch = lower.arch_of(self.inputs[next(iter(plans))].device) if plans else None
            state = ForwardState(self.gm, self.inputs, plans, backend.inner != "eager", arch)
            state = run(passes.FORWARD, state)
            private.complete_sources(state.gm)
            if state.gm is not self.gm:
                private.release_examples(state.gm)
            gains = [fake_gain(self.inputs[i]) for i in state.variances]
            inputs = [*self.inputs, *gains, *(fake_probe(self.inputs[i], state.plans[i]) for i in state.probed)]
            with announcer.compiling(self._told(plans)):
                made = compile_graph(state.gm, inputs, backend.inner, backend.mode, dict(backend.options))
        return _Compiled(made, state.probed, state.certificates)

    def _told(self, plans: Mapping[int, Plan]) -> str:
        """The graph, for a message."""
        later = {tally.phase.name for weight in self.taught if (tally := weight.smoothing.tally).is_later_phase}
        phase = f" of phase {min(later)!r}" if plans and later else ""
        wholes = [weight.smoothing.model() for weight in list(self.taught)[:1] if weight.smoothing.is_whole]
        known = next((model for model in wholes if model is not None and depth(model) >= MANY), None)
        hint = f" (regions={BLOCKS!r} compiles one of its {depth(known)} alike blocks)" if known is not None else ""
        return f"a graph{phase} of {len(self.gm.graph.nodes)} operations with inner={self.backend.inner!r}{hint}"

    def rehearsal(self) -> Iterator[Mapping[int, Plan]]:
        """Compiles every variant once more, after giving its plans, for whoever watches the passes.

        Without Inductor, whose caches keep passes from running.
        """
        inner = "eager" if self.backend.inner == "eager" else "aot_eager"
        for key in list(self.compiled):
            yield dict(key)
            self.compile(dict(key), replace(self.backend, inner=inner))


def _leaf(weight: Any) -> Any:
    """A fake weight as a parameter is one, where its stand-in was seen: the compiler writes into leaves otherwise."""
    return weight if weight.is_leaf else weight.detach().requires_grad_()


def _with_stand_ins(args: tuple[Any, ...], held: Mapping[int, Weight]) -> tuple[Any, ...]:
    """The arguments, each weight that has a stand-in as this graph is to take it, whatever holds it."""
    changed = {
        index: now
        for index, weight in held.items()
        if weight.standing is not None and (now := taken_now(weight)) is not args[index]
    }
    return tuple(changed.get(index, x) for index, x in enumerate(args)) if changed else args


class _Later(torch.autograd.Function):
    """A weight whose gradient arrives after its probe's: an optimizer that steps upon it finds its curvature there."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def _refuse_second_derivatives(grad: Tensor) -> None:
    if torch.is_grad_enabled():  # which is create_graph=True
        raise RuntimeError(
            "create_graph=True: compiled graphs have no second derivatives; transform the model with inner='eager', "
            "which has them, or keep that part of it out of graphs by torch.compiler.disable"
        )


def _uses(gm: fx.GraphModule, inputs: Sequence[Any], weights: Sequence[int]) -> dict[int, list[Use]]:
    """Runs `passes.attach.usage` on sizes as they are: no guard may come from it."""
    if not weights:
        return {}
    nodes = gm.graph.find_nodes(op="placeholder")
    known = [_known_number(node, x) for node, x in zip(nodes, inputs, strict=True)]
    # The length of ragged rows is a symbol, whatever is asked for.
    env = ShapeEnv() if any(isinstance(x, Tensor) and x.is_nested for x in known) else None
    with private.FakeTensorMode(allow_non_fake_inputs=True, shape_env=env) as mode:
        return weight_uses(gm, [_concrete(x, mode) for x in known], weights)


def _known_number(node: fx.Node, value: Any) -> Any:
    """The number in a tensor that is only asked for it, which is how Dynamo passes a float that may change."""
    asked = isinstance(value, Tensor) and not isinstance(value, private.FakeTensor)
    return value.item() if asked and node.users and all(user.target == "item" for user in node.users) else value


def _concrete(value: Any, mode: private.FakeTensorMode) -> Any:
    """The value with sizes as Dynamo saw them: asking a symbol for its number would make it that number."""
    if not isinstance(value, Tensor):
        return private.hint_of(value)
    if not isinstance(value, private.FakeTensor):
        return mode.from_tensor(value, static_shapes=True)
    sizes = [private.hint_of(size) for size in value.shape]
    made = torch.empty(sizes, dtype=value.dtype, device=value.device)
    return torch.nn.Parameter(made) if isinstance(value, torch.nn.Parameter) else made
