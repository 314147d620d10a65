"""Rounding a weight onto a format: to nearest, at random, the random one's moments, and gradients in closed form.

Notation of the whole file: ``s`` a block's scale, ``z = w / s``, ``lo <= z <= hi`` the levels around it, ``q_max``
the largest level. Every function computes in float32 (float64 for float64 weights) and is made of plain ATen
operations, so that eager, `torch.compile` and `make_fx` see the same thing; none is differentiable itself, the
``*_vjp`` functions are their gradients. ``z`` is a true division: a multiplication by ``1/s`` moves codes at ties.
In products the full-size operand stands first, because eager results take its memory layout.

Arguments used throughout:
    w: weights, any shape of at least one dimension; float32, bfloat16, float16 or float64.
    fmt: the `Format`.
    axis: the contraction axis, along which blocks run; the last block may be short.
    amax_tensor: the 0-dimensional absmax of the whole weight, where ``w`` is only a shard of it (or where it is known
        already). Used by "tensor" blocks and by two-level scales; by default it is taken from ``w``.

Source: LOTION, Kwun et al. 2025, arXiv 2510.08757 (randomized rounding, its variance).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lotion_fx.numerics.formats import Format
from lotion_fx.numerics.noise import RANDOMIZED, NoiseLaw

__all__ = [
    "from_blocks",
    "mean",
    "mean_vjp",
    "outcomes",
    "rr",
    "rtn",
    "rtn_vjp",
    "scale",
    "scale_parts",
    "to_blocks",
    "variance",
    "variance_vjp",
]


def compute_dtype(w: Tensor) -> torch.dtype:
    """float64 for float64 weights, else float32."""
    return torch.float64 if w.dtype == torch.float64 else torch.float32


def to_blocks(w: Tensor, fmt: Format, axis: int = -1) -> Tensor:
    """``w`` with its blocks apart, ``[..., blocks, block]``: ``axis`` split in two and moved last.

    A short last block is filled with zeros. A "tensor" format gives ``[1, elements]``. A view, unless padding or
    (for "tensor") a non-contiguous ``w`` forces a copy.
    """
    if fmt.block == "tensor":
        return w.reshape(1, -1)
    axis = axis % w.dim()
    length = w.shape[axis]
    # An empty axis (a shard of nothing) has no blocks, rather than one block with no largest element.
    block = fmt.block if isinstance(fmt.block, int) else max(length, 1)
    short = -length % block
    if short:
        w = F.pad(w, (0, 0) * (w.dim() - 1 - axis) + (0, short))
    return w.unflatten(axis, ((length + short) // block, block)).movedim((axis, axis + 1), (-2, -1))


def from_blocks(blocks: Tensor, fmt: Format, axis: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse of `to_blocks`: ``blocks`` put back into ``shape``; contiguous where padding was dropped."""
    if fmt.block == "tensor":
        return blocks.reshape(shape)
    axis = axis % len(shape)
    w = blocks.movedim((-2, -1), (axis, axis + 1)).flatten(axis, axis + 1)
    if w.shape[axis] == shape[axis]:
        return w
    # as_strided where narrow would do: it makes Inductor write the padded blocks out. Fused across a narrow, its C++
    # loop over the axis is split by the block and loses the short last one (torch 2.13, CppScheduling.try_loop_split).
    return w.as_strided(shape, w.stride()).contiguous()


def _restored(blocks: Tensor, fmt: Format, axis: int, w: Tensor) -> Tensor:
    """`from_blocks` in ``w``'s own strides, those of dimensions of length one included.

    A convolution reads from them which memory format its output is to have, and a graph was made for the weight's. For
    length one torch's real tensors and its fake ones choose them differently, so they are always set here.
    """
    x = from_blocks(blocks, fmt, axis, w.shape)
    if not _is_dense(w) or (x.stride() == w.stride() and 1 not in w.shape):
        return x
    order = sorted(range(w.dim()), key=lambda dim: (w.stride()[dim], w.shape[dim]), reverse=True)
    x = x.permute(order).contiguous().permute([order.index(dim) for dim in range(w.dim())])
    return x.as_strided(w.shape, w.stride()) if 1 in w.shape else x


