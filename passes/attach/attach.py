"""Attach: one quantize-and-smooth node after each selected weight of a forward graph, and every use redirected.

The node is attached at the weight's placeholder, the source, so no use can be missed whatever the op, and a
checkpointed subgraph needs no visit: the weight enters it as an argument.

    forward    latent: w     ste, ste_scale: Q(w)     rr: a sample of the noise     mean: its mean
    backward   the gradient passes to w (ste_scale adds the block scale's part; mean has its own), and the probe, where
               there is one, receives `lotion_fx::curvature(grad)`, which `passes.curvature` resolves in the joint graph
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from lotion_fx.numerics.quantizer import Quantizer
from lotion_fx.passes.attach import sharded
from lotion_fx.passes.attach.probe import Layout
from lotion_fx.private import copy_source

if TYPE_CHECKING:
    from lotion_fx.passes.pipeline import ForwardState

LATENT, STE, STE_SCALE, RR, MEAN = "latent", "ste", "ste_scale", "rr", "mean"


@dataclass(frozen=True)
class Plan:
    """What one weight's node does in one graph. A weight keeps its plans, so that comparing them is cheap.

    Args:
        mode: the forward, ``"latent"``, ``"ste"``, ``"ste_scale"``, ``"rr"`` or ``"mean"``.
        quantizer: the weight's.
        layout: its probe's layout; None where no curvature is asked for.
        moments: whether its noise goes through a moment stream instead, where the graph holds the loss: ``"closed"``
            (unless a covariance would be dropped), ``"diagonal"`` or ``"off"``.
    """

    mode: str
    quantizer: Quantizer
    layout: Layout | None
    moments: str = "off"

    @property
    def is_identity(self) -> bool:
        return self.mode == LATENT and self.layout is None


def attach(gm: fx.GraphModule, plans: Mapping[int, Plan]) -> tuple[fx.GraphModule, list[int]]:
    """Copies a forward graph and puts a `smooth` node after each planned weight.

    Args:
        gm: Dynamo's graph, left as it is (Dynamo reads it again afterwards).
        plans: for each placeholder index that is a weight, what to do there.

    Returns:
        The new module, and the weights' indices in the order in which their probes follow the graph's own inputs.
    """
    graph = _copy(gm)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    last, probes = placeholders[-1] if placeholders else None, []
    nodes: list[tuple[fx.Node, fx.Node | None, Plan]] = []
    for index, plan in plans.items():
        if plan.is_identity:
            continue
        probe = None
        if plan.layout is not None:
            with graph.inserting_after(last):
                probe = last = graph.placeholder(f"lotion_probe_{index}")
            probes.append(index)
        nodes.append((placeholders[index], probe, plan))
    for weight, probe, plan in reversed(nodes):
        with graph.inserting_after(last):
            direct = plan.layout is None or plan.layout.direct
            node = graph.call_function(smooth, (weight, probe, *_constants(plan)), {} if direct else {"direct": False})
        if "example_value" in weight.meta:
            node.meta["example_value"] = weight.meta["example_value"]
        for user in [user for user in weight.users if user is not node]:
            user.replace_input_with(weight, node)
    graph.lint()
    return fx.GraphModule(gm, graph), probes


def attach_nodes(state: ForwardState) -> ForwardState:
    """`attach`, as a pass."""
    gm, probed = attach(state.gm, state.plans)
    return replace(state, gm=gm, probed=tuple(probed))


def insert_variances(state: ForwardState) -> ForwardState:
    """Turns the variance inputs of a streamed graph into gains: 0-d factors of variances that the graph then makes."""
    gm, placeholders = state.gm, state.gm.graph.find_nodes(op="placeholder")
    last = placeholders[-1] if placeholders else None
    for weight, gain in state.variances.items():
        node, plan = placeholders[gain], state.plans[weight]
        with gm.graph.inserting_after(last):
            made = gm.graph.call_function(variance, (placeholders[weight], *plan.quantizer.constants))
        with gm.graph.inserting_after(made):
            scaled = gm.graph.call_function(torch.mul, (made, node))
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user, scaled=scaled: user is not scaled)
    if state.variances:
        gm.graph.lint()
        gm.recompile()
    return state


def _copy(gm: fx.GraphModule) -> fx.Graph:
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(gm.graph, copied))
    for old, new in copied.items():
        new.meta = dict(old.meta)
        copy_source(old, new)
    return graph


def _constants(plan: Plan) -> tuple[str, str, int, str, int, int, str]:
    """The plan as plain values, which graphs and compile caches can hold."""
    layout, (fmt, axis, noise) = plan.layout or Layout("none", (1,), 1, 1), plan.quantizer.constants
    return plan.mode, fmt, axis, layout.kind, layout.groups, layout.rows, noise


def smooth(
    weight: Tensor,
    probe: Tensor | None,
    mode: str,
    fmt: str,
    axis: int,
    kind: str,
    groups: int,
    rows: int,
    noise: str = "randomized",
    kernel: bool = False,
    direct: bool = True,
) -> Tensor:
    """The quantize-and-smooth node: see the module's docstring, `Plan` and `Layout` for the arguments.

    ``kernel`` is set by `passes.lower`: the forward is `lotion_fx.kernels.smooth` then, instead of ATen.
    """
    return _Smooth.apply(weight, probe, mode, (fmt, axis, noise), (kind, groups, rows, direct), kernel)


class _Smooth(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        probe: Tensor | None,
        mode: str,
        constants: tuple[str, int, str],
        layout: tuple[str, int, int, bool],
        kernel: bool,
    ) -> Tensor:
        ctx.probe = layout if probe is not None else None
        ctx.scale = (mode, constants) if mode in (STE_SCALE, MEAN) else None
        if mode == LATENT:
            out = weight.view_as(weight)
        elif kernel:
            seed = torch.randint(2**62, (), device=weight.device) if mode == RR else None
            (out,) = _kernel(weight, *constants, mode != RR, mode == RR, False, seed)
        else:
            quantizer = Quantizer.of(*constants)
            cut = sharded.is_cut(quantizer, weight)
            whole = sharded.gathered(weight) if cut else weight
            if mode == RR:
                out = quantizer.rr(whole, uniform=sharded.uniform(whole))
            else:
                out = quantizer.mean(whole).to(weight.dtype) if mode == MEAN else quantizer.rtn(whole)
            out = sharded.like(out, weight) if cut else out
        ctx.save_for_backward(weight if ctx.scale else None, out if ctx.probe else None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        weight, out = ctx.saved_tensors
        to_weight, curvature = grad, None
        if ctx.needs_input_grad[1] and ctx.probe:
            curvature = sharded.curvature(grad, out, *ctx.probe)
        if ctx.scale:
            mode, constants = ctx.scale
            quantizer = Quantizer.of(*constants)
            vjp = quantizer.mean_vjp if mode == MEAN else quantizer.rtn_vjp
            if sharded.is_cut(quantizer, weight):
                to_weight = sharded.like(vjp(sharded.gathered(weight), sharded.gathered(grad)).to(grad.dtype), weight)
            else:
                to_weight = vjp(weight, grad).to(grad.dtype)
        return to_weight, curvature, None, None, None, None


def _kernel(*args: Any) -> list[Tensor]:
    """`lotion_fx.kernels.smooth`, imported where a GPU needs it, for Triton is not everywhere."""
    import lotion_fx.kernels.smooth  # noqa: F401  registers the op

    return torch.ops.lotion_fx.smooth(*args)


def variance(weight: Tensor, fmt: str, axis: int, noise: str, kernel: bool = False) -> Tensor:
    """The variance of a weight's random rounding, float32 or float64, differentiable, its scale's part included."""
    return _Variance.apply(weight, (fmt, axis, noise), kernel)


class _Variance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, constants: tuple[str, int, str], kernel: bool) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.constants = constants
        if kernel:
            return _kernel(weight, *constants, False, False, True)[0]
        return Quantizer.of(*constants).variance(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return Quantizer.of(*ctx.constants).variance_vjp(weight, grad).to(weight.dtype), None, None
