"""AdamW and the expected-loss term with Fisher curvature, in one pass over many weights.

Per weight w with gradient g, moments m and v, and per block of it with scale s and absmax elements M:

    h  = of_moment v + of_square g^2                                    curvature times half the strength
    g' = unscale (g + h s v'(z) + [i in M] share sign(w)),              z = w / s, see `rounding.variance_vjp`
    m  = beta1 m + (1 - beta1) g'
    v  = beta2 v + (1 - beta2) g'^2
    w  = keep w - step m / (sqrt(v) + eps)

It reads w, g, m and v and writes w, m and v, as AdamW does without the term; g stays as it is. A two-level format's scale
takes the absmax of the whole weight, which is known before the pass from the one before: the largest updated weight is a
by-product.

Source: Loshchilov and Hutter 2019, arXiv 1711.05101 (AdamW); LOTION, arXiv 2510.08757 (the term).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lotion_fx import rounding
from lotion_fx.formats import Format, resolve
from lotion_fx.noise import resolve_noise

# Columns of `factors`: what differs from weight to weight.
FACTORS = ("of_moment", "of_square", "unscale", "keep", "step", "eps")


def fits(weight: Tensor, fmt: Format, axis: int) -> bool:
    """Whether the pass takes a weight: whole blocks, of a power of two up to 128, along the contiguous last axis."""
    block = fmt.block
    if not isinstance(block, int) or block > 128 or block & (block - 1):
        return False
    return axis == weight.dim() - 1 and weight.is_contiguous() and weight.shape[-1] % block == 0


@torch.library.custom_op("lotion_fx::adamw_smooth", mutates_args=("params", "exp_avgs", "exp_avg_sqs"))
def adamw_smooth(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    factors: Tensor,
    amax: Tensor,
    found_inf: Tensor | None,
    fmt: str,
    noise: str,
    beta1: float,
    beta2: float,
) -> Tensor:
    """Steps n weights by AdamW on their loss plus the expected-loss term.

    No `triton_op`: its pointer tables hold addresses, which a trace does not have.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: n contiguous tensors each, float32, bfloat16 or float16, of one dtype per
            list and on one device.
        factors: float32 [n, 6], `FACTORS` of each weight.
        amax: float32 [n], the absmax of each weight, for a two-level format; else empty.
        found_inf: 0-d, not 0 where the gradients overflowed, upon which nothing is written.
        fmt, noise: names of the format and of the noise law.
        beta1, beta2: decay of the moments.

    Returns:
        The absmax of each updated weight, float32 [n]; empty unless the format is two-level.
    """
    run = reference if params[0].device.type == "cpu" else launch
    return run(params, grads, exp_avgs, exp_avg_sqs, factors, amax, found_inf, fmt, noise, beta1, beta2)


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    factors: Tensor,
    amax: Tensor,
    found_inf: Tensor | None,
    fmt: str,
    noise: str,
    beta1: float,
    beta2: float,
) -> Tensor:
    """`adamw_smooth` weight by weight in ATen."""
    if found_inf is not None and found_inf:
        return amax.clone()
    law, form = resolve_noise(noise), resolve(fmt)
    for i, (w, grad, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        of_moment, of_square, unscale, keep, step, eps = factors[i].to(rounding.compute_dtype(w))
        g, before = grad.to(keep.dtype), w.to(keep.dtype)
        h = of_moment * v + of_square * g.square()
        largest = amax[i] if form.law.two_level else None
        g = unscale * (g + rounding.variance_vjp(before, h, form, law=law, amax_tensor=largest))
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g.square())
        w.copy_(keep * before - step * m / (v.sqrt() + eps))
    return torch.stack([w.abs().amax().float() for w in params]) if form.law.two_level else amax.clone()
