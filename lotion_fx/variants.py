"""The compiler backend.

Dynamo calls `Backend` with a forward graph. The graph is compiled once per *plan*, the tuple of what each of its
weights needs: training or evaluation, finishing, with or without a probe. Which plan holds is decided at every call by
looking at the weights that come in: one compiled graph serves many modules, and nothing else tells them apart.
"""

from __future__ import annotations

import operator
import os
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lotion_fx import kernels, numerics, passes
from lotion_fx.numerics.formats import registered
from lotion_fx.numerics.noise import registered_noises
from lotion_fx.passes.attach.attach import Plan, attach, insert_variances, smooth, variance
from lotion_fx.passes.attach.usage import Use, weight_uses
from lotion_fx.passes.curvature.resolve import resolve_curvature
from lotion_fx.passes.lower.lower import arch_of, lower, lower_products
from lotion_fx.passes.moments.certificate import Certificate
from lotion_fx.passes.moments.stream import Streamed, stream
from lotion_fx.private import (
    EXACT_DIVISION,
    CustomGraphPass,
    FakeTensor,
    FakeTensorMode,
    HigherOrderOperator,
    TracingContext,
    active_data_parallel_group,
    after_backward,
    aot_autograd,
    aot_function,
    cacheable_functions,
    compile_fx,
    complete_sources,
    copy_source,
    current_backward,
    current_context,
    fake_input,
    fake_mode_of,
    frame_names,
    get_hash_for_files,
    guard_identity,
    list_mode_options,
    live_tensor,
    min_cut_rematerialization_partition,
    needs_frame,
    nop,
    plain_call,
    source_of,
    trace,
    tracing,
    tree_leaves,
    within,
)
from lotion_fx.state import Weight, registry

INNERS = ("inductor", "aot_eager", "eager")
compiles: Counter[str] = Counter()
"""How many graphs each inner compiler was given, for tests and for the curious."""

# Folders, not files: a new file that no list names would leave compiled code of before in the caches.
_SOURCES = tuple(
    sorted(
        str(path)
        for package in (numerics, passes, kernels)
        for path in Path(package.__path__[0]).rglob("*")
        if path.suffix in (".py", ".json")
    )
)


class CurvaturePass(CustomGraphPass):
    """`passes.curvature` as Inductor runs it. Its configuration is in the graph itself, so the uuid hashes the code."""

    def __call__(self, graph: fx.Graph) -> None:
        _resolve(graph)

    def uuid(self) -> Any:
        return get_hash_for_files(_SOURCES, extra="lotion_fx.curvature")


def _resolve(joint: fx.Graph) -> None:
    """Our passes on a joint graph: the curvature, and what the device of the graph does better in one kernel."""
    resolve_curvature(joint)
    given = (node.meta.get("val") for node in joint.find_nodes(op="placeholder"))
    archs = (arch_of(x.device) for x in given if isinstance(x, Tensor))
    arch = next((arch for arch in archs if arch is not None), None)
    if arch is not None:
        lower_products(joint, arch)


