"""Moments of what adds and multiplies: sums, means, products, linear layers, convolutions, embeddings.

Means and variances pass through an affine op exactly where its summands are independent; `Random.independent` and the
covariance of narrow layers say when they are. Where they are not, the covariances between them are dropped, and a note
says so.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lotion_fx.passes.moments.random_tensor import (
    COVARIANCE_WIDTH,
    Call,
    Dims,
    Ended,
    Notes,
    Random,
    Value,
    along,
    derived,
    joined,
    mean_of,
    merged,
    randoms,
    rule,
    stretched,
    var_of,
)

aten = torch.ops.aten

UNITS, SUMMANDS, FACTORS = "summed units", "summands", "factors"


# ------------------------------------------------------------------------------------------------------------- sums


def _shared(a: Value, b: Value) -> frozenset[str]:
    """The weights whose noise is in both."""
    return a.sources & b.sources if isinstance(a, Random) and isinstance(b, Random) else frozenset()


@rule(aten.add, aten.sub)
def add(call: Call, a: Value, b: Value, *, alpha: Any = 1) -> Random:
    op = getattr(aten, call.op)
    mean = op(mean_of(a), mean_of(b), alpha=alpha)
    parts = randoms((a, b))
    if any(part.var is None for part in parts):
        return derived(parts, mean, None)
    if len(parts) == 1:
        x, power = parts[0], alpha**2 if parts[0] is b else 1
        cov = x.cov * power if x.cov is not None and x.shape == mean.shape else None
        var = (x.variance * power).expand(mean.shape)
        return derived(parts, mean, var, stretched(x, mean.shape), cov=cov)
    var = (var_of(a) + var_of(b) * alpha**2).expand(mean.shape)
    both = joined(*(stretched(part, mean.shape) for part in parts))
    if shared := _shared(a, b):
        return derived(parts, mean, var, both, var_note=call.dropped(SUMMANDS, shared))
    cov = None
    if all(part.shape == mean.shape for part in parts) and any(part.cov is not None for part in parts):
        known = [covariance(part) for part in parts]
        cov = None if known[0] is None or known[1] is None else known[0] + alpha**2 * known[1]
    return derived(parts, mean, var, both, cov=cov)


@rule(aten.rsub)
def _rsub(call: Call, a: Value, b: Value, alpha: Any = 1) -> Random:
    return add(call.named("sub"), b, a, alpha=alpha)


@rule(aten.neg)
def _neg(call: Call, x: Random) -> Random:
    return replace(x, mean=-x.mean)


@rule(aten.sum, aten.mean)
def _sum(call: Call, x: Random, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Random:
    whole = tuple(range(x.mean.dim()))
    dims = (
        whole if dim is None or dim == [] else tuple(d % x.mean.dim() for d in ([dim] if isinstance(dim, int) else dim))
    )
    mean = getattr(aten, call.op)(x.mean, dims, keepdim, dtype=dtype) if dims else x.mean
    if x.var is None or not dims:
        return replace(x, mean=mean, cov=None)
    count = 1
    if call.op == "mean":
        for d in dims:
            count = count * x.shape[d]
    if x.cov is not None and dims == (x.mean.dim() - 1,):
        var, note = x.cov.sum((-1, -2)), Notes()
        var = var.unsqueeze(-1) if keepdim else var
    else:
        var, note = x.var.sum(dims, keepdim), call.dropped(UNITS, x.dependent(*dims))
    kept = along(x, lambda held: (i if keepdim else i - sum(d < i for d in dims) for i in held if i not in dims))
    return derived([x], mean, (var / count**2).to(mean.dtype), kept, var_note=note)


@rule(aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d)
def _average(call: Call, x: Random, *args: Any, **kwargs: Any) -> Random:
    """A mean of windows of n elements: the variance of a mean of n independent ones is theirs over n."""
    op = getattr(aten, call.op)
    mean, var = op(x.mean, *args, **kwargs), op(x.variance, *args, **kwargs)
    first = x.mean.dim() - int(call.op[-2])
    windows = _window_sizes(call, x, mean, args, first)
    note = call.dropped(UNITS, x.dependent(*range(first, x.mean.dim())))
    return derived([x], mean, var / windows, along(x, lambda held: (i for i in held if i < first)), var_note=note)


def _window_sizes(call: Call, x: Random, out: Tensor, args: Any, first: int) -> Any:
    if call.op.startswith("adaptive"):
        pairs = list(zip(x.shape[first:], out.shape[first:], strict=True))
        if any(before % after for before, after in pairs):
            raise Ended("windows of unequal size")
        return math.prod(before // after for before, after in pairs)
    kernel = list(args[0])
    padding, ceil_mode, _, divisor = (*args[2:], *(None,) * (6 - max(len(args), 2)))[:4]
    if any(padding or ()) or ceil_mode or divisor:
        raise Ended("windows of unequal size")
    return math.prod(kernel if len(kernel) > 1 else kernel * (x.mean.dim() - first))


# --------------------------------------------------------------------------------------------------------- products


@rule(aten.mul)
def mul(call: Call, a: Value, b: Value) -> Random:
    if a is b and isinstance(a, Random):
        return square(call, a)
    mean = aten.mul(mean_of(a), mean_of(b))
    parts = randoms((a, b))
    if len(parts) == 1:
        x, c = parts[0], mean_of(b if isinstance(a, Random) else a)
        if x.var is None:
            return derived(parts, mean, None)
        cov = None
        if x.cov is not None and x.shape == mean.shape:
            row = c.expand(mean.shape) if isinstance(c, Tensor) else torch.full_like(mean, c)
            cov = x.cov * row.unsqueeze(-1) * row.unsqueeze(-2)
        return derived(parts, mean, x.var * c * c, stretched(x, mean.shape), cov=cov)
    va, vb, ma, mb = var_of(a), var_of(b), mean_of(a), mean_of(b)
    var = va * mb.square() + ma.square() * vb + va * vb
    note = call.dropped(FACTORS, _shared(a, b))
    both = joined(*(stretched(part, mean.shape) for part in parts))
    return derived(parts, mean, var, both, mean_note=note, var_note=note)


def square(call: Call, x: Random) -> Random:
    """``x^2``: its mean ``m^2 + v`` is exact, its variance ``4 m^2 v + 2 v^2`` that of a Gaussian."""
    v = x.variance
    var = 4 * x.mean.square() * v + 2 * v.square()
    note = call.note("Gaussian")
    return derived([x], x.mean.square() + v, var, x.independent, var_note=note, mean_uses_var=True)


def covariance(x: Random) -> Tensor | None:
    """[..., d, d] over the last dimension, None where it is not known."""
    if x.cov is not None:
        return x.cov
    return on_diagonal(x.mean.new_zeros(()), x.variance) if x.mean.dim() and x.is_independent(-1) else None


def on_diagonal(cov: Tensor, var: Tensor) -> Tensor:
    """A covariance [..., d, d] with ``var`` [..., d] on its diagonal."""
    own = torch.eye(var.shape[-1], dtype=torch.bool, device=var.device)
    return torch.where(own, var.unsqueeze(-1), cov)


@rule(aten.matmul, aten.mm, aten.bmm, aten.mv, aten.dot)
def matmul(call: Call, a: Value, b: Value) -> Random:
    """``sum_j a_j b_j``, with both factors random ``sum_j [va mb^2 + ma^2 vb + va vb]``."""
    mean, var = torch.matmul(mean_of(a), mean_of(b)), _product_variance(a, b, torch.matmul)
    shared = call.dropped(FACTORS, _shared(a, b))
    dependent = a.dependent(-1) if isinstance(a, Random) else frozenset()
    if isinstance(b, Random):
        dependent |= b.dependent(-2 if b.mean.dim() > 1 else -1)
    note = merged(shared, call.dropped(UNITS, dependent))
    parts = [_product_dims(x, mean, own) for x, own in ((a, -2), (b, -1)) if isinstance(x, Random)]
    return derived(randoms((a, b)), mean, var, joined(*parts), var_note=note, mean_note=shared)


def _product_variance(a: Value, b: Value, op: Any) -> Tensor:
    """``op(va, mb^2 + vb) + op(ma^2, vb)``: a product for each random factor."""
    ma, mb = mean_of(a), mean_of(b)
    if not isinstance(b, Random):
        return op(var_of(a), mb.square())
    if not isinstance(a, Random):
        return op(ma.square(), b.variance)
    return op(a.variance, mb.square() + b.variance) + op(ma.square(), b.variance)


def _product_dims(x: Random, out: Tensor, own: int) -> Dims:
    """The independent dimensions of a product by one factor's noise: its own rows or columns, and stacked matrices."""
    if x.mean.dim() < 2 or out.dim() < max(2, x.mean.dim()):
        return along(x, lambda held: ())
    lead, last = out.dim() - x.mean.dim(), x.mean.dim() - 2
    stacked = {i for i in range(last) if x.shape[i] == out.shape[i + lead]} | {x.mean.dim() + own}
    return along(x, lambda held: (i + lead for i in held & stacked))


