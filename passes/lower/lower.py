"""Lower: what quantizes and smooths a weight in a graph for a CUDA device becomes a kernel, where the kernel wins.

On a CPU nothing changes: the nodes trace to ATen, which Inductor vectorizes. On CUDA each node's rounding, and at the
step the term, either becomes `lotion_fx.kernels.smooth` or stays ATen for Inductor's own Triton, whichever a cost model
of two lines expects to take less time:

    time = max(bytes / bandwidth, instructions / issue rate)              per element, of the nearest known target

Bytes and instructions of rounding and of the term are counted, not guessed: `tests/compiled/test_lowering.py` compiles
what Inductor emits for the same work and holds the numbers below to it. Inductor needs a second read of the weight
where a scale for the whole tensor comes before the block scales, or where a block's elements do not lie side by side;
elsewhere it moves the same bytes, and the kernel wins on instructions where the device's memory is fast enough for them
to count.

Graphs stay free of devices: the decision is made when a graph is compiled for one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from lotion_fx.kernels.device import arch_of as arch_of
from lotion_fx.kernels.targets import nearest
from lotion_fx.numerics.formats import Format, resolve
from lotion_fx.passes.attach.attach import RR, STE, STE_SCALE, smooth, variance

if TYPE_CHECKING:
    from lotion_fx.passes.pipeline import ForwardState, JointState

RESULTS = {STE: "rtn", STE_SCALE: "rtn", RR: "rr"}  # what a mode's forward asks of the kernel

MARGIN = 0.95  # a kernel whose expected time is not below this part of Inductor's is no win


@dataclass(frozen=True)
class Cost:
    """What a way of computing something takes for each element of a weight.

    Args:
        bytes: moved from and to memory.
        instructions: of one thread.
    """

    bytes: float
    instructions: float

    def microseconds(self, elements: int, arch: int) -> float:
        """The expected time on the nearest known target."""
        target = nearest(arch)
        by_memory = self.bytes / (target.bandwidth * 1e3)
        by_issue = self.instructions / (target.multiprocessors * target.issue * 32 * target.clock * 1e3)
        return elements * max(by_memory, by_issue)


def lower(gm: fx.GraphModule, arch: int) -> int:
    """Turns nodes of a forward graph to kernels, where these win.

    Args:
        gm: a graph that `passes.attach.attach` made, with ``example_value`` on weights; changed in place.
        arch: compute capability of the device that it will run on, 80 for ``sm_80``.

    Returns:
        How many nodes take a kernel.
    """
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=smooth):
        weight, _, mode, fmt, axis = node.args[:5]
        if mode in RESULTS and prefers_kernel(RESULTS[mode], _value(weight), resolve(fmt), axis, arch):
            node.kwargs = {**node.kwargs, "kernel": True}
            count += 1
    for node in gm.graph.find_nodes(op="call_function", target=variance):
        weight, fmt, axis, _ = node.args
        if prefers_kernel("variance", _value(weight), resolve(fmt), axis, arch):
            node.kwargs = {**node.kwargs, "kernel": True}
            count += 1
    if count:
        gm.recompile()
    return count


def lower_nodes(state: ForwardState) -> ForwardState:
    """`lower`, as a pass."""
    if not state.plans or state.arch is None:
        return state
    return replace(state, fired={**state.fired, "lower": lower(state.gm, state.arch)})


def lower_products(state: JointState) -> JointState:
    """Fuses weight gradients with their full curvature in a joint graph, where one kernel beats the library's two."""
    arch = state.arch
    if arch is None:
        return state
    from lotion_fx.passes.lower.linear import match_full_curvature  # needs Triton

    def wanted(g: fx.Node, x: fx.Node) -> bool:
        (positions, outputs), inputs = _value(g).shape, _value(x).shape[1]
        return prefers_fused_products(positions, outputs, inputs, _value(x).dtype, arch)

    return replace(state, fired={**state.fired, "lower products": match_full_curvature(state.graph, wanted)})


