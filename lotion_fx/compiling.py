"""Hands graphs to the inner compilers: `eager`, `aot_eager` and Inductor, with our passes on the joint graph."""

from __future__ import annotations

import operator
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lotion_fx import kernels, numerics, passes, private, private_threads
from lotion_fx.numerics.formats import registered
from lotion_fx.numerics.noise import registered_noises
from lotion_fx.passes.attach.attach import Plan, attach, smooth, variance
from lotion_fx.passes.lower import lower
from lotion_fx.passes.pipeline import JointState, run
from lotion_fx.passes.registered import registered_contractions

compiles: Counter[str] = Counter()
"""How many graphs each inner compiler was given, for tests and for the curious."""


def source_files() -> tuple[str, ...]:
    """All files that compiled code is made from. Folders, not a list: a file that no list names would leave compiled
    code of before in the caches."""
    folders = [Path(package.__path__[0]) for package in (numerics, passes, kernels)]
    found = (path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".json"))
    return tuple(sorted(map(str, found)))


_SOURCES = source_files()


class JointPasses(private.CustomGraphPass):
    """`passes.JOINT` as Inductor runs them. Their configuration is in the graph; the uuid hashes code and ops."""

    def __call__(self, graph: fx.Graph) -> None:
        rewrite_joint(graph)

    def uuid(self) -> Any:
        return private.get_hash_for_files(_SOURCES, extra=f"lotion_fx.joint {registered_contractions()}")


def rewrite_joint(graph: fx.Graph) -> JointState:
    """Runs `passes.JOINT` on a joint graph, in place."""
    given = (node.meta.get("val") for node in graph.find_nodes(op="placeholder"))
    archs = (lower.arch_of(x.device) for x in given if isinstance(x, Tensor))
    return run(passes.JOINT, JointState(graph, next((arch for arch in archs if arch is not None), None)))


def _partition(joint: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The partition function of the `aot_eager` inner compiler, which has no passes of its own."""
    rewrite_joint(joint.graph)
    joint.recompile()
    return private.min_cut_rematerialization_partition(joint, inputs, **kwargs)


def _as_it_is(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The compiler of the `aot_eager` inner compiler: none.

    A kernel may lay its result out in another way than its fake one said, and then a view of the trace is none.
    Inductor makes reshapes of all views too.
    """
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    gm.recompile()
    run_as_it_is: Callable[..., Any] = private.nop(gm, inputs)
    return run_as_it_is


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], inner: str, mode: str | None, options: Mapping[str, Any]
) -> Callable[..., Any]:
    """Compiles a graph of torch functions.

    Args:
        gm, inputs: the graph and its example inputs, fake where Dynamo's are.
        inner: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        mode, options: torch.compile's own, for Inductor.
    """
    compiles[inner] += 1
    if inner == "eager":
        return gm.forward
    if inner == "aot_eager":
        return private.aot_autograd(fw_compiler=_as_it_is, partition_fn=_partition)(gm, inputs)
    compiled: Any = private.compile_fx(gm, inputs, config_patches=inductor_options(mode, options))
    return compiled


def inductor_options(mode: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    options = {**(private.list_mode_options(mode) if mode else {}), **given}
    theirs = options.get("joint_custom_pre_pass") or ()
    theirs = theirs if isinstance(theirs, (list, tuple)) else (theirs,)
    options["joint_custom_pre_pass"] = private.InTurn([JointPasses(), *theirs]) if theirs else JointPasses()
    options.setdefault(private.EXACT_DIVISION, True)
    options["unsafe_marked_cacheable_functions"] = cacheable()
    return options


def cacheable() -> dict[str, str]:
    """Our nodes as cacheable as their sources; without this AOTAutograd's cache steps aside for the whole graph.

    A graph names formats and laws, and holds kernels as ops: what these stand for is part of the caches' key this way.
    """
    named = repr((registered(), registered_noises(), os.environ.get("LOTION_FX_AUTOTUNE")))
    source = private.get_hash_for_files(_SOURCES, extra=named).hex()
    nodes = {f"{node.__module__}.{node.__name__}": source for node in (smooth, variance)}
    return {**private.cacheable_functions(), **nodes}


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
    mode = private.FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(x, static_shapes=True) for x in args]
    with private_threads.compiling(), torch.no_grad():
        with mode:
            gm = make_fx(function)(*fakes)
        compiles["in place"] += 1
        with private.tracing(private.TracingContext(mode)):
            options = {private.EXACT_DIVISION: True, "unsafe_marked_cacheable_functions": cacheable()}
            compiled: Any = private.compile_fx(gm, fakes, config_patches=options)
    return compiled


