"""What an op does to a weight and to a weight's gradient: one row an op, and the only place where that stands.

    forward     in the forward pass, to the weight itself: does the result still hold the weight, and how
    backward    on the way from the weight's gradient back to the contraction that made it: how its squares pass
    through     which of its arguments the gradient comes from, on that way
    dims        where the weight's dimensions go, for the block axis
    contracted  of a contraction: {argument: the dimension of it that is summed over}
    squares     of a contraction that makes gradients: the rule of its squares, see `curvature.contraction`

To teach the passes an op that rearranges or contracts, add its row here. An op without a row ends the walk: its weight
takes the Fisher form, and the report says so.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import fx

from lotion_fx.passes import dims
from lotion_fx.passes.curvature import contraction
from lotion_fx.passes.curvature.contraction import Contraction, Rule
from lotion_fx.passes.dims import Dims

aten, prims = torch.ops.aten, torch.ops.prims


class Forward(Enum):
    """What an op makes of a weight."""

    ALIAS = "the same values"
    CAST = "the same values in another precision"
    RESHAPE = "the same values in another shape"
    PERMUTE = "the same values, dimensions permuted"
    EXPAND = "the same values, repeated"
    PART = "some of the values, or all with others, in places of their own"
    JOIN = "the values beside another tensor's"
    GATHER = "rows chosen by an index"
    SUM = "the values plus another tensor's, elementwise"
    SCALE = "the values times another tensor's, elementwise"
    CONTRACTION = "sums of products with data"


class Backward(Enum):
    """How the squares of a gradient pass through an op that made it."""

    UNSIGNED = "as they are: it changes sign or precision alone"
    PLACEMENT = "by the op itself: it places values"
    REDUCTION = "by the op itself: it adds up positions"
    SUM = "by a sum, of independent parts"
    SCALE = "by the squared factor"


@dataclass(frozen=True)
class Op:
    """One row; see the module's docstring.

    Args:
        packet: the op.
        overloads: which of its overloads, by name.
        adds: of a contraction: whether its first argument is added to the product.
    """

    packet: Any
    overloads: str = "default"
    forward: Forward | None = None
    backward: Backward | None = None
    through: tuple[int, ...] = (0,)
    dims: Callable[..., Dims] | None = None
    contracted: Mapping[int, int] = field(default_factory=dict)
    squares: Rule | None = None
    adds: bool = False

    @property
    def targets(self) -> list[Any]:
        """What a graph's nodes call."""
        if not hasattr(self.packet, "overloads"):
            return [self.packet]
        return [getattr(self.packet, overload) for overload in self.overloads.split()]


_ALIAS: dict[str, Any] = {"forward": Forward.ALIAS, "backward": Backward.UNSIGNED, "dims": dims.same}
_RESHAPE: dict[str, Any] = {"forward": Forward.RESHAPE, "backward": Backward.PLACEMENT, "dims": dims.reshape}
_PERMUTE: dict[str, Any] = {"forward": Forward.PERMUTE, "backward": Backward.PLACEMENT}
_PART: dict[str, Any] = {"forward": Forward.PART}
_PLACED: dict[str, Any] = {"backward": Backward.PLACEMENT}
_REDUCED: dict[str, Any] = {"backward": Backward.REDUCTION}
_GATHER: dict[str, Any] = {"forward": Forward.GATHER}
_JOIN: dict[str, Any] = {"forward": Forward.JOIN}
_SUM: dict[str, Any] = {"forward": Forward.SUM, "backward": Backward.SUM, "through": (0, 1)}
_SCALE: dict[str, Any] = {"forward": Forward.SCALE, "backward": Backward.SCALE}
_CONTRACTION: dict[str, Any] = {"forward": Forward.CONTRACTION}

