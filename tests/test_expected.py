"""`expected_loss` and `calibrate` against the sum over all roundings, and the properties that theory promises."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lotion_fx
from lotion_fx import rounding
from tests.enumeration import expectation, two_points

FORMATS = ["int4/tensor", "int3/tensor", "int2/channel", "int4/2", "fp4/tensor", "fp4/4", "mxfp4", "nf4/tensor"]


def affine(sizes: list[int], bias: bool, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(sizes))).double()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.dim() == 2}


def enumerated(model: nn.Module, x: Tensor, y: Tensor, fmt: str, loss_fn=F.mse_loss) -> Tensor:
    weights = weights_of(model)
    fixed = {name: p for name, p in model.named_parameters() if name not in weights}

    def loss(values: list[Tensor]) -> Tensor:
        parameters = {**fixed, **dict(zip(weights, values, strict=True))}
        return loss_fn(torch.func.functional_call(model, parameters, (x,)), y)

    return expectation(loss, list(weights.values()), lotion_fx.resolve(fmt))


def away_from_ties(model: nn.Module, fmt: str) -> bool:
    """Whether no weight but each block's largest lies at a level, and each block has one largest."""
    form = lotion_fx.resolve(fmt)
    for w in weights_of(model).values():
        blocks = rounding.to_blocks(w.detach(), form)
        z = blocks / rounding.scale(w.detach(), form)
        lo, hi = form.grid.neighbours(z)
        near = torch.minimum((z - lo).abs(), (hi - z).abs()) < 1e-3
        if (near & (blocks.abs() < blocks.abs().amax(-1, keepdim=True))).any() or (blocks == 0).all(-1).any():
            return False
    return True


@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    fmt=st.sampled_from(FORMATS),
    bias=st.booleans(),
    batch=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=200, deadline=None)
def test_it_is_the_sum_over_all_roundings(sizes, fmt, bias, batch, seed):
    assume(sum(a * b for a, b in itertools.pairwise(sizes)) <= 14)
    model = affine(sizes, bias, seed)
    x, y = torch.randn(batch, sizes[0]).double(), torch.randn(batch, sizes[-1]).double()
    lotion_fx.transform(model, fmt, inner="eager")
    result = lotion_fx.expected_loss(model, (x, y), F.mse_loss)
    expected = enumerated(model, x, y, fmt)
    assert {certificate.kind for certificate in result.certificates.values()} == {"exact"}
    assert math.isclose(result.total.item(), expected.item(), rel_tol=1e-10)
    assert math.isclose(sum(map(float, result.terms.values())) + result.loss.item(), expected.item(), rel_tol=1e-10)
    assume(away_from_ties(model, fmt))
    parameters = list(model.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(result.total, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [1, 2, 1, 2, 1, 2]])
def test_narrow_stacks_of_any_depth_are_exact(sizes):
    """Their covariance is propagated."""
    model = affine(sizes, True, 0)
    x, y = torch.randn(3, sizes[0]).double(), torch.randn(3, sizes[-1]).double()
    lotion_fx.transform(model, "int3/tensor", inner="eager")
    result = lotion_fx.expected_loss(model, (x, y), F.mse_loss)
    assert {certificate.kind for certificate in result.certificates.values()} == {"exact"}
    assert math.isclose(result.total.item(), enumerated(model, x, y, "int3/tensor").item(), rel_tol=1e-10)


def test_a_wide_stack_of_three_is_not_called_exact():
    model = affine([2, 40, 40, 2], True, 0)
    lotion_fx.transform(model, "int4", inner="eager")
    batch = torch.randn(3, 2).double(), torch.randn(3, 2).double()
    for moments in ("closed", "diagonal"):
        result = lotion_fx.expected_loss(model, batch, F.mse_loss, moments=moments)
        assert "exact" not in {certificate.kind for certificate in result.certificates.values()}
    assert "covariance between summed units dropped" in str(result.certificates["0.weight"])


def test_a_nonlinear_network_is_second_order_and_close():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    x, y = torch.randn(5, 3).double(), torch.randint(3, (5,))
    lotion_fx.transform(model, "int8/tensor", inner="eager")
    result = lotion_fx.expected_loss(model, (x, y), F.cross_entropy)
    expected = enumerated(model, x, y, "int8/tensor", F.cross_entropy)
    assert {certificate.kind for certificate in result.certificates.values()} == {"second order"}
    error, increase = abs(result.total - expected).item(), (expected - result.loss).item()
    assert error < 0.02 * increase


# --------------------------------------------------------------------------------------------------------- properties

networks = st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from(FORMATS), st.integers(0, 2**16))


def one_layer(network) -> tuple[nn.Module, tuple[Tensor, Tensor], str]:
    inputs, outputs, fmt, seed = network
    model = affine([inputs, outputs], True, seed)
    return model, (torch.randn(4, inputs).double(), torch.randn(4, outputs).double()), fmt