def _is_dense(w: Tensor) -> bool:
    """Whether the elements fill their memory, each its own place: else strides cannot be those of a new tensor."""
    filled = 1
    for stride, length in sorted(zip(w.stride(), w.shape, strict=True)):
        if length > 1 and stride != filled:
            return False
        filled *= length
    return w.numel() > 0


class _Blocks(NamedTuple):
    """A weight in blocks with what its scale is made of: ``w`` [..., blocks, block], the rest [..., blocks, 1]."""

    w: Tensor
    amax: Tensor
    block_scale: Tensor
    tensor_scale: Tensor | None

    @property
    def scale(self) -> Tensor:
        return self.block_scale if self.tensor_scale is None else self.block_scale * self.tensor_scale


def written(x: Tensor) -> Tensor:
    """``x``, written to memory when compiled: Inductor otherwise repeats its formula in every use, once an element."""
    return x.as_strided(x.shape, x.stride())


def _blocks(w: Tensor, fmt: Format, axis: int, amax_tensor: Tensor | None) -> _Blocks:
    blocks = to_blocks(w, fmt, axis).to(compute_dtype(w))
    if amax_tensor is not None:
        amax_tensor = amax_tensor.to(blocks.dtype)
    if fmt.block == "tensor" and amax_tensor is not None:
        amax = amax_tensor.reshape(1, 1)
    else:
        amax = blocks.abs().amax(-1, keepdim=True)
    tensor_scale = None
    if fmt.law.two_level:
        tensor_scale = fmt.law.tensor_scale(amax.amax() if amax_tensor is None else amax_tensor, fmt.grid)
    return _Blocks(blocks, amax, written(fmt.law.block_scale(amax, fmt.grid, tensor_scale)), tensor_scale)


def scale(w: Tensor, fmt: Format, axis: int = -1, *, amax_tensor: Tensor | None = None) -> Tensor:
    """Each block's scale ``s``, [..., blocks, 1] in the compute dtype, which broadcasts against `to_blocks`."""
    return _blocks(w, fmt, axis, amax_tensor).scale


