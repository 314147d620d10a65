"""The rules of `passes.moments`: affine ones against every outcome of a few two-point variables, smooth ones against
the derivatives that autograd finds, those for a Gaussian against numerical integration; what a certificate says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lotion_fx import variants as backend
from lotion_fx.passes.moments import random_tensor
from lotion_fx.passes.moments.certificate import analyse
from lotion_fx.passes.moments.interpret import EndedAt, interpret
from lotion_fx.passes.moments.random_tensor import Random

# torch.func's own, at the first call of jacfwd
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

Function = Callable[..., Tensor]


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(function: Function, *inputs: Tensor, spread: float = 0.3) -> tuple[Random, list[Tensor]]:
    """What the rules say of a function whose inputs are independent, with their standard deviations."""
    deviations = [spread * (0.5 + torch.rand_like(x)) for x in inputs]
    gm = backend.trace(lambda *args: [function(*args)], inputs)
    values = [
        random_tensor.weight(str(i), x, d.square()) for i, (x, d) in enumerate(zip(inputs, deviations, strict=True))
    ]
    out = interpret(gm, values).outputs[0]
    assert isinstance(out, Random)
    return out, deviations


def all_outcomes(function: Function, inputs: tuple[Tensor, ...], deviations: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance over every outcome of variables that are x - d or x + d, each with probability 1/2."""
    x, d = (torch.cat([t.flatten() for t in group]) for group in (inputs, deviations))
    assert len(x) <= 12
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(x))), dtype=x.dtype)

    def at(flat: Tensor) -> Tensor:
        parts = flat.split([t.numel() for t in inputs])
        return function(*(part.view(t.shape) for part, t in zip(parts, inputs, strict=True)))

    values = torch.stack([at(x + sign * d) for sign in signs])
    return values.mean(0), values.var(0, correction=0)


X, W, B = double(2, 3), double(2, 3, seed=1), double(2, seed=2)
IMAGE, KERNEL = double(2, 2, 4, 4), double(2, 1, 2, 2, seed=1)
COLUMN = double(3, 1, seed=5)
# Constants are made here: drawn inside a traced function they would be drawn again.
C2, C3, C4, C5, C6, M22, M23, M55 = (
    double(*shape, seed=7) for shape in ((2,), (3,), (4,), (5,), (6,), (2, 2), (2, 3), (5, 5))
)
TALL, STACK = double(40, 2, seed=7), double(2, 2, 4, seed=7)
C3P, SIGNAL, THREE = C3.square() + 0.5, double(1, 2, 5), torch.tensor(3.0, dtype=torch.float64)

