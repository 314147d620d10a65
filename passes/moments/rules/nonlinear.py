"""Moments through nonlinear ops: elementwise functions, softmax, norms, attention.

ReLU, leaky ReLU and the absolute value are exact for a Gaussian input. Smooth functions go to second order,

    E f(x) ~ f(m) + f''(m) v / 2        Var f(x) ~ f'(m)^2 v

with f', f'' derived by SymPy. Softmax, log-softmax and the norms, functions of a whole row, take the same expansion
with the row's diagonal variance; their derivatives are written out, and tested against automatic differentiation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from lotion_fx.passes.moments.random_tensor import Call, Ended, Random, along, derived, mean_of, merged, randoms, rule
from lotion_fx.passes.moments.rules.affine import add, matmul, mul, on_diagonal, square
from lotion_fx.passes.moments.rules.views import move

aten = torch.ops.aten
X = sympy.Symbol("x", real=True)
SECOND = "second order"
GAUSSIAN = "Gaussian"


class sigmoid(sympy.Function):
    """``1 / (1 + e^-x)``, whose derivative does not overflow as the quotient's would."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return self * (1 - self)


class softplus(sympy.Function):
    """``log(1 + e^x)``."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sigmoid(self.args[0])


_PRINTED = {"sigmoid": torch.sigmoid, "softplus": F.softplus, "erf": torch.erf, "exp": torch.exp, "tanh": torch.tanh}
_PRINTED |= {"log": torch.log, "sqrt": torch.sqrt, "sin": torch.sin, "cos": torch.cos}

FUNCTIONS: dict[str, sympy.Expr] = {
    "sigmoid": sigmoid(X),
    "silu": X * sigmoid(X),
    "tanh": sympy.tanh(X),
    "softplus": softplus(X),
    "log_sigmoid": -softplus(-X),
    "mish": X * sympy.tanh(softplus(X)),
    "exp": sympy.exp(X),
    "log": sympy.log(X),
    "sqrt": sympy.sqrt(X),
    "rsqrt": 1 / sympy.sqrt(X),
    "reciprocal": 1 / X,
    "sin": sympy.sin(X),
    "cos": sympy.cos(X),
    "gelu": X * (1 + sympy.erf(X / sympy.sqrt(2))) / 2,
    "gelu_tanh": X * (1 + sympy.tanh(sympy.sqrt(2 / sympy.pi) * (X + sympy.Float("0.044715") * X**3))) / 2,
}


@cache
def derivatives(function: sympy.Expr) -> tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]:
    """f' and f'' as functions of tensors, derived by SymPy."""
    first, second = sympy.diff(function, X), sympy.diff(function, X, 2)
    return _printed(first), _printed(second)


def _printed(expression: sympy.Expr) -> Callable[[Tensor], Any]:
    numbers = {power: power.evalf(17) for power in expression.atoms(sympy.Pow) if power.is_number}
    return sympy.lambdify(X, expression.xreplace(numbers), modules=[_PRINTED, "math"], cse=True)


def elementwise(call: Call, x: Random, function: sympy.Expr | None = None, value: Tensor | None = None) -> Random:
    """A smooth elementwise function to second order.

    Args:
        function: in the symbol `X`; by default that of the op's name.
        value: f(m), where the op itself has computed it.
    """
    function = FUNCTIONS[call.op] if function is None else function
    first, second = derivatives(function)
    value = _printed(function)(x.mean) if value is None else value
    slope, v = first(x.mean), x.variance
    cov = None
    if x.cov is not None and isinstance(slope, Tensor):
        cov = x.cov * (slope.unsqueeze(-1) * slope.unsqueeze(-2))
    note = call.note(SECOND)
    return derived(
        [x],
        value + 0.5 * second(x.mean) * v,
        slope**2 * v,
        x.independent,
        cov=cov,
        mean_note=note,
        var_note=note,
        mean_uses_var=True,
    )


_UNARY = (aten.sigmoid, aten.silu, aten.tanh, aten.mish, aten.exp, aten.log, aten.sqrt, aten.rsqrt, aten.reciprocal,
          aten.sin, aten.cos, aten.log_sigmoid)  # fmt: skip


