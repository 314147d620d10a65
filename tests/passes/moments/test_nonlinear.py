"""Smooth rules and losses against the derivatives that autograd finds, squares against every outcome, rules for a
Gaussian against numerical integration; attention against its parts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lotion_fx import private
from lotion_fx.passes.moments import random_tensor
from lotion_fx.passes.moments.interpret import interpret
from tests.passes.moments.outcomes import (
    C4,
    C6,
    LABELS,
    LOGITS,
    M22,
    M55,
    Function,
    W,
    X,
    all_outcomes,
    double,
    moments,
)

# torch.func's own, at the first call of jacfwd
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


SQUARES: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "square": (lambda x: x**2, (X,)),
    "square, as a product": (lambda x: x * x, (X,)),
    "mse": (lambda x: F.mse_loss(x, W), (X,)),
    "mse, target random": (lambda x, y: F.mse_loss(x, y, reduction="sum"), (X, W)),
    "mse of a linear": (lambda x: F.mse_loss(F.linear(x, W), M22), (X,)),
}


@pytest.mark.parametrize("name", SQUARES)
def test_the_mean_of_a_square_is_exact(name):
    function, inputs = SQUARES[name]
    out, deviations = moments(function, *inputs)
    torch.testing.assert_close(out.mean, all_outcomes(function, inputs, deviations)[0], rtol=1e-12, atol=1e-12)
    assert not out.mean_notes


SOFT = torch.softmax(double(4, 5, seed=3), 1)
ROWS = double(2, 6)
SMOOTH: dict[str, tuple[Function, Tensor]] = {
    "gelu": (F.gelu, X),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), X),
    "silu": (F.silu, X),
    "mish": (F.mish, X),
    "tanh": (torch.tanh, X),
    "sigmoid": (torch.sigmoid, X),
    "logsigmoid": (F.logsigmoid, X),
    "softplus": (lambda x: F.softplus(x, beta=2.0), X),
    "exp": (torch.exp, X),
    "sin": (torch.sin, X),
    "cos": (torch.cos, X),
    "log": (torch.log, X.abs() + 1),
    "sqrt": (torch.sqrt, X.abs() + 1),
    "rsqrt": (torch.rsqrt, X.abs() + 1),
    "reciprocal": (lambda x: 2 / x, X.abs() + 1),
    "cube": (lambda x: x**3, X),
    "power": (lambda x: x**1.5, X.abs() + 1),
    "softmax": (lambda x: torch.softmax(x, -1), X),
    "softmax, other dimension": (lambda x: torch.softmax(x, 0), X),
    "log_softmax": (lambda x: torch.log_softmax(x, -1), X),
    "layer_norm": (lambda x: F.layer_norm(x, (6,), C6, C6 + 1), ROWS),
    "layer_norm over two": (lambda x: F.layer_norm(x, (2, 6)), ROWS),
    "rms_norm": (lambda x: F.rms_norm(x, (6,), C6), ROWS),
    "group_norm": (lambda x: F.group_norm(x, 2, C4, C4 + 1), double(2, 4, 3)),
}
SMOOTH_LOSSES: dict[str, tuple[Function, Tensor]] = {
    "cross-entropy": (lambda x: F.cross_entropy(x, LABELS), LOGITS),
    "cross-entropy, weights": (lambda x: F.cross_entropy(x, LABELS, weight=SOFT[0]), LOGITS),
    "cross-entropy, smoothing": (lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.2, weight=SOFT[0]), LOGITS),
    "cross-entropy, sum": (lambda x: F.cross_entropy(x, LABELS, reduction="sum"), LOGITS),
    "cross-entropy, soft": (lambda x: F.cross_entropy(x, SOFT), LOGITS),
    "cross-entropy, images": (lambda x: F.cross_entropy(x, LABELS[:4].view(2, 2).clamp(0, 1)), double(2, 2, 2)),
    "cross-entropy, correlated": (lambda x: F.cross_entropy(F.linear(x, M55), LABELS), LOGITS),
    "nll": (lambda x: F.nll_loss(torch.log_softmax(x, -1), LABELS), LOGITS),
    "kl": (lambda x: F.kl_div(torch.log_softmax(x, -1), SOFT, reduction="batchmean"), LOGITS),
    "bce": (lambda x: F.binary_cross_entropy(torch.sigmoid(x) * 1.0, SOFT), LOGITS),
    "bce with logits": (
        lambda x: F.binary_cross_entropy_with_logits(x, SOFT, weight=SOFT[:1] + 1, pos_weight=SOFT[1] + 2),
        LOGITS,
    ),
}


def expansion(function: Function, x: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """``f + 1/2 sum_j v_j d2f/dx_j2`` and ``sum_j v_j (df/dx_j)^2``, by autograd."""
    jacobian = torch.func.jacrev(function)(x).flatten(-x.dim())
    hessian = torch.func.jacfwd(torch.func.jacrev(function))(x)
    curved = hessian.flatten(-x.dim()).flatten(-1 - x.dim(), -2).diagonal(dim1=-2, dim2=-1)
    v = var.flatten()
    return function(x) + 0.5 * (curved * v).sum(-1), (jacobian.square() * v).sum(-1)


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_rules_are_the_second_order_expansion(name):
    function, x = SMOOTH[name]
    out, (deviation,) = moments(function, x)
    mean, var = expansion(function, x, deviation.square())
    torch.testing.assert_close(out.mean, mean, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(out.var, var, rtol=1e-9, atol=1e-11)
    assert "second order" in str(out.mean_notes[0])


@pytest.mark.parametrize("name", SMOOTH_LOSSES)
def test_smooth_losses_are_the_second_order_expansion(name):
    function, x = SMOOTH_LOSSES[name]
    spread = 1e-3  # so that what sigmoid and log leave to fourth order when chained is below the tolerance
    out, (deviation,) = moments(function, x, spread=spread)
    mean, _ = expansion(function, x, deviation.square())
    torch.testing.assert_close(out.mean - function(x), mean - function(x), rtol=2e-5, atol=1e-13)


@pytest.mark.parametrize("size", [0.02, 0.01])
def test_the_second_order_s_error_is_of_the_fourth(size):
    """Against every outcome: what halving the noise leaves of the error."""
    x = double(3)
    errors = []
    for spread in (size, size / 2):
        torch.manual_seed(0)
        out, deviations = moments(lambda x: torch.softmax(x, -1), x, spread=spread)
        errors.append((out.mean - all_outcomes(lambda x: torch.softmax(x, -1), (x,), deviations)[0]).norm().item())
    assert 14 < errors[0] / errors[1] < 18


GAUSSIAN: dict[str, tuple[Function, Tensor]] = {
    "relu": (F.relu, X),
    "leaky relu": (lambda x: F.leaky_relu(x, 0.1), X),
    "abs": (torch.abs, X),
}
GAUSSIAN_LOSSES: dict[str, tuple[Function, Tensor]] = {
    "l1": (lambda x: F.l1_loss(x, W, reduction="none"), X),
    "huber": (lambda x: F.huber_loss(x, W, reduction="none", delta=0.7), X),
    "smooth l1": (lambda x: F.smooth_l1_loss(x, W, reduction="none", beta=0.7), X),
}


def integrated(function: Function, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of an elementwise function of Gaussians, by the midpoint rule over nine deviations."""
    z = torch.linspace(-9, 9, 200001, dtype=torch.float64)
    z = (z[1:] + z[:-1]) / 2
    density = torch.exp(-z.square() / 2)
    density = density / density.sum()
    values = torch.stack([function(mean + deviation * step) for step in z[::10]])
    weights = density[::10] / density[::10].sum()
    first = (weights.view(-1, 1, 1) * values).sum(0)
    return first, (weights.view(-1, 1, 1) * values.square()).sum(0) - first.square()