OPS: tuple[Op, ...] = (
    # the same values
    Op(aten.alias, **_ALIAS),
    Op(aten.detach, **_ALIAS),
    Op(aten.clone, **_ALIAS),
    Op(aten.contiguous, **_ALIAS),
    Op(aten._to_copy, **{**_ALIAS, "forward": Forward.CAST}),
    Op(prims.convert_element_type, **{**_ALIAS, "forward": Forward.CAST, "dims": None}),
    Op(aten.lift_fresh, dims=dims.same),
    Op(aten.view_as, dims=dims.same),
    # in another shape
    Op(aten.view, **_RESHAPE),
    Op(aten.reshape, **_RESHAPE),
    Op(aten._unsafe_view, **_RESHAPE),
    Op(aten._reshape_alias, dims=dims.reshape),
    Op(aten.squeeze, "default dim dims", **_RESHAPE),
    Op(aten.unsqueeze, **{**_RESHAPE, "dims": dims.unsqueeze}),
    Op(aten.t, **_PERMUTE, dims=dims.reverse),
    Op(aten.transpose, "int", **_PERMUTE, dims=dims.transpose),
    Op(aten.permute, **_PERMUTE, dims=dims.permute),
    Op(aten.expand, forward=Forward.EXPAND, **_PLACED, dims=dims.expand),
    # some of them, in places of their own
    Op(aten.select, "int", **_PART, **_PLACED, dims=dims.drop),
    Op(aten.unbind, "int", **_PART, dims=dims.drop),
    Op(aten.slice, "Tensor", **_PART, **_PLACED, dims=dims.same),
    Op(aten.split, "Tensor", **_PART, dims=dims.same),
    Op(aten.split_with_sizes, **_PART, dims=dims.same),
    Op(aten.narrow, dims=dims.same),
    Op(aten.chunk, dims=dims.same),
    Op(operator.getitem, **_PART),
    Op(aten.flip, **_PART, **_PLACED, dims=dims.same),
    Op(prims.rev, **_PART, **_PLACED),
    Op(aten.roll, **_PART, **_PLACED, dims=dims.same),
    Op(aten.tril, **_PART, **_PLACED, dims=dims.same),
    Op(aten.triu, **_PART, **_PLACED, dims=dims.same),
    Op(aten.constant_pad_nd, **_PART, **_PLACED, dims=dims.same),
    Op(aten.repeat, **_PART, dims=dims.repeat),
    Op(aten.view_as_complex, dims=dims.as_complex),
    Op(aten.view_as_real, dims=dims.as_real),
    Op(aten._conj, dims=dims.same),
    Op(aten._softmax, dims=dims.same),
    Op(aten._log_softmax, dims=dims.same),
    Op(aten.cumsum, dims=dims.same),
    Op(aten.native_dropout, dims=dims.same),
    Op(aten.neg, **_PART, backward=Backward.UNSIGNED, dims=dims.same),
    Op(aten.slice_scatter, **_PART, **_PLACED, through=(0, 1)),
    Op(aten.select_scatter, **_PART, **_PLACED, through=(0, 1)),
    Op(aten.slice_backward, **_PLACED),
    Op(aten.select_backward, **_PLACED),
    Op(aten.cat, **_JOIN, **_PLACED),
    Op(aten.stack, **_JOIN, **_PLACED),
    # rows by an index, and back
    Op(aten.embedding, **_GATHER),
    Op(aten.index, "Tensor", **_GATHER, **_PLACED, dims=dims.index),
    Op(aten._unsafe_index, "Tensor", **_GATHER, dims=dims.index),
    Op(aten.index_select, **_GATHER, dims=dims.same),
    Op(aten.gather, **_GATHER, dims=dims.same),
    Op(aten.index_put, **_PART, **_REDUCED, through=(0, 2)),
    Op(aten._unsafe_index_put, **_REDUCED, through=(0, 2)),
    Op(aten._unsafe_masked_index_put_accumulate, **_REDUCED, through=(0, 3)),
    Op(aten.scatter_add, **_REDUCED, through=(0, 3)),
    Op(aten.embedding_dense_backward, **_REDUCED),
    Op(aten.index_add, backward=Backward.SUM, through=(0, 3)),
    Op(aten.sum, "dim_IntList default", **_REDUCED),
    # elementwise
    Op(aten.add, "Tensor", **_SUM),
    Op(aten.sub, "Tensor", **_SUM),
    Op(aten.where, "self", forward=Forward.SUM, **_PLACED, through=(1, 2)),
    Op(aten.mul, "Tensor", **_SCALE, through=(0, 1)),
    Op(aten.mul, "Scalar", **_SCALE),
    Op(aten.div, "Tensor Scalar", **_SCALE),
    Op(aten.masked_fill, "Scalar", forward=Forward.SCALE, **_PLACED),
    Op(aten.masked_fill, "Tensor", forward=Forward.SCALE),
    # sums of products
    Op(aten.mm, **_CONTRACTION, contracted={0: -1, 1: -2}, squares=contraction.mm),
    Op(aten.bmm, **_CONTRACTION, contracted={0: -1, 1: -2}, squares=contraction.bmm),
    Op(aten._grouped_mm, **_CONTRACTION, contracted={0: -1, 1: -2}, squares=contraction.grouped_mm),
    Op(aten.addmm, **_CONTRACTION, contracted={1: -1, 2: -2}, adds=True),
    Op(aten.baddbmm, **_CONTRACTION, contracted={1: -1, 2: -2}, adds=True),
    Op(aten.addmv, **_CONTRACTION, adds=True),
    Op(aten.mv, **_CONTRACTION, contracted={0: -1, 1: 0}, squares=contraction.mv),
    Op(aten.dot, **_CONTRACTION, contracted={0: -1, 1: 0}),
    Op(aten.convolution, **_CONTRACTION),
    Op(aten.convolution_backward, **_CONTRACTION, squares=contraction.convolution),
)  # fmt: skip