def fake_probe(weight: Any, plan: Plan) -> Tensor:
    """A probe to compile with, like one of this (fake) weight under this plan."""
    assert plan.layout is not None
    zero = torch.zeros((), dtype=torch.float32, device=weight.device)
    return _like(weight, zero.expand(plan.layout.size).requires_grad_())


def fake_gain(weight: Any) -> Tensor:
    """The gain of a moment stream, likewise."""
    return _like(weight, torch.ones((), dtype=torch.float32, device=weight.device))


def _like(weight: Any, tensor: Tensor) -> Tensor:
    if not isinstance(weight, private.FakeTensor):
        return tensor
    return weight.fake_mode.from_tensor(tensor, static_shapes=True)


# ------------------------------------------------------------------------------------------------------ without a model


def joint_vectors(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    plans: Mapping[int, Plan],
    losses: Sequence[Callable[[Sequence[Tensor]], Tensor]],
    known: dict[Any, Callable[..., Any]] | None = None,
) -> dict[int, tuple[Tensor, Tensor]]:
    """Each planned weight's probe vector and gradient, averaged over losses that are made of one forward pass.

    Args:
        gm: an ATen graph with a list of outputs.
        inputs: real ones.
        plans: by placeholder index, each with a probe layout.
        losses: each makes a scalar of the outputs.
        known: calls with the same plans, for graphs that are equal to one of before; this one's is added.

    Returns:
        By placeholder index; without the weights that no loss depends on.
    """
    lifted, constants = _lifted(gm)
    attached, probed = attach(lifted, plans)
    leaves = [x.detach().requires_grad_() if i in plans else x for i, x in enumerate([*inputs, *constants])]
    wanted = [*(fake_probe(leaves[i], plans[i]) for i in probed), *(leaves[i] for i in probed)]
    calls = {} if known is None else known
    key = gm.code, tuple((x.shape, x.dtype, x.device) for x in leaves)
    if key not in calls:
        calls[key] = private.aot_function(attached, private.nop, partition_fn=_partition)
    sums: list[Tensor | None] = [None] * len(wanted)
    with torch.enable_grad():
        outputs = calls[key](*leaves, *wanted[: len(probed)])
        for loss in losses:
            found = torch.autograd.grad(loss(outputs), wanted, retain_graph=True, allow_unused=True)
            sums = [a if b is None else b if a is None else a + b for a, b in zip(sums, found, strict=True)]
    means = [None if total is None else total / len(losses) for total in sums]
    pairs = zip(probed, means[: len(probed)], means[len(probed) :], strict=True)
    return {i: (vector, grad) for i, vector, grad in pairs if vector is not None and grad is not None}


def _lifted(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of a graph whose constants are its last inputs, and their values."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(gm.graph, copied))
    values = []
    last = graph.find_nodes(op="placeholder")[-1]
    for node in graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(str(node.target))(gm)
        if isinstance(value, fx.GraphModule):  # a branch of `torch.cond`
            continue
        values.append(value)
        with graph.inserting_after(last):
            last = graph.placeholder(f"constant_{len(values)}")
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    return fx.GraphModule(gm, graph), values
