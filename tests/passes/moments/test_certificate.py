"""What a certificate says, and which op ends a stream."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lotion_fx import private
from lotion_fx.passes.moments import random_tensor
from lotion_fx.passes.moments.certificate import analyse
from lotion_fx.passes.moments.interpret import interpret
from lotion_fx.passes.moments.random_tensor import Random
from tests.passes.moments.outcomes import (
    LABELS,
    Function,
    W,
    X,
    double,
)


def certify(function: Function, *weights: Tensor, diagonal: bool = False) -> tuple[dict[str, str], dict[str, str]]:
    gm = private.trace(lambda *args: [function(*args)], weights)
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

    gm = private.trace(loss_and_metric, [W])
    found = analyse(gm, [random_tensor.weight("w", W, torch.full_like(W, 0.01))], [0])
    assert set(found.certificates) == {"w"} and not found.ended
    out = interpret(gm, [random_tensor.weight("w", W, torch.full_like(W, 0.01))]).outputs
    assert isinstance(out[0], Random) and torch.equal(out[1], loss_and_metric(W)[1])


def test_a_scalar_that_the_noise_does_not_reach_is_no_loss_of_its():
    gm = private.trace(lambda w, t: [t.exp(), F.linear(X, w)], [W, torch.tensor(1.0)])
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