def scale_parts(
    w: Tensor, fmt: Format, axis: int = -1, *, amax_tensor: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The two stored factors of `scale`: each block's [..., blocks, 1] and the tensor's (None unless two-level)."""
    b = _blocks(w, fmt, axis, amax_tensor)
    return b.block_scale, b.tensor_scale


class _Levels(NamedTuple):
    """What a law's printed functions take, each of the shape of a weight in blocks, in grid units."""

    z: Tensor
    lo: Tensor
    hi: Tensor
    third: Tensor


def _levels(z: Tensor, fmt: Format, law: NoiseLaw) -> _Levels:
    lo, hi = fmt.grid.neighbours(z)
    if law.beyond is None:
        return _Levels(z, lo, hi, lo)
    return _Levels(z, lo, hi, torch.where(z - lo < hi - z, fmt.grid.below(lo), fmt.grid.above(hi)))


def rtn(w: Tensor, fmt: Format, axis: int = -1, *, amax_tensor: Tensor | None = None) -> Tensor:
    """Round to nearest, ``s * nearest(w / s)``: ties to the even code, values past the grid to its last level.

    Returns:
        The rounded weight, ``w``'s shape and dtype: bit for bit what unpacking its codes and scales gives.
    """
    b = _blocks(w, fmt, axis, amax_tensor)
    s = b.scale
    return _restored(fmt.grid.nearest(b.w / s) * s, fmt, axis, w).to(w.dtype)


def rr(
    w: Tensor,
    fmt: Format,
    axis: int = -1,
    *,
    law: NoiseLaw = RANDOMIZED,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
    amax_tensor: Tensor | None = None,
) -> Tensor:
    """Randomized rounding: ``s hi`` with probability ``(z - lo) / (hi - lo)``, else ``s lo``; or as ``law`` has it.

    Each weight is independent and its mean is ``w``, except for values past the grid, which take its last level.

    Args:
        generator: the source of randomness; the default generator if None.
        uniform: the randomness itself, uniform in [0, 1), of ``w``'s shape; the result is then deterministic.

    Returns:
        A sample, ``w``'s shape and dtype.
    """
    if uniform is None:
        uniform = torch.rand(w.shape, generator=generator, dtype=compute_dtype(w), device=w.device)
    b = _blocks(w, fmt, axis, amax_tensor)
    s = b.scale
    at = _levels(b.w / s, fmt, law)
    up, beyond = law.torch["draw"](*at)
    u = to_blocks(uniform, fmt, axis).to(at.z.dtype)
    # u gap < p gap is u < p, and at a level, where the gap is 0, it is false.
    level = torch.where(u * (at.hi - at.lo) < up, at.hi, at.lo)
    if law.beyond is not None:
        level = torch.where((1 - u) * (at.hi - at.lo) < beyond, at.third, level)
    return _restored(level * s, fmt, axis, w).to(w.dtype)


def outcomes(
    w: Tensor, fmt: Format, axis: int = -1, *, law: NoiseLaw = RANDOMIZED, amax_tensor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What each weight may be rounded to at random: exact expectations over one weight are sums over these.

    Returns:
        The values and their probabilities, each [2, *w.shape] (3 for a law with a third level), in the compute dtype.
        At a level and past the grid the first value has all of the probability.
    """
    b = _blocks(w, fmt, axis, amax_tensor)
    s = b.scale
    at = _levels(b.w / s, fmt, law)
    gap = at.hi - at.lo
    up, beyond = (x / torch.where(gap == 0, 1.0, gap) for x in law.torch["draw"](at.z.clamp(at.lo, at.hi), *at[1:]))
    values, odds = [at.lo, at.hi], [1 - up - beyond, up]
    if law.beyond is not None:
        values, odds = [*values, at.third], [*odds, beyond]
    pairs = ((v * s, p) for v, p in zip(values, odds, strict=True))
    put = [(_restored(v, fmt, axis, w), _restored(p, fmt, axis, w)) for v, p in pairs]
    return torch.stack([v for v, _ in put]), torch.stack([p for _, p in put])


def mean(
    w: Tensor, fmt: Format, axis: int = -1, *, law: NoiseLaw = RANDOMIZED, amax_tensor: Tensor | None = None
) -> Tensor:
    """The mean of a random rounding: ``w`` if the law is unbiased, the level itself at a level and past the grid.

    Returns:
        The mean, ``w``'s shape, in the compute dtype.
    """
    b = _blocks(w, fmt, axis, amax_tensor)
    s = b.scale
    (m,) = law.torch["mean"](*_levels(fmt.grid.clamp(b.w / s), fmt, law))
    return _restored(m * s, fmt, axis, w)


def mean_vjp(
    w: Tensor,
    grad: Tensor,
    fmt: Format,
    axis: int = -1,
    *,
    law: NoiseLaw = RANDOMIZED,
    scale_grad: bool = True,
    amax_tensor: Tensor | None = None,
) -> Tensor:
    """The gradient ``d/dw <grad, mean(w)>``.

    With ``m(z)`` the mean in grid units it is ``grad_i m'(z_i)``, 0 past the grid, plus the scale's own part at the
    block's absmax element: ``sign(w_m) / q_max * sum_i grad_i (m(z_i) - z_i m'(z_i))``, with what `variance_vjp` says
    of scales. At a level the slope is the law's at D = 0.

    Args:
        grad: gradient with respect to the mean, ``w``'s shape.
        scale_grad: whether to add the scale's part.

    Returns:
        The gradient, ``w``'s shape, in the compute dtype.
    """
    b = _blocks(w, fmt, axis, amax_tensor)
    g = to_blocks(grad.to(compute_dtype(w)), fmt, axis)
    z = b.w / b.scale
    at = _levels(fmt.grid.clamp(z), fmt, law)
    by_w, by_s = law.torch["mean_slopes"](*at)
    inside = z == at.z
    out = torch.where(inside, g * by_w, 0.0)
    if scale_grad:
        out = out + _at_amax(b, fmt, (g * torch.where(inside, by_s, at.z)).sum(-1, keepdim=True))
    return _restored(out, fmt, axis, w)


def variance(
    w: Tensor, fmt: Format, axis: int = -1, *, law: NoiseLaw = RANDOMIZED, amax_tensor: Tensor | None = None
) -> Tensor:
    """The variance of a random rounding, ``sigma^2 = (w - s lo)(s hi - w)`` by default; 0 at a level and past the grid.

    Returns:
        ``sigma^2 >= 0`` in squared units of ``w``, its shape, in the compute dtype.
    """
    b = _blocks(w, fmt, axis, amax_tensor)
    s = b.scale
    # In grid units the law's factors are differences without cancellation: exactly 0 at a level.
    (v,) = law.torch["variance"](*_levels(fmt.grid.clamp(b.w / s), fmt, law))
    return _restored(v * s * s, fmt, axis, w)


def variance_vjp(
    w: Tensor,
    h: Tensor,
    fmt: Format,
    axis: int = -1,
    *,
    law: NoiseLaw = RANDOMIZED,
    scale_grad: bool = True,
    amax_tensor: Tensor | None = None,
) -> Tensor:
    """The gradient ``d/dw sum_i h_i sigma_i^2`` with ``h`` constant.

    ``h_i s v'(z_i)``, with ``v`` the variance in grid units, plus the scale's own part at the block's absmax element
    ``m``: ``sign(w_m) / q_max * sum_i h_i s (2 v(z_i) - z_i v'(z_i))``. For randomized rounding these are
    ``h_i (s (lo_i + hi_i) - 2 w_i)`` and ``h_i (w_i (lo_i + hi_i) - 2 s lo_i hi_i)``. Weights past the grid contribute
    nothing, nor does a scale at its lower limit; a snapped scale passes straight through, a tensor's second-level scale
    is held; several absmax elements share alike. On a shard the block sum is the shard's own.

    Args:
        h: curvature, broadcasts to ``w``'s shape.
        scale_grad: whether to add the scale's part.

    Returns:
        The gradient, ``w``'s shape, in the compute dtype.
    """
    b = _blocks(w, fmt, axis, amax_tensor)
    s = b.scale
    h = to_blocks(h.expand(w.shape), fmt, axis).to(b.w.dtype)
    by_w, by_s = law.torch["variance_slopes"](*_levels(fmt.grid.clamp(b.w / s), fmt, law))
    grad = by_w * s * h
    if scale_grad:
        grad = grad + _at_amax(b, fmt, s * (h * by_s).sum(-1, keepdim=True))
    return _restored(grad, fmt, axis, w)


def rtn_vjp(
    w: Tensor,
    grad: Tensor,
    fmt: Format,
    axis: int = -1,
    *,
    scale_grad: bool = True,
    amax_tensor: Tensor | None = None,
) -> Tensor:
    """The straight-through gradient of ``<grad, rtn(w)>``.

    With the scale held it is ``grad`` itself. With the scale differentiated ``rtn(w) = s (nearest(z) - z) + w``, the
    bracket constant and ``z`` limited to the grid, so the block's absmax element ``m`` also receives
    ``sign(w_m) / q_max * sum_i grad_i (nearest(z_i) - z_i)``. On a shard the block sum is the shard's own.

    Args:
        grad: gradient with respect to the rounded weight, ``w``'s shape.
        scale_grad: whether to differentiate the scale.

    Returns:
        The gradient, ``w``'s shape, in the compute dtype.
    """
    grad = grad.to(compute_dtype(w))
    if not scale_grad:
        return grad
    b = _blocks(w, fmt, axis, amax_tensor)
    z = fmt.grid.clamp(b.w / b.scale)
    g = to_blocks(grad, fmt, axis)
    total = (g * (fmt.grid.nearest(z) - z)).sum(-1, keepdim=True)
    return _restored(g + _at_amax(b, fmt, total), fmt, axis, w)


def _at_amax(b: _Blocks, fmt: Format, d_scale: Tensor) -> Tensor:
    """``d_scale ds/dw``: the derivative by each block's scale, [..., blocks, 1], moved to the absmax elements."""
    at_amax = b.w.abs() == b.amax
    # A shard may hold no absmax element: then nothing is selected and the count, 0, must only not divide.
    count = at_amax.to(b.w.dtype).sum(-1, keepdim=True).clamp(min=1)
    follows = b.amax >= fmt.law.smallest_amax(fmt.grid, b.tensor_scale)
    share = torch.where(follows, d_scale / (fmt.grid.max * count), 0.0)
    return torch.where(at_amax, share * b.w.sign(), 0.0)