@rule(*_UNARY)
def _unary(call: Call, x: Random) -> Random:
    return elementwise(call, x, value=getattr(aten, call.op)(x.mean))


@rule(aten.div)
def _div(call: Call, a: Any, b: Any, *, rounding_mode: Any = None) -> Random:
    if rounding_mode is not None:
        raise Ended("it rounds")
    times = call.named("mul")
    if not isinstance(b, Random):
        return mul(times, a, torch.reciprocal(b) if isinstance(b, Tensor) else 1 / b)
    return mul(times, a, elementwise(call.named("reciprocal"), b))


@rule(aten.gelu)
def _gelu(call: Call, x: Random, *, approximate: str = "none") -> Random:
    function = FUNCTIONS["gelu" if approximate == "none" else "gelu_tanh"]
    return elementwise(call, x, function, F.gelu(x.mean, approximate=approximate))


@rule(aten.softplus)
def _softplus(call: Call, x: Random, beta: Any = 1, threshold: Any = 20) -> Random:
    return elementwise(call, x, softplus(beta * X) / beta, F.softplus(x.mean, beta, threshold))


@rule(aten.pow)
def _pow(call: Call, x: Any, exponent: Any) -> Random:
    if not isinstance(x, Random) or not isinstance(exponent, (int, float)):
        raise Ended("a random or varying exponent")
    if exponent == 2:
        return square(call, x)
    power = sympy.Integer(exponent) if float(exponent).is_integer() else sympy.Float(exponent)
    return elementwise(call, x, X**power, torch.pow(x.mean, exponent))


@rule(aten.square)
def _square(call: Call, x: Random) -> Random:
    return square(call, x)


# ------------------------------------------------------------------------------------------ exact under a Gaussian


