"""Affine and bilinear rules against every outcome of a few two-point variables."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lotion_fx.passes.moments.interpret import EndedAt
from tests.passes.moments.outcomes import (
    C2,
    C3,
    C3P,
    C4,
    COLUMN,
    IMAGE,
    KERNEL,
    M22,
    M23,
    SIGNAL,
    STACK,
    TALL,
    THREE,
    B,
    Function,
    W,
    X,
    all_outcomes,
    double,
    moments,
)

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


def test_noise_that_enters_by_two_ways_is_independent_along_no_dimension():
    out, _ = moments(lambda w: w + w.roll(1, 0), W)
    assert out.dependent(0) == {"0"} and out.dependent(1) == {"0"}
