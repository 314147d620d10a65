"""Graphs whose sizes depend on data, as they are on the data that they were traced on.

The rows that a mask keeps, the tokens of each expert, the lengths of packed sequences: graphs are analysed and
differentiated on tensors without data, of which nobody knows how many there are. So they are taken from the batch that
the graph is of: masks become the indices that they choose, what else has no gradient becomes a constant, and an op that
reads numbers inside is taken apart into those that it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from lotion_fx import private
from lotion_fx.private import OpOverload, tree_flatten, tree_leaves, tree_unflatten

aten = torch.ops.aten


def fixed_sizes(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """A graph that computes of these inputs what another does, and in which no size depends on data.

    Args:
        gm: a graph of ATen ops, traced on inputs like these.
        inputs: real ones.

    Returns:
        The graph itself where it is such a one; else a copy, which holds constants of this batch.

    Raises:
        ValueError: an op runs on data alone.
    """
    given = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    with torch.set_grad_enabled(torch.is_grad_enabled()):  # whatever mode a graph ends in
        if _runs_without_data(gm, given):
            return gm
        return private.trace(lambda *args: _Fixing(gm).run(*args), given)


def _runs_without_data(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    try:
        with private.faked(inputs) as fakes:
            _Looking(gm).run(*fakes)
    except Exception:  # whatever a kernel without data may raise
        return False
    return True


class _NeedsData(Exception):
    """An op that is rewritten: it may run without data, and its gradient not."""


class _Looking(fx.Interpreter):
    """A run on tensors without data, which raises at the first op whose sizes are not fixed."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if _is_rewritten(target, args):
            raise _NeedsData
        return super().call_function(target, args, kwargs)


class _Fixing(fx.Interpreter):
    """A run on real data, to be traced."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.extra_traceback = False  # a sentence of ours is not followed by where in the graph it was said

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if _is_rewritten(target, args):
            return _REWRITTEN[target.overloadpacket](target, *args, **kwargs)
        if not isinstance(target, OpOverload) or _runs_on_fakes(target, args, kwargs):
            return super().call_function(target, args, kwargs)
        with private.outside_of_modes():
            out = target(*args, **kwargs)
            if not any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_leaves(out)):
                return out
            apart, tensors = _taken_apart(target, args, kwargs)
        return _Fixing(apart).run(*tensors)


def _runs_on_fakes(target: OpOverload, args: Any, kwargs: Any) -> bool:
    leaves, spec = tree_flatten((args, kwargs))
    try:
        with private.outside_of_modes(), private.faked(leaves) as fakes:
            args, kwargs = tree_unflatten(fakes, spec)
            target(*args, **kwargs)
    except Exception:  # as above
        return False
    return True


def _taken_apart(target: OpOverload, args: Any, kwargs: Any) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph of what an op runs, and the tensors that it takes."""
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def run(*given: Tensor) -> Any:
        values = iter(given)
        args, kwargs = tree_unflatten([next(values) if isinstance(x, Tensor) else x for x in leaves], spec)
        return target(*args, **kwargs)

    gm = make_fx(run, _error_on_data_dependent_ops=False)(*tensors)
    if any(node.target is target for node in gm.graph.nodes):
        raise ValueError(
            f"batch: {target} runs on it and not on tensors without data, by which its gradient is known; expected a "
            "loss of other ops, such as products of one expert at a time"
        )
    return gm, tensors


# ----------------------------------------------------------------------------------- what chooses among values by data


def _is_rewritten(target: Any, args: Sequence[Any]) -> bool:
    packet = getattr(target, "overloadpacket", None)
    if packet in _INDEXED:
        return any(map(_is_mask, args[1]))
    if packet is aten._grouped_mm:  # without data torch has but bfloat16's
        return args[0].dtype != torch.bfloat16 and (args[0].dim(), args[1].dim()) == (2, 3)
    return packet in _REWRITTEN


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _chosen(mask: Tensor) -> tuple[Tensor, ...]:
    """The indices at which a mask is true, by dimension."""
    with private.outside_of_modes():
        return tuple(each.clone() for each in mask.nonzero().unbind(1))


def _indexed(op: Any, x: Tensor, indices: Sequence[Tensor | None], *rest: Any, **kwargs: Any) -> Any:
    fixed: list[Tensor | None] = []
    for index in indices:
        fixed += _chosen(index) if index is not None and _is_mask(index) else [index]
    return op(x, fixed, *rest, **kwargs)


def _selected(op: Any, x: Tensor, mask: Tensor) -> Tensor:
    x, mask = torch.broadcast_tensors(x, mask)
    return aten.index.Tensor(x, list(_chosen(mask)))


def _packed(op: Any, x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    with private.outside_of_modes():
        places = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(*x.shape[:2], 1)
        places, sizes = op(places, lengths, batch_first)
    return aten.index.Tensor(x.flatten(0, 1), [places.view(-1)]), sizes


def _grouped(op: Any, x: Tensor, weights: Tensor, ends: Tensor, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """Products of rows with the matrix of their group, as one product of stacks."""
    with private.outside_of_modes():
        sizes = ends.diff(prepend=ends.new_zeros(1))
        row = torch.arange(int(ends[-1]), device=x.device)
        group = torch.searchsorted(ends, row, right=True)
        slot, longest = row - (ends - sizes)[group], int(sizes.max())
        stacks = row.new_full((len(ends), longest), len(x))  # the number of a row of zeros
        stacks[group, slot] = row
        places = row.new_zeros(len(x))  # of rows behind the last end torch promises nothing
        places[: len(row)] = group * longest + slot
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    out = aten.index.Tensor(aten.index.Tensor(padded, [stacks]).bmm(weights).flatten(0, 1), [places])
    out = out if bias is None else out + bias
    return out if out_dtype is None else out.to(out_dtype)


_INDEXED = (aten.index, aten.index_put, aten.index_put_)
_REWRITTEN: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_INDEXED, _indexed),
    aten.masked_select: _selected,
    aten._pack_padded_sequence: _packed,
    aten._grouped_mm: _grouped,
}
"""Ops whose results have a gradient."""
