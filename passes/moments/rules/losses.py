"""Expected losses: the loss's own mean, given the moments of its input.

MSE                      mean((m - t)^2 + v)                                       exact
cross-entropy            CE(m) + w/2 (sum_k p_k v_k - p^T Cov p), p = softmax(m)   second order
BCE with logits          BCE(m) + w/2 p (1 - p) v, p = sigmoid(m)                  second order
L1, Huber, smooth L1     E |x - t| and its clipped square                          exact for a Gaussian
NLL, KL                  linear in the input                                       exact
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lotion_fx.passes.moments.random_tensor import Call, Ended, Notes, Random, derived, merged, rule
from lotion_fx.passes.moments.rules.affine import add, square
from lotion_fx.passes.moments.rules.nonlinear import SECOND, gaussian

aten = torch.ops.aten
_REDUCTIONS = ("none", "mean", "sum")  # ATen's Reduction enumeration


def _reduced(x: Tensor, reduction: int) -> Tensor:
    return x if reduction == 0 else x.mean() if reduction == 1 else x.sum()


def _difference(call: Call, x: Any, target: Any) -> Random:
    return add(call.named("sub"), x, target)


@rule(aten.mse_loss)
def _mse(call: Call, x: Any, target: Any, reduction: int = 1) -> Random:
    squared = square(call, _difference(call, x, target))
    if reduction == 0:
        return squared
    return derived([squared], _reduced(squared.mean, reduction), None)


def _elementwise_loss(call: Call, x: Random, mean: Tensor, reduction: int, note: Notes) -> Random:
    return derived([x], _reduced(mean, reduction), None, mean_note=note, mean_uses_var=True)


@rule(aten.l1_loss)
def _l1(call: Call, x: Any, target: Any, reduction: int = 1) -> Random:
    d = _difference(call, x, target)
    s, _, density, above = gaussian(d)
    return _elementwise_loss(call, d, d.mean * (2 * above - 1) + 2 * s * density, reduction, call.note("Gaussian"))


@rule(aten.huber_loss, aten.smooth_l1_loss)
def _huber(call: Call, x: Any, target: Any, reduction: int = 1, delta: float = 1.0) -> Random:
    """``E h(d)``, d Gaussian, h = d^2 / 2 within delta and delta (|d| - delta / 2) beyond; smooth L1 is h / delta."""
    d = _difference(call, x, target)
    s = gaussian(d)[0]
    mean = _expected_huber(d.mean, s, delta)
    if call.op == "smooth_l1_loss":
        mean = mean / delta
    return _elementwise_loss(call, d, mean, reduction, call.note("Gaussian"))


def _expected_huber(m: Tensor, s: Tensor, delta: float) -> Tensor:
    low, high = (-delta - m) / s, (delta - m) / s
    inside = torch.special.ndtr(high) - torch.special.ndtr(low)
    f_low, f_high = (torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi) for z in (low, high))
    squares = (
        (m.square() + s.square()) * inside + 2 * m * s * (f_low - f_high) + s.square() * (low * f_low - high * f_high)
    )
    beyond = m * (torch.special.ndtr(-high) - torch.special.ndtr(low)) + s * (f_high + f_low)
    return 0.5 * squares + delta * beyond - 0.5 * delta**2 * (1 - inside)


@rule(aten.cross_entropy_loss)
def _cross_entropy(
    call: Call,
    x: Any,
    target: Any,
    weight: Any = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Random:
    """The Hessian at the logits is that of log-sum-exp times the label's whole weight.

    At equal logits every log-probability is ``-log C``, so there the loss over ``log C`` is that weight: class weights,
    soft labels, smoothing and ignored positions need no formula of their own.
    """
    if not isinstance(x, Random) or isinstance(target, Random):
        raise Ended("a random target")
    classes = 1 if x.mean.dim() > 1 else 0
    options: Any = (weight, ignore_index, label_smoothing)
    loss = _ce(x.mean, target, options, reduction)
    flat = torch.zeros_like(x.mean)
    label = _ce(flat, target, options, 0) / max(math.log(x.shape[classes]), 1e-30)  # of one class nothing is random
    p, v = torch.softmax(x.mean, classes), x.variance
    known = x.cov is not None and classes == x.mean.dim() - 1
    if known:
        assert x.cov is not None
        quadratic = (p * v).sum(-1) - (p.unsqueeze(-2) @ x.cov @ p.unsqueeze(-1)).squeeze(-1).squeeze(-1)
    else:
        quadratic = (p * (1 - p) * v).sum(classes)
    extra = 0.5 * label * quadratic.reshape(label.shape)
    if reduction:
        extra = extra.sum()
        if reduction == 1:
            extra = extra * (_ce(flat, target, options, 1) / _ce(flat, target, options, 2))
    note = merged(call.note(SECOND), call.dropped("logits", frozenset() if known else x.dependent(classes)))
    return derived([x], loss + extra, None, mean_note=note, mean_uses_var=True)


def _ce(x: Tensor, target: Tensor, options: Any, reduction: int) -> Tensor:
    weight, ignore_index, smoothing = options
    return F.cross_entropy(
        x, target, weight, ignore_index=ignore_index, reduction=_REDUCTIONS[reduction], label_smoothing=smoothing
    )


@rule(aten.binary_cross_entropy_with_logits)
def _bce_with_logits(
    call: Call, x: Any, target: Any, weight: Any = None, pos_weight: Any = None, reduction: int = 1
) -> Random:
    if not isinstance(x, Random) or isinstance(target, Random):
        raise Ended("a random target")
    loss = F.binary_cross_entropy_with_logits(x.mean, target, weight, reduction="none", pos_weight=pos_weight)
    p = torch.sigmoid(x.mean)
    factor = 1.0 if weight is None else weight
    if pos_weight is not None:
        factor = factor * (1 + (pos_weight - 1) * target)
    return _elementwise_loss(call, x, loss + 0.5 * factor * p * (1 - p) * x.variance, reduction, call.note(SECOND))


@rule(aten.binary_cross_entropy)
def _bce(call: Call, x: Any, target: Any, weight: Any = None, reduction: int = 1) -> Random:
    if not isinstance(x, Random) or isinstance(target, Random):
        raise Ended("a random target")
    loss = F.binary_cross_entropy(x.mean, target, weight, reduction="none")
    bend = target / x.mean.square() + (1 - target) / (1 - x.mean).square()
    bend = bend if weight is None else bend * weight
    return _elementwise_loss(call, x, loss + 0.5 * bend * x.variance, reduction, call.note(SECOND))


@rule(aten.nll_loss, aten.nll_loss_nd, aten.nll_loss2d, aten.kl_div)
def _linear_loss(call: Call, x: Any, target: Any, *args: Any, **kwargs: Any) -> Random:
    """Losses linear in the input: the mean passes exactly."""
    if not isinstance(x, Random) or isinstance(target, Random):
        raise Ended("a random target")
    return derived([x], getattr(aten, call.op)(x.mean, target, *args, **kwargs), None)