@rule(aten.linear)
def linear(call: Call, x: Value, weight: Value, bias: Value | None = None) -> Random:
    """``y = x W^T + b``, x [..., I], W [O, I]: exact also for dependent inputs whose covariance is known.

    For two stacked layers this is MATH's ``Var(y_k) = sum_j [W_kj^2 v_j + sigma_kj^2 (m_j^2 + v_j)]``.
    """
    flat = _with_rows(weight)
    if _shared(x, flat) or not isinstance(x, Random) or len(weight.shape) == 1:
        y = matmul(call, x, flat)
    else:
        y = _linear_of_random(call, x, weight)
    return y if bias is None else add(call.named("add"), y, bias)


def _with_rows(weight: Value) -> Value:
    """The weight, [O, I], as a matrix product's second factor, [I, O]."""
    if not isinstance(weight, Random):
        return weight.t()
    swapped = along(weight, lambda held: (1 - i for i in held))
    return replace(weight, mean=weight.mean.t(), var=weight.variance.t(), independent=swapped, cov=None)


def _linear_of_random(call: Call, x: Random, weight: Value) -> Random:
    known = x.cov is not None or x.is_independent(-1)
    rows = weight.shape[0]
    narrow = isinstance(rows, int) and rows <= COVARIANCE_WIDTH
    if known and (x.cov is not None or narrow):
        return _linear_with_covariance(x, weight, narrow)
    mean, var = F.linear(x.mean, mean_of(weight)), _product_variance(x, _with_rows(weight), torch.matmul)
    own = weight.dependent(-1) if isinstance(weight, Random) else frozenset()
    note = call.dropped(UNITS, x.dependent(-1) | own)
    return derived(randoms((x, weight)), mean, var, _linear_dims(x, weight), var_note=note)