def _value(node: fx.Node) -> Tensor:
    meta = node.meta
    return meta["example_value"] if "example_value" in meta else meta["val"]


def prefers_kernel(result: str, weight: Tensor, fmt: Format, axis: int, arch: int) -> bool:
    """Whether the kernel is expected to be faster than what Inductor makes of `lotion_fx.rounding`.

    Args:
        result: ``"rtn"``, ``"rr"``, ``"variance"`` or ``"term"``.
        weight: its shape, strides and dtype count.
        fmt, axis: the quantizer.
        arch: compute capability.
    """
    from lotion_fx.kernels.view import supports

    if not supports(weight, fmt) or not weight.is_contiguous():
        return False
    ours, theirs = (cost(result, weight, fmt, axis) for cost in (kernel_cost, inductor_cost))
    elements = weight.numel()
    return ours.microseconds(elements, arch) < MARGIN * theirs.microseconds(elements, arch)


# The share of the tensor rate that `lotion-fx kernels` predicts of `kernels.curvature` on 8192 x 4096 x 4096, and that
# a library's product is taken to reach.
_FUSED = {80: 0.70, 86: 0.80, 89: 0.76, 90: 0.65, 100: 0.37, 103: 0.37, 120: 0.79}
_LIBRARY = 0.80


def prefers_fused_products(positions: int, outputs: int, inputs: int, dtype: torch.dtype, arch: int) -> bool:
    """Whether a gradient and its full curvature in one kernel beat two products and the squares between them.

    Args:
        positions, outputs, inputs: N, O and I of ``g`` [N, O] and ``x`` [N, I].
        dtype: of both; bfloat16 and float16 have tensor cores everywhere.
        arch: compute capability.
    """
    target = nearest(arch)
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    flops = 4 * positions * outputs * inputs
    squares = 2 * dtype.itemsize * positions * (outputs + inputs)  # read once more, and written
    product = flops / (target.tensor["bf16"] * 1e6)
    theirs = product / _LIBRARY + squares / (target.bandwidth * 1e3)
    return product / _FUSED[target.arch] < MARGIN * theirs


# Instructions of a thread for each element, in the machine code of bfloat16 int4 weights for sm_100: of the kernel, and
# of Inductor's at the tile that it has least of (26 to 40 for rounding, by the versions of torch and Triton). A random
# number costs Inductor a whole Philox call an element, and the kernel a quarter.
_KERNEL = {"rtn": 22, "rr": 45, "variance": 30, "term": 62}
_INDUCTOR = {"rtn": 32, "rr": 120, "variance": 44, "term": 87}


def _least(result: str, weight: Tensor) -> float:
    """Bytes of an element read once and written once; the term reads and writes a float32 gradient."""
    size = weight.dtype.itemsize
    return {"term": size + 8, "variance": size + 4}.get(result, 2 * size)


def kernel_cost(result: str, weight: Tensor, fmt: Format, axis: int) -> Cost:
    """Of `lotion_fx.kernels.smooth`: a pass, one for the absmax of a tensor or of long channels, one for their sums."""
    from lotion_fx.kernels.view import View

    whole = View.of(weight.shape, fmt, axis).whole
    passes = fmt.law.two_level + (0 if whole else 2 if result == "term" else 1)
    return Cost(_least(result, weight) + passes * weight.dtype.itemsize, _KERNEL[result] + passes)


def inductor_cost(result: str, weight: Tensor, fmt: Format, axis: int) -> Cost:
    """Of Inductor's own Triton for the same: a pass more for each reason not to fuse, with its scales in between."""
    apart = axis % weight.dim() != weight.dim() - 1
    scales = 4 / fmt.block if isinstance(fmt.block, int) else 0.0
    passes = fmt.law.two_level + (apart or fmt.block == "tensor")
    written = (5 if fmt.law.two_level else 2 * apart) * scales
    return Cost(_least(result, weight) + passes * weight.dtype.itemsize + written, _INDUCTOR[result] + 4 * passes)
