"""Graph -> graph: the passes, their order, and what each may assume.

A *forward* pass takes Dynamo's graph of torch functions. It is pure: Dynamo reads its own graph again afterwards, so a
pass copies it, or changes a copy that an earlier one made. A *joint* pass takes AOTAutograd's graph of forward and
backward, in ATen ops, and rewrites it in place, as Inductor runs it. Every pass

* keeps ``node.meta["val"]`` (in forward graphs ``example_value``) true on every node that it makes,
* mutates no input, adds no aliasing, and draws nothing from a device or a clock: equal graphs give equal graphs,
* returns a state that says what it did, so that a test can say how often it fired.

Compiled code is cached under a hash of this whole folder, of `kernels` and of `lotion_fx.numerics`.
`lotion_fx.explain(model)` shows each graph before and after each pass, and so does ``LOTION_FX_LOGS=passes``.
"""

from lotion_fx.passes.attach.attach import attach_nodes, insert_variances
from lotion_fx.passes.curvature.resolve import resolve_state
from lotion_fx.passes.lower.fusion import fuse_vectors
from lotion_fx.passes.lower.lower import lower_nodes, lower_products
from lotion_fx.passes.moments.stream import stream_losses
from lotion_fx.passes.pipeline import ForwardState, JointState, Pass

FORWARD: tuple[Pass[ForwardState], ...] = (
    Pass(
        "stream",
        stream_losses,
        "the graph is as Dynamo made it; plans say which weights may take a moment stream",
        "where it holds a loss: in ATen ops, the loss is the expected one, variances are inputs after all others",
    ),
    Pass(
        "attach",
        attach_nodes,
        "placeholders are the graph's inputs in order; plans are known for each weight",
        "a `smooth` node after each planned weight, all uses redirected to it; probes are inputs after all others",
    ),
    Pass(
        "insert variances",
        insert_variances,
        "the graph is a copy; variances are inputs",
        "variances are `variance` nodes of the weights, and those inputs are their gains",
    ),
    Pass(
        "lower",
        lower_nodes,
        "`smooth` and `variance` nodes are in place; the device is known",
        "on a GPU: nodes that a kernel of ours runs faster say so",
    ),
)
"""In order, over each graph that Dynamo hands over, once for each tuple of plans that its weights are seen to need."""

JOINT: tuple[Pass[JointState], ...] = (
    Pass(
        "resolve",
        resolve_state,
        "each probe's gradient is a `lotion_fx::curvature(grad, weight)` node",
        "each is a vector of payload and header instead, made like the weight's gradient, on squares",
    ),
    Pass(
        "fuse vectors",
        fuse_vectors,
        "vectors are joined from sums of squares, as `resolve` emits them",
        "on a GPU: the sums are in forms that ride on kernels which read the same tensors",
    ),
    Pass(
        "lower products",
        lower_products,
        "full curvatures are products of the squares of a gradient's operands, as `resolve` emits them",
        "on a GPU: a gradient and its full curvature are one call where one kernel is faster",
    ),
)
"""In order, over each joint graph, before Inductor's own passes."""