@given(networks)
@settings(max_examples=25, deadline=None)
def test_never_below_the_best_quantized_point(network):
    model, (x, y), fmt = one_layer(network)
    form, w = lotion_fx.resolve(fmt), model[0].weight
    lotion_fx.transform(model, fmt, inner="eager")
    total = lotion_fx.expected_loss(model, (x, y), F.mse_loss).total.item()
    # The probabilities are at least 0 and add up to 1, so one of the roundings is no higher.
    best = min(
        F.mse_loss(F.linear(x, q.view(w.shape), model[0].bias), y).item() for q in all_roundings(w.detach(), form)
    )
    assert total >= best - 1e-12


def all_roundings(w: Tensor, form: lotion_fx.Format) -> list[Tensor]:
    low, high, _ = two_points(w, form)
    bits = itertools.product([False, True], repeat=w.numel())
    return [torch.where(torch.tensor(choice), high, low) for choice in bits]


@given(networks)
@settings(max_examples=25, deadline=None)
def test_equal_to_the_loss_at_a_quantized_point(network):
    model, batch, fmt = one_layer(network)
    form, w = lotion_fx.resolve(fmt), model[0].weight
    with torch.no_grad():
        w.copy_(rounding.rtn(w, form))
    assume(bool((rounding.rtn(w, form) == w).all()) and bool((rounding.variance(w, form) == 0).all()))
    lotion_fx.transform(model, fmt, inner="eager")
    result = lotion_fx.expected_loss(model, batch, F.mse_loss)
    assert result.total.item() == result.loss.item()


@given(networks)
@settings(max_examples=25, deadline=None)
def test_continuous_across_a_threshold(network):
    """Where round-to-nearest jumps, and at a level, the expected loss moves as little as the weight."""
    model, batch, fmt = one_layer(network)
    form, w = lotion_fx.resolve(fmt), model[0].weight
    assume(w.numel() > 1)
    s = rounding.scale(w.detach(), form).amax().item()
    small = w.detach().abs().flatten().argmin().item()
    lotion_fx.transform(model, fmt, inner="eager")
    for level in (0.5 * form.grid.levels[len(form.grid.levels) // 2 + 1], 0.0):
        totals = []
        for step in (-1e-7, 1e-7):
            with torch.no_grad():
                w.view(-1)[small] = (level + step) * s
            totals.append(lotion_fx.expected_loss(model, batch, F.mse_loss).total.item())
        assert abs(totals[0] - totals[1]) < 1e-4 * (1 + abs(totals[0]))


@given(networks)
@settings(max_examples=25, deadline=None)
def test_its_slope_is_the_secant_between_the_roundings(network):
    """In one weight, the scale held: ``(E L(hi) - E L(lo)) / (hi - lo)``."""
    model, (x, y), fmt = one_layer(network)
    form, w = lotion_fx.resolve(fmt), model[0].weight
    assume(w.numel() > 1 and away_from_ties(model, fmt))
    s = rounding.scale(w.detach(), form)
    blocks = rounding.to_blocks(w.detach(), form)
    lo, hi = form.grid.neighbours(blocks / s)
    inner = rounding.from_blocks((hi > lo) & (blocks.abs() < blocks.abs().amax(-1, keepdim=True)), form, -1, w.shape)
    assume(bool(inner.any()))
    at = int(inner.flatten().nonzero()[0])
    lotion_fx.transform(model, fmt, inner="eager")
    total = lotion_fx.expected_loss(model, (x, y), F.mse_loss).total
    slope = torch.autograd.grad(total, w)[0].flatten()[at].item()
    ends = []
    for level in (lo, hi):
        value = rounding.from_blocks(level * s, form, -1, w.shape).flatten()[at].item()
        with torch.no_grad():
            before = w.view(-1)[at].item()
            w.view(-1)[at] = value
        ends.append((value, lotion_fx.expected_loss(model, (x, y), F.mse_loss).total.item()))
        with torch.no_grad():
            w.view(-1)[at] = before
    (low, at_low), (high, at_high) = ends
    assert math.isclose(slope, (at_high - at_low) / (high - low), rel_tol=1e-6, abs_tol=1e-9)


@given(networks)
@settings(max_examples=15, deadline=None)
def test_monotone_in_strength(network):
    totals = []
    for strength in (0.0, 0.5, 1.0, 2.0):
        model, batch, fmt = one_layer(network)
        lotion_fx.transform(model, fmt, inner="eager", strength=strength)
        result = lotion_fx.expected_loss(model, batch, F.mse_loss)
        totals.append(result.total.item())
        assert strength == 1 or result.certificates["0.weight"].kind == "second order"  # no expectation any more
    assert totals[0] == result.loss.item()
    assert totals == sorted(totals)


@given(networks)
@settings(max_examples=15, deadline=None)
def test_scale_equivariance(network):
    """Twice the weights on half the input, twice the biases on twice the target: four times the loss and the term."""
    results = []
    for factor in (1.0, 2.0):
        model, (x, y), fmt = one_layer(network)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        lotion_fx.transform(model, fmt, inner="eager")
        results.append(lotion_fx.expected_loss(model, (x, factor * y), F.mse_loss).total.item())
    assert math.isclose(4 * results[0], results[1], rel_tol=1e-12)