def gaussian(x: Random) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Deviation s, ``alpha = m / s``, the density and the distribution function of the standard normal there.

    The deviation has a floor far below the mean's rounding, so that a fixed element has a finite gradient.
    """
    m = x.mean
    s = torch.maximum(x.variance, 1e-14 * m.square() + 1e-30).sqrt()
    alpha = m / s
    density = torch.exp(-0.5 * alpha.square()) / math.sqrt(2 * math.pi)
    return s, alpha, density, torch.special.ndtr(alpha)


def _piecewise_linear(call: Call, x: Random, below: float) -> Random:
    """``x`` above 0 and ``below x`` under it: ReLU (0), leaky ReLU, the absolute value (-1).

    With r = relu(x): E r = m Phi + s phi, E r^2 = (m^2 + s^2) Phi + m s phi, and x = r - relu(-x).
    """
    m, v = x.mean, x.variance
    s, _, density, below_zero = gaussian(x)
    positive = m * below_zero + s * density
    negative = positive - m  # E relu(-x)
    mean = positive - below * negative
    square_positive = (m.square() + v) * below_zero + m * s * density
    square_negative = (m.square() + v) - square_positive
    var = (square_positive + below**2 * square_negative - mean.square()).clamp(min=0)
    gain = below_zero + below * (1 - below_zero)
    cov = None
    if x.cov is not None:
        cov = x.cov * gain.unsqueeze(-1) * gain.unsqueeze(-2)
        cov = on_diagonal(cov, var)
    note = call.note(GAUSSIAN)
    return derived([x], mean, var, x.independent, cov=cov, mean_note=note, var_note=note, mean_uses_var=True)


@rule(aten.relu)
def _relu(call: Call, x: Random) -> Random:
    return _piecewise_linear(call, x, 0.0)


@rule(aten.leaky_relu)
def _leaky_relu(call: Call, x: Random, slope: float = 0.01) -> Random:
    return _piecewise_linear(call, x, slope)


@rule(aten.abs)
def _abs(call: Call, x: Random) -> Random:
    return _piecewise_linear(call, x, -1.0)


# ------------------------------------------------------------------------------------------------ functions of a row


def _row(call: Call, x: Random, mean: Tensor, var: Tensor, dims: tuple[int, ...]) -> Random:
    """A function of the elements along ``dims``, which come out dependent."""
    note = merged(call.note(SECOND), call.dropped("units of a row", x.dependent(*dims)))
    inside = {dim % x.mean.dim() for dim in dims}
    return derived(
        [x], mean, var, along(x, lambda held: held - inside), mean_note=note, var_note=note, mean_uses_var=True
    )


def softmax_moments(m: Tensor, v: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """With p = softmax(m): ``p_i [1 + ((1 - 2 p_i) v_i + sum_j (2 p_j^2 - p_j) v_j) / 2]`` and
    ``p_i^2 [(1 - 2 p_i) v_i + sum_j p_j^2 v_j]``."""
    p = torch.softmax(m, dim)
    own = (1 - 2 * p) * v
    mean = p * (1 + 0.5 * (own + ((2 * p - 1) * p * v).sum(dim, keepdim=True)))
    return mean, p.square() * (own + (p.square() * v).sum(dim, keepdim=True))


def _in(x: Random, dtype: torch.dtype | None) -> Random:
    return x if dtype is None else move(Call("to", x.sources), x, dtype)


@rule(aten.softmax)
def _softmax(call: Call, x: Random, dim: int, dtype: Any = None) -> Random:
    x = _in(x, dtype)
    return _row(call, x, *softmax_moments(x.mean, x.variance, dim), (dim,))


@rule(aten.log_softmax)
def _log_softmax(call: Call, x: Random, dim: int, dtype: Any = None) -> Random:
    """``log p_i - sum_j p_j (1 - p_j) v_j / 2`` and ``(1 - 2 p_i) v_i + sum_j p_j^2 v_j``."""
    x = _in(x, dtype)
    v = x.variance
    log_p = torch.log_softmax(x.mean, dim)
    p = log_p.exp()
    mean = log_p - 0.5 * (p * (1 - p) * v).sum(dim, keepdim=True)
    return _row(call, x, mean, (1 - 2 * p) * v + (p.square() * v).sum(dim, keepdim=True), (dim,))


def normalized_moments(m: Tensor, v: Tensor, dims: tuple[int, ...], eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """Of ``u = c / s``, with ``c = m`` less its mean (``centred``) and ``s^2 = mean(c^2) + eps``, over n elements.

    With ``k = 1 / n`` if centred, else 0: ``du_i/dx_j = (d_ij - k - u_i u_j / n) / s``, and
    ``d2u_i/dx_j2 = [-2 u_j (d_ij - k - u_i u_j / n) - u_i (1 - k - u_j^2 / n)] / (n s^2)``.
    """
    n = math.prod(m.shape[dim] for dim in dims)
    k = 1 / n if centred else 0.0
    c = m - m.mean(dims, keepdim=True) if centred else m
    variance = c.square().mean(dims, keepdim=True) + eps
    u = c * variance.rsqrt()

    def total(x: Tensor) -> Tensor:
        return x.sum(dims, keepdim=True)

    v0, v1, v2 = total(v), total(v * u), total(v * u.square())
    bend = -2 * v * u + 2 * k * v1 + u * (3 * v2 / n - (1 - k) * v0)
    mean = u + bend / (2 * n * variance)
    spread = v * (1 - 2 * k - 2 * u.square() / n) + k**2 * v0 + (2 * k / n) * u * v1 + u.square() * v2 / n**2
    return mean, spread / variance


def _scale_and_shift(call: Call, y: Any, weight: Any, bias: Any = None) -> Any:
    """``y weight + bias``, any of which may be random."""
    if weight is not None:
        y = mul(call, y, weight) if randoms((y, weight)) else y * weight
    if bias is not None:
        y = add(call.named("add"), y, bias) if randoms((y, bias)) else y + bias
    return y


@rule(aten.layer_norm)
def _layer_norm(
    call: Call, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    y = _normalized(call, x, shape, eps, True) if isinstance(x, Random) else F.layer_norm(x, shape, None, None, eps)
    return _scale_and_shift(call, y, weight, bias)


@rule(aten.rms_norm)
def _rms_norm(call: Call, x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    eps = torch.finfo(mean_of(x).dtype).eps if eps is None else eps
    y = _normalized(call, x, shape, eps, False) if isinstance(x, Random) else F.rms_norm(x, shape, None, eps)
    return _scale_and_shift(call, y, weight)


def _normalized(call: Call, x: Random, shape: Any, eps: float, centred: bool) -> Random:
    last = tuple(range(-len(shape), 0))
    return _row(call, x, *normalized_moments(x.mean, x.variance, last, eps, centred), last)


@rule(aten.group_norm)
def _group_norm(
    call: Call, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Random:
    if not isinstance(x, Random) or randoms((weight, bias)):
        raise Ended("a random scale")
    split = (x.shape[0], groups, -1)
    mean, var = normalized_moments(x.mean.reshape(split), x.variance.reshape(split), (-1,), eps, True)
    y = _row(call, x, mean.reshape(x.shape), var.reshape(x.shape), tuple(range(1, x.mean.dim())))
    column = (-1, *[1] * (x.mean.dim() - 2))
    return _scale_and_shift(call, y, *(None if t is None else t.reshape(column) for t in (weight, bias)))


@rule(aten.batch_norm)
def _batch_norm(
    call: Call, x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, _m: float, eps: float, _c: bool
) -> Random:
    """With running statistics a fixed scale and shift, hence exact; batch statistics end the stream."""
    if not isinstance(x, Random) or randoms((weight, bias)):
        raise Ended("a random scale")
    if training:
        raise Ended("batch statistics of a random input")
    column = (-1, *[1] * (x.mean.dim() - 2))
    scale = torch.rsqrt(var + eps) * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    return _scale_and_shift(call, x, scale.reshape(column), shift.reshape(column))


@rule(aten.scaled_dot_product_attention)
def _attention(
    call: Call,
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Random:
    """Scores, softmax and the mix of values, each by its own rule."""
    if dropout_p:
        raise Ended("its dropout is inside")
    if isinstance(mask, Random):
        raise Ended("a random mask")
    if enable_gqa:
        k, v = (_repeat_heads(t, q.shape[-3] // t.shape[-3]) for t in (k, v))
    scale = scale if scale is not None else 1 / math.sqrt(q.shape[-1])
    named = {op: Call(f"{call.op}.{op}", call.sources) for op in ("scores", "softmax", "values")}
    q = mul(named["scores"], q, scale) if isinstance(q, Random) else q * scale
    scores = _product(named["scores"], q, _transposed(k))
    if is_causal:
        length, past = q.shape[-2], k.shape[-2]
        mask = torch.ones(length, past, dtype=torch.bool, device=mean_of(q).device).tril()
    seen = None
    if mask is not None and mask.dtype == torch.bool:
        seen = mask.any(-1, keepdim=True)  # a query that sees no key mixes no value
        mask = torch.zeros_like(mask, dtype=mean_of(q).dtype).masked_fill(~mask & seen, -math.inf)
    if mask is not None:
        scores = add(call.named("add"), scores, mask) if isinstance(scores, Random) else scores + mask
    weights = _softmax(named["softmax"], scores, -1) if isinstance(scores, Random) else torch.softmax(scores, -1)
    if seen is not None:
        weights = _scale_and_shift(call, weights, seen.to(mean_of(weights).dtype))
    return _product(named["values"], weights, v)


def _product(call: Call, a: Any, b: Any) -> Any:
    return matmul(call, a, b) if randoms((a, b)) else torch.matmul(a, b)


def _transposed(k: Any) -> Any:
    return move(Call("transpose", k.sources), k, -2, -1) if isinstance(k, Random) else k.transpose(-2, -1)


def _repeat_heads(t: Any, times: int) -> Any:
    if not isinstance(t, Random):
        return t.repeat_interleave(times, -3)
    heads = t.mean.dim() - 3
    mean, var = (moment.repeat_interleave(times, -3) for moment in (t.mean, t.variance))
    return replace(t, mean=mean, var=var, independent=along(t, lambda held: held - {heads}), cov=None)