EXACT: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "linear, random weight": (lambda w, b: F.linear(X, w, b), (W, B)),
    "linear, random input": (lambda x: F.linear(x, W, B), (X,)),
    "linear, both random": (lambda x, w: F.linear(x, w), (X[:1], W)),
    "linear of a linear": (lambda x, w: F.linear(F.linear(x, W), w), (X[:1], double(2, 2, seed=3))),
    "conv2d, grouped": (lambda w: F.conv2d(IMAGE, w, C2, stride=2, groups=2), (KERNEL,)),
    "conv_transpose2d": (lambda w: F.conv_transpose2d(IMAGE, w, stride=2), (double(2, 1, 2, 2, seed=1),)),
    "conv1d": (lambda w: F.conv1d(SIGNAL, w, padding=1), (double(2, 2, 3, seed=1),)),
    "embedding": (lambda w: F.embedding(torch.tensor([[0, 2], [2, 1]]), w), (double(3, 2),)),
    "matmul, left": (lambda a: a @ COLUMN, (X,)),
    "matmul, both": (lambda a, b: a @ b, (X, double(3, 2, seed=3))),
    "bmm": (lambda a, b: torch.bmm(a, b), (double(2, 1, 2), double(2, 2, 1, seed=1))),
    "vector": (lambda v: W @ v, (double(3),)),
    "addmm": (lambda b, a: torch.addmm(b, a, W.t(), alpha=2, beta=3), (double(2, 2, seed=3), X)),
    "sum of two": (lambda a, b: torch.sub(a, b, alpha=2), (X, double(3, seed=3))),
    "constant minus": (lambda a: 1 - a, (X,)),
    "scale": (lambda a: a * C3 / 3, (X,)),
    "product of two": (lambda a, b: a * b, (X, double(2, 1, seed=3))),
    "mean": (lambda a: a.mean(-1, keepdim=True), (X,)),
    "mean of rows, scaled": (lambda a: (a * C3).sum(0), (X,)),
    "sum of correlated units": (lambda a: F.linear(a, W).sum(-1), (X,)),
    "average pooling": (lambda a: F.avg_pool2d(a[None], 2), (double(1, 2, 4),)),
    "views": (lambda a: a.t().reshape(1, 6).unflatten(1, (2, 3)).squeeze(0).unsqueeze(1).transpose(0, 2), (X,)),
    "selections": (lambda a: torch.cat([a[:, 1:], a.flip(1)[:, :1], a.unbind(0)[1].expand(2, 3)], 1), (X,)),
    "masks": (lambda a: torch.where(M23 > 0, a, THREE).masked_fill(M23 < -1, 2.0).tril(), (X,)),
    "padding": (lambda a: F.pad(a, (1, 2), value=5.0), (X,)),
    "batch norm": (
        lambda x: F.batch_norm(x, C3, C3P, C3 + 1, C3 - 1),
        (X,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_affine_and_bilinear_rules_are_exact(name):
    function, inputs = EXACT[name]
    out, deviations = moments(function, *inputs)
    mean, var = all_outcomes(function, inputs, deviations)
    torch.testing.assert_close(out.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.var, var, rtol=1e-11, atol=1e-12)
    assert not out.all_notes
    assert out.var is not None and out.var.shape == out.mean.shape


def in_place_behind_an_alias(w: Tensor) -> Tensor:
    h = F.linear(X, w)
    a = F.dropout(h, 0.5, False)
    h.mul_(2)
    return a


# Dependences that are easily missed: a weight's own, those of the last two dimensions swapped, of unusual shapes.
DEPENDENT: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "kernel repeated": (lambda w: F.conv1d(SIGNAL, w.expand(2, 2, 3)), (double(2, 1, 3),)),
    "kernel flipped": (lambda w: F.conv1d(SIGNAL, torch.cat([w, w.flip(-1)], -1)), (double(2, 2, 2),)),
    "kernel, a product": (lambda a, b: F.conv1d(SIGNAL, (a @ b).view(2, 2, 2)), (double(2, 1), double(1, 4, seed=1))),
    "transposed, repeated": (
        lambda w: F.conv_transpose1d(SIGNAL, w.expand(2, 1, 3), groups=2).sum(1),
        (double(1, 1, 3),),
    ),
    "transposed, channels repeated": (
        lambda w: F.conv_transpose1d(SIGNAL, w.expand(2, 2, 3)).sum(1),
        (double(2, 1, 3),),
    ),
    "wide, dependent weight": (lambda a, w: F.linear(a, TALL @ w @ M22), (double(1, 2), M22)),
    "stack by vector": (lambda w: ((w.expand(2, 2, 4) * STACK) @ C4).sum(0), (double(2, 4),)),
    "pooling, unbatched": (lambda x: F.avg_pool2d(x, 2, 1).sum((1, 2)), (double(1, 3, 3),)),
    "pooling, adaptive": (lambda x: F.adaptive_avg_pool1d(x, 2), (double(2, 4),)),
    "pooling, uneven": (lambda x: F.avg_pool1d(x, 2, 2, ceil_mode=True), (double(1, 2, 5),)),
    "pooling, divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), (double(1, 1, 2, 4),)),
    "cast": (lambda w: (w.long() * X).sum(-1), (W,)),
    "in place behind an alias": (in_place_behind_an_alias, (W,)),
    "low rank": (lambda b, a: F.linear(X, b @ a), (double(2, 1), double(1, 3, seed=1))),
    "rows repeated": (lambda w: w[torch.tensor([0, 0, 1])].sum(0), (W,)),
    "rolled and added": (lambda w: w + w.roll(1, 0), (W,)),
}  # fmt: skip


@pytest.mark.parametrize("name", DEPENDENT)
def test_a_missed_dependence_would_show(name):
    """The mean of the squares is that of all outcomes, or a note says that it is not, or the stream has ended."""
    function, inputs = DEPENDENT[name]

    def loss(*args: Tensor) -> Tensor:
        return function(*args).square().mean()

    torch.manual_seed(0)
    try:
        out, deviations = moments(loss, *inputs)
    except EndedAt:
        return
    exact = torch.isclose(out.mean, all_outcomes(loss, inputs, deviations)[0], rtol=1e-10)
    assert exact or out.mean_notes


def twice(op: Function) -> Function:
    """The sum of a product whose factors are one weight's."""
    return lambda w: op(F.linear(X, w), F.linear(X.sin(), w)).sum()


SHARED: dict[str, Function] = {
    "mul": twice(torch.mul),
    "mul, broadcast": twice(lambda a, b: a * b[:1]),
    "matmul": twice(torch.matmul),
    "bmm": twice(lambda a, b: torch.bmm(a[None], b[None])),
    "linear": twice(F.linear),
    "conv1d": twice(lambda a, b: F.conv1d(a[None], b[None])),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_product_s_mean_is_not_called_exact_where_its_factors_share_noise(name):
    """Its loss is linear in the product, so that nothing but the product's own mean can leave a note."""
    out, deviations = moments(SHARED[name], W)
    assert not torch.isclose(out.mean, all_outcomes(SHARED[name], (W,), deviations)[0], rtol=1e-3)
    assert any("covariance between factors dropped" in str(note) for note in out.mean_notes)


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


LOGITS, LABELS = double(4, 5), torch.tensor([1, 0, -100, 4])
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
    gm = backend.trace(lambda x: [F.relu(x)], [torch.zeros(1, 3)])
    out = interpret(gm, [random_tensor.weight("x", mean, var)]).outputs[0]
    assert out.mean.tolist() == [[pytest.approx(0, abs=1e-12), 0.0, 3.0]]
    grads = torch.autograd.grad(out.mean.sum() + out.var.sum(), [mean, var])
    assert all(grad.isfinite().all() for grad in grads)


def test_noise_that_enters_by_two_ways_is_independent_along_no_dimension():
    out, _ = moments(lambda w: w + w.roll(1, 0), W)
    assert out.dependent(0) == {"0"} and out.dependent(1) == {"0"}


# ---------------------------------------------------------------------------------------------------- attention, blocks


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


# -------------------------------------------------------------------------------------------------------- certificates


def certify(function: Function, *weights: Tensor, diagonal: bool = False) -> tuple[dict[str, str], dict[str, str]]:
    gm = backend.trace(lambda *args: [function(*args)], weights)
    values = [random_tensor.weight(str(i), w, torch.full_like(w, 0.01)) for i, w in enumerate(weights)]
    found = analyse(gm, values, [0], diagonal)
    return {name: str(certificate) for name, certificate in found.certificates.items()}, dict(found.ended)


def test_a_residual_with_correlation_is_declared():
    w = double(2, 2)

    def residual(w: Tensor) -> Tensor:
        h = F.linear(X[:, :2], w)
        return (h + F.linear(h, W[:, :2])).sum()

    certificates, ended = certify(lambda w: residual(w).square(), w)
    assert certificates == {} and "covariance between summands dropped" in ended["0"]
    certificates, ended = certify(lambda w: residual(w).square(), w, diagonal=True)
    assert "second order" in certificates["0"] and "covariance between summands dropped" in certificates["0"]
    certificates, ended = certify(residual, w)  # the mean of a linear function needs no variance
    assert certificates["0"].startswith("exact") and not ended


def test_a_weight_used_twice_is_declared():
    w = double(2, 2)
    certificates, ended = certify(lambda w: F.mse_loss(F.linear(F.linear(X[:, :2], w), w), X[:, :2]), w)
    assert not certificates and "covariance between factors dropped" in ended["0"]


def test_an_op_without_a_rule_costs_the_weights_before_it_alone():
    def model(first: Tensor, second: Tensor) -> Tensor:
        return F.mse_loss(F.linear(torch.cumsum(F.linear(X, first), -1), second), X)

    certificates, ended = certify(model, double(2, 3), double(3, 2))
    assert ended == {"0": "cumsum: no rule for this op"}
    assert certificates["1"] == "second order: stream: 0 taken as fixed"


def test_dependence_of_early_layers_does_not_cost_the_last():
    """The covariance that would be dropped at the loss is the early layers' alone."""
    sizes = [3, 40, 40, 5]

    def model(*weights: Tensor) -> Tensor:
        h = X
        for w in weights:
            h = F.linear(h, w)
        return F.cross_entropy(h, torch.tensor([0, 1]))

    certificates, ended = certify(model, *(double(b, a, seed=a) for a, b in itertools.pairwise(sizes)))
    assert set(ended) == {"0"} and set(certificates) == {"1", "2"}


def test_a_metric_beside_the_loss_costs_nothing():
    def loss_and_metric(w: Tensor) -> list[Tensor]:
        logits = F.linear(X, w)
        return [F.cross_entropy(logits, LABELS[:2]), (logits.argmax(-1) == LABELS[:2]).double().mean()]

    gm = backend.trace(loss_and_metric, [W])
    found = analyse(gm, [random_tensor.weight("w", W, torch.full_like(W, 0.01))], [0])
    assert set(found.certificates) == {"w"} and not found.ended
    out = interpret(gm, [random_tensor.weight("w", W, torch.full_like(W, 0.01))]).outputs
    assert isinstance(out[0], Random) and torch.equal(out[1], loss_and_metric(W)[1])


def test_a_scalar_that_the_noise_does_not_reach_is_no_loss_of_its():
    gm = backend.trace(lambda w, t: [t.exp(), F.linear(X, w)], [W, torch.tensor(1.0)])
    found = analyse(gm, [random_tensor.weight("w", W, torch.full_like(W, 0.01)), torch.tensor(1.0)], [0])
    assert not found.certificates and found.ended == {"w": "it does not reach the loss"}


def test_changes_in_place_are_followed_or_end_the_stream():
    def fresh(w: Tensor) -> Tensor:
        return F.mse_loss(F.relu(F.linear(X, w), inplace=True), X[:, :2])

    assert certify(fresh, W)[0]["0"].startswith("second order: relu: Gaussian")

    def viewed(w: Tensor) -> Tensor:
        h = F.linear(X, w)
        part = h.view(-1)
        h.mul_(2)
        return part.square().sum()

    assert "no rule" in certify(viewed, W)[1]["0"]


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda w: F.batch_norm(F.linear(X, w), None, None, training=True).square().mean(), "batch statistics"),
        (lambda w: torch.where(w > 0, w, -w).sum(), "gt: no rule"),
        (lambda w: (w ** W).sum(), "exponent"),
        (lambda w: F.adaptive_avg_pool2d(w[None, None], (1, 2)).square().sum(), "unequal"),
    ],
)  # fmt: skip
def test_what_a_rule_cannot_do_is_said(function, reason):
    certificates, ended = certify(function, W)
    assert not certificates and reason in ended["0"]