def _forward(*kinds: Forward) -> set[Any]:
    return {target for op in OPS if op.forward in kinds for target in op.targets}


def _backward(*kinds: Backward) -> dict[Any, tuple[int, ...]]:
    return {target: op.through for op in OPS if op.backward in kinds for target in op.targets}


# What graphs' nodes call, by what it does.
CASTS = _forward(Forward.CAST)
ALIASES = _forward(Forward.ALIAS, Forward.CAST)
RESHAPES = _forward(Forward.RESHAPE)
PERMUTES = _forward(Forward.PERMUTE)
VIEWS = ALIASES | RESHAPES | PERMUTES | _forward(Forward.EXPAND)
GATHERS = _forward(Forward.GATHER)
ELEMENTWISE = _forward(Forward.SUM, Forward.SCALE)
SCALINGS = _forward(Forward.SCALE)
CONTRACTIONS = _forward(Forward.CONTRACTION)
HOLDING = VIEWS | GATHERS | ELEMENTWISE | CONTRACTIONS | _forward(Forward.PART, Forward.JOIN)
ADDING = {target for op in OPS if op.adds for target in op.targets}
MATRIX_PRODUCTS = {aten.mm.default, aten.bmm.default, aten._grouped_mm.default, *ADDING}
STACK_PRODUCTS = {aten.bmm.default, aten.baddbmm.default, aten.mul.Tensor}
"""What takes matrices gathered from a stack as weights."""

UNSIGNED = set(_backward(Backward.UNSIGNED))
SCALED = set(_backward(Backward.SCALE))
WALKED = _backward(*Backward)
"""For each op that a gradient is followed through, the arguments that it comes from."""
ADDING_POSITIONS = {*_backward(Backward.REDUCTION), aten.index_add.default}

ZEROS = {aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default}
FILLS: dict[Any, int] = {
    aten.full.default: 1,
    aten.new_full.default: 2,
    aten.full_like.default: 1,
    aten.scalar_tensor.default: 0,
}
"""For each op that fills a tensor, the argument that is the value."""

# What eager tensors are dispatched to, where overloads do not matter.
REARRANGED = {op.packet: op.dims for op in OPS if op.dims is not None}
CONTRACTED = {op.packet: op.contracted for op in OPS if op.contracted}
_REGROUPINGS = {aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.view_as, aten.reshape_as}
# Of these each new dimension holds the labelled ones whole, repeating none.
_ONE_TO_ONE = {aten.permute, aten.transpose, aten.t, aten.unsqueeze, aten.squeeze, aten.select, aten.slice, aten.narrow}

_RULES = {target: op.squares for op in OPS if op.squares for target in op.targets}
_OUTPUTS: dict[Any, int] = {aten.convolution_backward.default: 1}
"""Of ops with several results, which one is the contraction."""


def add(op: Op, output: int | None = None) -> None:
    """Adds the row of a contraction that is not PyTorch's own; ``output`` as in `_OUTPUTS`."""
    CONTRACTIONS.update(op.targets)
    HOLDING.update(op.targets)
    if op.contracted:
        MATRIX_PRODUCTS.update(op.targets)
        CONTRACTED[op.packet] = op.contracted
    for target in op.targets:
        assert op.squares is not None
        _RULES[target] = op.squares
        if output is not None:
            _OUTPUTS[target] = output


def makes_gradients(node: fx.Node) -> bool:
    """Whether the node calls a contraction that has a rule."""
    return node.target in _RULES


def contraction_at(node: fx.Node) -> Contraction | None:
    """The contraction whose result the node is, if it is one."""
    if node.target is operator.getitem:
        made_by = node.all_input_nodes[0]
        return _RULES[made_by.target](made_by) if _OUTPUTS.get(made_by.target) == node.args[1] else None
    if node.target is aten.mul.Tensor:
        return contraction.outer(node)
    return _RULES[node.target](node) if node.target in _RULES else None


def rearranged(packet: Any, old: tuple[int, ...], args: Sequence[Any], new: tuple[int, ...]) -> Dims:
    """For each dimension after a rearranging op, the dimensions before that it is made of, none where one is repeated.

    Args:
        packet: the op; one that is not known to repeat nothing gives no dimension at all.
        old, new: the shapes before and after.
        args: the op's arguments after the tensor.
    """
    held: Dims = tuple(frozenset({d}) for d in range(len(old)))
    if packet in _REGROUPINGS:
        return dims.reshape(held, (None, *args), old, new)
    if packet in _ONE_TO_ONE:
        return REARRANGED[packet](held, (None, *args), old, new)
    if packet is aten.expand:
        stretched = dims.expand(held, (None, *args), old, new)
        lead = len(new) - len(old)
        return tuple(kept if i >= lead and old[i - lead] == new[i] else frozenset() for i, kept in enumerate(stretched))
    return tuple(frozenset[int]() for _ in new)