def _linear_dims(x: Random, weight: Value) -> Dims:
    """Of a linear layer: the weight's noise is independent from row to row, the input's from position to position."""
    last = x.mean.dim() - 1
    rows = along(weight, lambda held: (last for i in held if i == 0)) if isinstance(weight, Random) else {}
    return joined(along(x, lambda held: held - {last}), rows)


def _linear_with_covariance(x: Random, weight: Value, keep: bool) -> Random:
    """``Cov(y) = W Cov(x) W^T + diag(sigma^2 (m^2 + v))``: the weight's own noise is independent from row to row."""
    cov_x, w = covariance(x), mean_of(weight)
    assert cov_x is not None
    half = w @ cov_x
    var = (half * w).sum(-1)
    cov = half @ w.t() if keep else None
    if isinstance(weight, Random):
        if not weight.is_independent(0, 1):
            raise Ended("a weight whose elements are dependent")
        own = F.linear(x.mean.square() + x.variance, weight.variance)
        var = var + own
        cov = None if cov is None else on_diagonal(cov, var)
    parents = randoms((x, weight))
    return derived(parents, F.linear(x.mean, w), var, _linear_dims(x, weight), cov=cov)


@rule(aten.addmm, aten.baddbmm)
def _addmm(call: Call, bias: Value, a: Value, b: Value, *, beta: Any = 1, alpha: Any = 1) -> Random:
    if randoms((a, b)):
        product: Value = matmul(call.named("matmul"), a, b)
    else:
        product = aten.matmul(a, b)
    scaled: Value = product if alpha == 1 else _scaled(call, product, alpha)
    return add(call.named("add"), bias if beta == 1 else _scaled(call, bias, beta), scaled)


def _scaled(call: Call, value: Value, factor: Any) -> Value:
    return mul(call.named("mul"), value, factor) if isinstance(value, Random) else value * factor


@rule(aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution, aten.conv_transpose1d, aten.conv_transpose2d)
def _convolution(call: Call, x: Value, weight: Value, bias: Value | None = None, *args: Any, **kwargs: Any) -> Random:
    """A convolution sums over channels and windows: exact where the image is fixed, as in a first layer."""

    def op(x: Tensor, w: Tensor) -> Tensor:
        return getattr(aten, call.op)(x, w, None, *args, **kwargs)

    mean, var = op(mean_of(x), mean_of(weight)), _product_variance(x, weight, op)
    channel = mean.dim() - len(weight.shape) + 1
    shared = call.dropped(FACTORS, _shared(x, weight))
    note, parts = shared, []
    if isinstance(x, Random):
        note = merged(note, call.dropped(UNITS, x.dependent(*range(channel, mean.dim()))))
        parts.append(along(x, lambda held: (i for i in held if i < channel)))
    if isinstance(weight, Random):
        # A transposed one's groups are slices of dimension 0: its channels need both.
        rows = {0, 1} if "transpose" in call.op or (call.op == "convolution" and args[3]) else {0}
        summed = set(range(weight.mean.dim())) - {max(rows)}
        note = merged(note, call.dropped(UNITS, weight.dependent(*summed)))
        parts.append(along(weight, lambda held: {channel} if rows <= held else ()))
    y = derived(randoms((x, weight)), mean, var, joined(*parts), var_note=note, mean_note=shared)
    if bias is None:
        return y
    column: Any = (slice(None),) + (None,) * (mean.dim() - channel - 1)
    if isinstance(bias, Random):
        bias = replace(bias, mean=bias.mean[column], var=bias.variance[column])
    else:
        bias = bias[column]
    return add(call.named("add"), y, bias)


@rule(aten.embedding)
def _embedding(call: Call, weight: Value, indices: Any, *args: Any, **kwargs: Any) -> Random:
    """Rows of a table: exact; positions that read one row share its noise."""
    if not isinstance(weight, Random) or isinstance(indices, Random):
        raise Ended("a random index")
    mean = aten.embedding(weight.mean, indices, *args, **kwargs)
    var = aten.embedding(weight.variance, indices, *args, **kwargs)
    last = along(weight, lambda held: (mean.dim() - 1 for i in held if i == 1))
    return replace(weight, mean=mean, var=var, independent=last, cov=None)