@pytest.mark.parametrize("name", [*GAUSSIAN, *GAUSSIAN_LOSSES])
def test_rules_for_a_gaussian(name):
    function, x = {**GAUSSIAN, **GAUSSIAN_LOSSES}[name]
    out, (deviation,) = moments(function, x, spread=1.0)
    mean, var = integrated(function, x, deviation)
    torch.testing.assert_close(out.mean, mean, rtol=1e-6, atol=1e-6)
    if name in GAUSSIAN:
        torch.testing.assert_close(out.var, var, rtol=1e-5, atol=1e-6)
    assert "Gaussian" in str(out.mean_notes[0])


def test_a_fixed_element_has_a_finite_gradient():
    """ReLU's moments hold a square root of the variance, which is 0 at a level."""
    mean = torch.tensor([[0.0, -2.0, 3.0]], requires_grad=True)
    var = torch.zeros(1, 3, requires_grad=True)
    gm = private.trace(lambda x: [F.relu(x)], [torch.zeros(1, 3)])
    out = interpret(gm, [random_tensor.weight("x", mean, var)]).outputs[0]
    assert out.mean.tolist() == [[pytest.approx(0, abs=1e-12), 0.0, 3.0]]
    grads = torch.autograd.grad(out.mean.sum() + out.var.sum(), [mean, var])
    assert all(grad.isfinite().all() for grad in grads)


class Attention(nn.Module):
    """One head over tokens, its parts not written as one op."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        bias = torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype).masked_fill(~mask, -math.inf)
        return torch.softmax(scores + bias, -1) @ v


def test_attention_is_its_parts():
    q, k, v = (double(1, 2, 3, 2, seed=seed) for seed in range(3))
    torch.manual_seed(0)
    whole, _ = moments(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v)
    torch.manual_seed(0)
    parts, _ = moments(Attention(), q, k, v)
    torch.testing.assert_close(whole.mean, parts.mean)
    torch.testing.assert_close(whole.var, parts.var)
    assert whole.mean.isfinite().all() and whole.var.isfinite().all()


def test_a_query_that_sees_no_key_mixes_no_value():
    q, k, v = (double(1, 2, 3, 2, seed=seed) for seed in range(3))
    mask = torch.tensor([[False, False, False], [True, False, False], [True, True, True]])
    out, _ = moments(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask), q, k, v)
    assert out.mean.isfinite().all() and out.var.isfinite().all()
    assert (out.mean[..., 0, :] == 0).all() and (out.var[..., 0, :] == 0).all()


def test_attention_with_shared_heads():
    q, k, v = double(1, 4, 3, 2), double(1, 2, 3, 2, seed=1), double(1, 2, 3, 2, seed=2)
    torch.manual_seed(0)
    grouped, _ = moments(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), q, k, v)
    torch.manual_seed(0)
    repeated, _ = moments(
        lambda q, k, v: F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)), q, k, v
    )
    torch.testing.assert_close(grouped.mean, repeated.mean)
    torch.testing.assert_close(grouped.var, repeated.var)
