"""Moments of what moves: views, selections, joins, masks, dropout, casts. The same op moves means and variances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lotion_fx.passes.moments.random_tensor import (
    Call,
    Dims,
    Ended,
    Random,
    Value,
    along,
    derived,
    mean_of,
    randoms,
    rule,
    stretched,
    var_of,
)
from lotion_fx.passes.ops import rearranged

aten = torch.ops.aten


def _same_frame(x: Random, shape: Sequence[int]) -> bool:
    """Whether an op kept the last dimension, so that the covariance over it only changes its leading ones."""
    return len(shape) > 0 and shape[-1] == x.shape[-1]


@rule(aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.view_as, aten.reshape_as)
def _reshape(call: Call, x: Random, *args: Any, **kwargs: Any) -> Random:
    op, args = getattr(aten, call.op), mean_of(args)
    mean = op(x.mean, *args, **kwargs)
    var = None if x.var is None else op(x.var, *args, **kwargs)
    cov = x.cov.reshape(*mean.shape, mean.shape[-1]) if x.cov is not None and _same_frame(x, mean.shape) else None
    return replace(x, mean=mean, var=var, independent=_followed(call, x, args, mean), cov=cov)


@rule(
    aten.permute, aten.transpose, aten.t, aten.numpy_T, aten.movedim, aten.unsqueeze, aten.squeeze, aten.select,
    aten.slice, aten.narrow, aten.contiguous, aten.clone, aten.detach, aten.alias, aten.lift_fresh, aten.flip,
    aten.roll,
    aten.to, aten._to_copy, aten.type_as, aten.tril, aten.triu, aten.diagonal,
    aten.index_select, aten.index, aten.gather, aten.repeat, aten.repeat_interleave, aten.expand,
    aten.expand_as, aten.broadcast_to, aten.constant_pad_nd, aten.pad, aten.unfold, aten.take_along_dim,
)  # fmt: skip
def move(call: Call, x: Any, *args: Any, **kwargs: Any) -> Random:
    """Ops that place, repeat and select elements: the same for means and variances."""
    if not isinstance(x, Random):
        raise Ended("a random index")
    op, args, kwargs = getattr(aten, call.op), mean_of(args), mean_of(kwargs)
    mean = op(x.mean, *args, **kwargs)
    if not mean.is_floating_point():
        raise Ended("a cast to integers rounds")
    var = None if x.var is None else op(x.var, *args, **_no_fill(call, kwargs))
    if call.op == "constant_pad_nd" and x.var is not None:
        var = aten.constant_pad_nd(x.var, args[0], 0)
    elif call.op == "pad" and x.var is not None and (args[1:] or ("constant",))[0] == "constant":
        var = aten.pad(x.var, args[0], "constant", 0.0)
    unmoved = mean.shape == x.shape and call.op in (*_IDENTITIES, "expand")
    kept = x.cov.to(mean.dtype) if x.cov is not None and unmoved else None
    return replace(x, mean=mean, var=var, independent=_followed(call, x, args, mean), cov=kept)


_IDENTITIES = {"contiguous", "clone", "detach", "alias", "lift_fresh", "to", "_to_copy", "type_as"}


def _no_fill(call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "value"}


def _followed(call: Call, x: Random, args: Any, out: Tensor) -> Dims:
    """The independent dimensions after an op that rearranges: those made of independent ones alone.

    ``args`` are all positional: tracing makes them so.
    """
    if call.op in (*_IDENTITIES, "tril", "triu", "flip", "roll"):
        return x.independent
    labels = rearranged(getattr(aten, call.op), tuple(x.shape), args, tuple(out.shape))
    return along(x, lambda held: (i for i, label in enumerate(labels) if label and label <= held))


@rule(aten.broadcast_tensors)
def _broadcast_tensors(call: Call, tensors: Sequence[Value]) -> list[Value]:
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    expand = call.named("expand")
    return [move(expand, t, shape) if isinstance(t, Random) else t.expand(shape) for t in tensors]


@rule(aten.unbind, aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split)
def _cut(call: Call, x: Random, *args: Any, **kwargs: Any) -> tuple[Random, ...]:
    op = getattr(aten, call.op)
    means = op(x.mean, *args, **kwargs)
    variances = [None] * len(means) if x.var is None else op(x.var, *args, **kwargs)
    independent = x.independent
    if call.op == "unbind":
        dim = (args[0] if args else kwargs.get("dim", 0)) % x.mean.dim()
        independent = along(x, lambda held: (i - (i > dim) for i in held if i != dim))
    return tuple(
        replace(x, mean=m, var=v, independent=independent, cov=None) for m, v in zip(means, variances, strict=True)
    )


@rule(aten.cat, aten.concat, aten.stack, aten.hstack, aten.vstack)
def _join(call: Call, tensors: Sequence[Value], *args: Any, **kwargs: Any) -> Random:
    op = getattr(aten, call.op)
    mean = op(mean_of(list(tensors)), *args, **kwargs)
    var = op([t.variance if isinstance(t, Random) else torch.zeros_like(t) for t in tensors], *args, **kwargs)
    return derived(randoms(list(tensors)), mean, var)


@rule(aten.where)
def _where(call: Call, condition: Any, a: Value, b: Value) -> Random:
    if isinstance(condition, Random):
        raise Ended("a random condition")
    mean = torch.where(condition, mean_of(a), mean_of(b))
    return derived(randoms((a, b)), mean, torch.where(condition, var_of(a), var_of(b)).expand(mean.shape))


@rule(aten.masked_fill)
def _masked_fill(call: Call, x: Random, mask: Any, value: Any) -> Random:
    if not isinstance(x, Random) or randoms((mask, value)):
        raise Ended("a random mask or filling")
    mean = aten.masked_fill(x.mean, mask, value)
    var = x.variance.masked_fill(mask, 0.0).expand(mean.shape)
    return replace(x, mean=mean, var=var, independent=stretched(x, mean.shape), cov=None)


@rule(aten.dropout, aten.feature_dropout, aten.native_dropout)
def _dropout(call: Call, x: Random, p: float, train: bool) -> Random:
    if call.op != "dropout" and train:
        raise Ended("its mask is not followed")
    if not train or p == 0:
        return x
    mask = F.dropout(torch.ones_like(x.mean), p)
    return replace(x, mean=x.mean * mask, var=None if x.var is None else x.var * mask.square(), cov=None)


@rule(
    aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten.new_zeros, aten.new_ones, aten.new_full,
    aten.new_empty, aten.rand_like, aten.randn_like, aten.size, aten.sym_size, aten.sym_numel, aten.sym_stride,
)  # fmt: skip
def _shape_only(call: Call, x: Random, *args: Any, **kwargs: Any) -> Any:
    return getattr(aten, call.op)(x.mean, *args, **kwargs)