def _partition(joint: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The partition function of the `aot_eager` inner compiler, which has no passes of its own."""
    _resolve(joint.graph)
    joint.recompile()
    return min_cut_rematerialization_partition(joint, inputs, **kwargs)


@dataclass(frozen=True)
class Backend:
    """What `torch.compile(backend=...)` is given. Equal backends share compiled code across modules.

    Args:
        inner: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        mode, options: torch.compile's own, for Inductor; options as sorted pairs.
        adopt: called with (root, name, owner, attribute, parameter) for each parameter that no `transform` registered.
    """

    inner: str = "inductor"
    mode: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    adopt: Callable[[torch.nn.Module, str, torch.nn.Module, str, Tensor], None] | None = None

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        return Variants(self, gm, example_inputs)

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Hands a graph of torch functions to the inner compiler."""
        compiles[self.inner] += 1
        if self.inner == "eager":
            return gm.forward
        if self.inner == "aot_eager":
            return aot_autograd(fw_compiler=nop, partition_fn=_partition)(gm, inputs)
        compiled: Any = compile_fx(gm, inputs, config_patches=self._inductor_options())
        return compiled

    def _inductor_options(self) -> dict[str, Any]:
        options = dict(list_mode_options(self.mode)) if self.mode else {}
        options.update(self.options)
        theirs = options.get("joint_custom_pre_pass") or ()
        theirs = theirs if isinstance(theirs, (list, tuple)) else (theirs,)
        options["joint_custom_pre_pass"] = [CurvaturePass(), *theirs] if theirs else CurvaturePass()
        options.setdefault(EXACT_DIVISION, True)
        options["unsafe_marked_cacheable_functions"] = _cacheable()
        return options


def _cacheable() -> dict[str, str]:
    """Our nodes as cacheable as their sources; without this AOTAutograd's cache steps aside for the whole graph.

    A graph names formats and laws, and holds kernels as ops: what these stand for is part of the caches' key this way.
    """
    named = repr((registered(), registered_noises(), os.environ.get("LOTION_FX_AUTOTUNE")))
    source = get_hash_for_files(_SOURCES, extra=named).hex()
    nodes = {f"{node.__module__}.{node.__name__}": source for node in (smooth, variance)}
    return {**cacheable_functions(), **nodes}


class CompiledCalls:
    """Makes what `nn.Module.compile` would call, for the modules of one model.

    A bare `nn.Sequential` needs a frame of our own, for Dynamo skips forwards of torch's own; so does a module that
    owns weights, whose hooks would run in Python and find them outside of every graph. Blocks of one model share the
    frame's code and what is compiled for it.
    """

    def __init__(self, backend: Backend, **options: Any) -> None:
        self.options = {"backend": backend, **options}
        self.code = with_own_code(_frame(id)).__code__

    def __call__(self, module: torch.nn.Module) -> Callable[..., Any]:
        call = plain_call(module)
        if needs_frame(module):
            call = _frame(call)
            call.__code__ = self.code  # type: ignore[attr-defined]
        return torch.compile(call, **self.options)


def with_own_code(function: Any) -> Any:
    """The function, to be compiled alone: Dynamo soon gives up on code that many models share."""
    function.__code__ = function.__code__.replace()
    return function


def _frame(call: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return forward


def _lifted(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of a graph whose constants are its last inputs, and their values."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(gm.graph, copied))
    values = []
    last = graph.find_nodes(op="placeholder")[-1]
    for node in graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(str(node.target))(gm)
        values.append(value)
        with graph.inserting_after(last):
            last = graph.placeholder(f"constant_{len(values)}")
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    return fx.GraphModule(gm, graph), values


def joint_vectors(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    plans: Mapping[int, Plan],
    losses: Sequence[Callable[[Sequence[Tensor]], Tensor]],
) -> dict[int, tuple[Tensor, Tensor]]:
    """Each planned weight's probe vector and gradient, averaged over losses that are made of one forward pass.

    Args:
        gm: an ATen graph with a list of outputs.
        inputs: real ones.
        plans: by placeholder index, each with a probe layout.
        losses: each makes a scalar of the outputs.

    Returns:
        By placeholder index; without the weights that no loss depends on.
    """
    lifted, constants = _lifted(gm)
    attached, probed = attach(lifted, plans)
    leaves = [x.detach().requires_grad_() if i in plans else x for i, x in enumerate([*inputs, *constants])]
    wanted = [*(_fake_probe(leaves[i], plans[i]) for i in probed), *(leaves[i] for i in probed)]
    run = aot_function(attached, nop, partition_fn=_partition)
    sums: list[Tensor | None] = [None] * len(wanted)
    with torch.enable_grad():
        outputs = run(*leaves, *wanted[: len(probed)])
        for loss in losses:
            found = torch.autograd.grad(loss(outputs), wanted, retain_graph=True, allow_unused=True)
            sums = [a if b is None else b if a is None else a + b for a, b in zip(sums, found, strict=True)]
    means = [None if total is None else total / len(losses) for total in sums]
    pairs = zip(probed, means[: len(probed)], means[len(probed) :], strict=True)
    return {i: (vector, grad) for i, vector, grad in pairs if vector is not None and grad is not None}


class Variants:
    """One Dynamo graph, compiled once for each plan that its weights were seen to need."""

    def __init__(self, backend: Backend, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.backend, self.gm = backend, gm
        self.context = current_context()
        nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
        # Kept, for every variant must reuse their symbols.
        self.inputs = [fake_input(x, self.context) for x in example_inputs]
        live = [live_tensor(node, x) for node, x in zip(nodes, example_inputs, strict=True)]
        if backend.adopt:
            for node, x in zip(nodes, live, strict=True):
                _adopt(backend.adopt, node, x)
        self.candidates = [i for i, x in enumerate(live) if registry[x] is not None]
        self.uses = _uses(gm, example_inputs, self.candidates)
        self.taught: weakref.WeakKeyDictionary[Weight, set[int]] = weakref.WeakKeyDictionary()
        self.compiled: dict[tuple[Any, ...], _Compiled] = {}
        self._variant(self._plans(live)[0])

    def __call__(self, *args: Any) -> Any:
        if any(isinstance(x, FakeTensor) for x in args):
            return self._rehearse(args)
        plans, weights = self._plans(args)
        compiled = self._variant(plans)
        for index, certificate in compiled.stream.items():
            weights[index].certificate, weights[index].in_loss = certificate, True
        gains = [weights[index].gain_on(args[index].device) for index in compiled.stream]
        if not compiled.probed:
            return compiled.run(*args, *gains)
        smoothing = weights[compiled.probed[0]].smoothing
        smoothing.told |= self.backend.inner != "eager"
        smoothing.group = active_data_parallel_group()
        if current_backward() == -1:  # what checkpointing recomputes is no second use
            for index in compiled.probed:
                weights[index].bind()
        return compiled.run(*args, *gains, *(_probe(weights[i], args[i]) for i in compiled.probed))

    def _rehearse(self, args: Sequence[Any]) -> Any:
        """DDP's graph splitter runs each compiled part once on fakes, which are nobody's weights."""
        plans, compiled = next(iter(self.compiled.items()))
        gains = [args[i].new_ones((), dtype=torch.float32) for i in compiled.stream]
        return compiled.run(*args, *gains, *(_fake_probe(args[i], dict(plans)[i]) for i in compiled.probed))

    def _plans(self, args: Sequence[Any]) -> tuple[dict[int, Plan], dict[int, Weight]]:
        """What each of this call's weights needs, and which weights they are, by argument."""
        with_grad = torch.is_grad_enabled()
        plans: dict[int, Plan] = {}
        weights: dict[int, Weight] = {}
        for index in self.candidates:
            weight = registry[args[index]]
            if weight is None:
                continue
            if index not in self.taught.setdefault(weight, set()):
                weight.learn(self.uses[index])  # one that shares another's graph is used as the other is
                self.taught[weight].add(index)
            plan = weight.plan(with_grad, args[index].requires_grad)
            if plan is not None:
                plans[index], weights[index] = plan, weight
        return plans, weights

    def _variant(self, plans: Mapping[int, Plan]) -> _Compiled:
        key = tuple(plans.items())
        if key not in self.compiled:
            with within(self.context):
                self.compiled[key] = self._compile(plans)
        return self.compiled[key]

    def _compile(self, plans: Mapping[int, Plan]) -> _Compiled:
        gm, streamed = self.gm, None
        if self.backend.inner != "eager" and any(plan.moments != "off" for plan in plans.values()):
            streamed = self._stream(plans)
        if streamed is not None:
            gm = streamed.gm
            plans = {i: replace(plan, layout=None) if i in streamed.variances else plan for i, plan in plans.items()}
        gm, probed = attach(gm, plans) if plans else (gm, [])
        variances = streamed.variances if streamed else {}
        if variances:
            insert_variances(gm, variances, plans)
        if plans:
            arch = arch_of(self.inputs[next(iter(plans))].device)
            if arch is not None:
                lower(gm, arch)
        complete_sources(gm)
        gains = [_fake_gain(self.inputs[i]) for i in variances]
        inputs = [*self.inputs, *gains, *(_fake_probe(self.inputs[i], plans[i]) for i in probed)]
        certificates = streamed.certificates if streamed else {}
        return _Compiled(self.backend.compile(gm, inputs), probed, certificates)

    def _stream(self, plans: Mapping[int, Plan]) -> Streamed | None:
        """The graph with a variance stream from its weights to the loss.

        None where it returns no loss, or has a region that must stay whole: what is checkpointed would be no more.
        """
        losses = _loss_outputs(self.gm)
        nested = any(isinstance(node.target, HigherOrderOperator) for node in self.gm.graph.nodes)
        if not losses or nested:
            return None
        weights = [i for i, plan in plans.items() if plan.moments != "off"]
        diagonal = all(plans[i].moments == "diagonal" for i in weights)
        with torch.no_grad(), fake_mode_of(self.inputs):
            inputs = [x.detach() if isinstance(x, Tensor) else x for x in self.inputs]
            streamed = stream(trace(self.gm, inputs), inputs, weights, losses, diagonal, trace)
        for old, new in zip(*(gm.graph.find_nodes(op="placeholder") for gm in (self.gm, streamed.gm)), strict=False):
            copy_source(old, new)
        return streamed


@dataclass(frozen=True)
class _Compiled:
    """One variant of a graph.

    Args:
        run: takes the graph's inputs, then a gain for each weight in the moment stream, then the probes.
        probed: the inputs that are weights with a probe, in the order of these.
        stream: the weights in the moment stream, in the order of the gains, each with its certificate.
    """

    run: Callable[..., Any]
    probed: list[int]
    stream: Mapping[int, Certificate]


def _loss_outputs(gm: fx.GraphModule) -> list[int]:
    """Which of a graph's outputs may be a loss: the floating scalars that require a gradient."""
    outputs = tree_leaves(gm.graph.output_node().args[0])
    values = [node.meta.get("example_value") if isinstance(node, fx.Node) else None for node in outputs]
    return [
        index
        for index, value in enumerate(values)
        if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point() and value.requires_grad
    ]


def _fake_gain(weight: Any) -> Tensor:
    gain = torch.ones((), device=weight.device)
    return weight.fake_mode.from_tensor(gain, static_shapes=True) if isinstance(weight, FakeTensor) else gain


def _adopt(adopt: Callable[..., None], node: fx.Node, value: Any) -> None:
    """Registers a parameter that came in through ``torch.compile(model, backend="lotion_fx")``."""
    source, scope = source_of(node), frame_names()
    if not isinstance(value, torch.nn.Parameter) or source is None or scope is None:
        return
    known = registry[value]
    if known is not None and not known.smoothing.adopted:
        return
    owner, _, attribute = source.name.rpartition("._parameters[")
    if not owner:
        return
    path = owner.replace("._modules['", ".").replace("']", "")
    prefix = path.partition(".")[2]
    attribute = attribute.strip("'\"]")
    names = {"L": scope[0], "G": scope[1]}
    # Another model of the same class must not run this one's code unseen: it would never come here.
    guard_identity(source)
    if known is not None:
        return
    root, module = eval(owner.partition("._modules")[0], names), eval(owner, names)
    adopt(root, f"{prefix}.{attribute}" if prefix else attribute, module, attribute, value)


def _uses(gm: fx.GraphModule, inputs: Sequence[Any], weights: Sequence[int]) -> dict[int, list[Use]]:
    """Runs `passes.attach.usage` on sizes as they are: no guard may come from it."""
    if not weights:
        return {}
    nodes = gm.graph.find_nodes(op="placeholder")
    known = [_known_number(node, x) for node, x in zip(nodes, inputs, strict=True)]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return weight_uses(gm, [_concrete(x, mode) for x in known], weights)


def _known_number(node: fx.Node, value: Any) -> Any:
    """The number in a tensor that is only asked for it, which is how Dynamo passes a float that may change."""
    asked = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
    return value.item() if asked and node.users and all(user.target == "item" for user in node.users) else value


def _concrete(value: Any, mode: FakeTensorMode) -> Any:
    if not isinstance(value, FakeTensor):
        return mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value
    sizes = [int(size) if isinstance(size, int) else size.node.hint for size in value.shape]
    made = torch.empty(sizes, dtype=value.dtype, device=value.device)
    return torch.nn.Parameter(made) if isinstance(value, torch.nn.Parameter) else made


def _probe(weight: Weight, tensor: Tensor) -> Tensor:
    """The weight's probe for one more forward; what it gathered is dropped where the step it was for never came."""
    size, master = weight.layout.size, weight.master() if weight.master else None
    if weight.probe is None or weight.probe.numel() != size or weight.probe.device != tensor.device:
        # One zero, however long the vector: only its gradient is ever stored.
        weight.probe = torch.zeros((), device=tensor.device).expand(size).requires_grad_()
        known = weakref.ref(weight)  # a hook is kept alive from C++, where no garbage collector looks
        weight.probe.register_post_accumulate_grad_hook(lambda _: _fired(known()))
    # Between micro-batches FSDP2 may hold the gradient at the unsharded parameter.
    if master is not None and master.grad is None and tensor.grad is None and weight.probe.grad is not None:
        weight.drop_probe()
        weight.smoothing.terms = None
    return weight.probe


def _fired(weight: Weight | None) -> None:
    """Notes that a weight's curvature arrived. The first one of a backward pass is nearest the loss, and tells T."""
    if weight is None or weight.probe is None or weight.probe.grad is None:
        return
    smoothing, backward = weight.smoothing, current_backward()
    if smoothing.backward == backward:
        return
    smoothing.backward = backward
    now = weight.probe.grad[-1].clone()
    new = now if weight.terms is None else now - weight.terms
    weight.terms = now
    smoothing.add_terms(new / max(1, weight.bound))
    after_backward(smoothing.backward_is_over)


def _fake_probe(weight: Any, plan: Plan) -> Tensor:
    assert plan.layout is not None
    mode = weight.fake_mode if isinstance(weight, FakeTensor) else None
    probe = torch.zeros((), device=weight.device).expand(plan.layout.size).requires_grad_()
    return mode.from_tensor(probe, static_shapes=True) if mode else probe


def compile_function(function: Callable[..., Any], args: Sequence[Any], inner: str) -> Callable[..., Any]:
    """Compiles a function of tensors that updates some of them in place, without guards.

    Args:
        function: takes ``args`` as they are, tensors in one flat sequence.
        args: example tensors; shapes, dtypes and devices are fixed by them.
        inner: ``"inductor"``; anything else runs the function as it is.
    """
    if inner != "inductor":
        return function
    # Without a shape env, though no shape is symbolic, the compile caches step aside.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(x, static_shapes=True) for x in args]
    with torch.no_grad(), mode:
        gm = make_fx(function)(*fakes)
    compiles["update"] += 1
    with torch.no_grad(), tracing(TracingContext(mode)):
        options = {EXACT_DIVISION: True, "unsafe_marked_cacheable_functions": _cacheable()}
        compiled: Any = compile_fx(gm, fakes, config_patches=options)
    return compiled
