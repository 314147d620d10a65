"""`expected_loss` against the sum over all roundings, and the properties that theory promises."""

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
from lotion_fx.numerics import rounding
from tests.enumeration import two_points
from tests.models import LM
from tests.runtime.expected_cases import affine, enumerated, lm_batch, lm_loss, weights_of

FORMATS = ["int4/tensor", "int3/tensor", "int2/channel", "int4/2", "fp4/tensor", "fp4/4", "mxfp4", "nf4/tensor"]


def away_from_ties(model: nn.Module, fmt: str) -> bool:
    """Whether no weight but each block's largest lies at a level."""
    form = lotion_fx.resolve(fmt)
    for w in weights_of(model).values():
        blocks = rounding.to_blocks(w.detach(), form)
        z = blocks / rounding.scale(w.detach(), form)
        lo, hi = form.grid.neighbours(z)
        near = torch.minimum((z - lo).abs(), (hi - z).abs()) < 1e-3
        others = (blocks != 0) & (blocks.abs() < blocks.abs().amax(-1, keepdim=True))  # 0 fills short blocks
        if (near & others).any() or (blocks == 0).all(-1).any():
            return False
    return True


@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    fmt=st.sampled_from(FORMATS),
    bias=st.booleans(),
    batch=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=100, deadline=None)
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
    same_gradients(model, result.total, expected)


def same_gradients(model: nn.Module, total: Tensor, expected: Tensor) -> None:
    parameters = list(model.parameters())
    pairs = zip(torch.autograd.grad(total, parameters), torch.autograd.grad(expected, parameters), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


UPS = {
    "smoothstep": lambda d: d**2 * (3 - 2 * d),
    "gaussian": lambda d: (1 + torch.erf((2 * d - 1) / (0.4 * 2**0.5)) / math.erf(1 / (0.4 * 2**0.5))) / 2,
}


@pytest.mark.parametrize("noise", UPS)
@pytest.mark.parametrize("sizes", [[3, 2], [2, 2, 3]])
def test_under_a_biased_law_the_mean_s_shift_is_in_it(noise, sizes):
    model = affine(sizes, True, 0)
    x, y = torch.randn(4, sizes[0]).double(), torch.randn(4, sizes[-1]).double()
    lotion_fx.transform(model, "int4/tensor", inner="eager", noise=noise)
    result = lotion_fx.expected_loss(model, (x, y), F.mse_loss)
    expected = enumerated(model, x, y, "int4/tensor", up=UPS[noise])
    assert {certificate.kind for certificate in result.certificates.values()} == {"exact"}
    assert math.isclose(result.total.item(), expected.item(), rel_tol=1e-10)
    assert math.isclose(sum(map(float, result.terms.values())) + result.loss.item(), expected.item(), rel_tol=1e-10)
    assert away_from_ties(model, "int4/tensor")
    same_gradients(model, result.total, expected)


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4/floor", "mxfp4/even"])
def test_saturated_weights_are_at_their_last_level(fmt):
    """A scale that was rounded down leaves weights past the grid, whose rounding is certain and no mean of theirs."""
    form = lotion_fx.resolve(fmt)
    for seed in range(100):
        model = affine([4, 2], True, seed)
        w = model[0].weight.detach()
        saturated = (rounding.to_blocks(w, form) / rounding.scale(w, form)).abs() > form.grid.max * (1 + 1e-6)
        if saturated.any() and away_from_ties(model, fmt):
            break
    x, y = torch.randn(4, 4).double(), torch.randn(4, 2).double()
    lotion_fx.transform(model, fmt, inner="eager")
    result = lotion_fx.expected_loss(model, (x, y), F.mse_loss)
    expected = enumerated(model, x, y, fmt)
    assert saturated.any()
    assert math.isclose(result.total.item(), expected.item(), rel_tol=1e-10)
    assert math.isclose(sum(map(float, result.terms.values())) + result.loss.item(), expected.item(), rel_tol=1e-10)
    same_gradients(model, result.total, expected)


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
    assert result.total.item() == pytest.approx(result.loss.item(), rel=1e-14)  # sums of float64 in another order


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


# ------------------------------------------------------------------------------------------- the joint graph, sampling


def regression(curvature: str, seed: int = 0, **options) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A linear model at its least-squares solution plus noise, so that every curvature means the same."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 3, bias=False))
    x = torch.randn(4000, 6)
    y = x @ model[0].weight.detach().t() + torch.randn(4000, 3) * 0.5**0.5
    lotion_fx.transform(model, "int4/tensor", curvature=curvature, inner="aot_eager", **options)
    return model, (x, y)


@pytest.mark.parametrize("curvature", ["factored", "full", "ggn"])
def test_the_joint_graph_form_agrees_where_it_should(curvature):
    """With residuals of the likelihood's own law the empirical, the Gauss-Newton and the exact curvature are one."""
    options = {"likelihood": "gaussian"} if curvature == "ggn" else {}
    model, batch = regression(curvature, **options)
    exact = lotion_fx.expected_loss(model, batch, F.mse_loss)
    joint = lotion_fx.expected_loss(model, batch, F.mse_loss, moments="off")
    assert exact.certificates["0.weight"].kind == "exact"
    assert str(joint.certificates["0.weight"]) == "analytic: moments='off'"
    # Empirically T counts rows, whose loss is a mean over 3 outputs: a third of what the likelihood counts.
    factor = 1.0 if curvature == "ggn" else 3.0
    assert factor * float(joint.terms["0.weight"]) == pytest.approx(float(exact.terms["0.weight"]), rel=0.1)


def test_fisher_is_the_squared_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 4))
    x, y = torch.randn(16, 6), torch.randint(4, (16,))
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), [model[0].weight, model[2].weight])
    lotion_fx.transform(model, "int4", curvature="fisher", inner="aot_eager")
    result = lotion_fx.expected_loss(model, (x, y), F.cross_entropy, moments="off")
    for name, grad in zip(("0.weight", "2.weight"), grads, strict=True):
        assert result.certificates[name].kind == "fisher"
        sigma2 = rounding.variance(model.get_parameter(name).detach(), lotion_fx.resolve("int4"))
        assert float(result.terms[name]) == pytest.approx(float(0.5 * (16 * grad.square() * sigma2).sum()), rel=1e-5)


def test_sampling_is_unbiased_and_says_how_sure_it_is():
    """Against the sum over all roundings: of all weights, and of each alone."""
    model = affine([2, 2, 2], True, 3)
    x, y = torch.randn(6, 2).double(), torch.randn(6, 2).double()
    lotion_fx.transform(model, "int3/tensor", inner="eager")
    generator = torch.Generator().manual_seed(0)
    result = lotion_fx.expected_loss(model, (x, y), F.mse_loss, samples=400, generator=generator)
    assert result.sampled is not None and result.error is not None
    assert abs(result.sampled - result.total.item()) < 4 * result.error
    assert result.error < 0.1 * (result.total - result.loss).item()
    for predicted, measured, error in result.alone.values():
        assert abs(predicted - measured) < 4 * error
    assert result.ratio == pytest.approx(1, abs=0.3)
    rounded = {
        name: rounding.rtn(w.detach(), lotion_fx.resolve("int3/tensor")) for name, w in weights_of(model).items()
    }
    assert result.rtn == pytest.approx(F.mse_loss(torch.func.functional_call(model, rounded, (x,)), y).item())
    text = str(result)
    assert "ratio" in text and "0.weight" in text and "exact: linear" in text and "400 roundings" in text


class Normalized(nn.Module):
    """With all that `eval()` changes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.kept, self.down = nn.Dropout(0.5), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.kept(self.drop(self.norm(self.up(x)))))


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = Normalized()
    model.kept.eval()
    lotion_fx.transform(model, "int4", inner="aot_eager")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(8, 6), torch.randint(4, (8,))
    first, again = (lotion_fx.expected_loss(model, (x, y), F.cross_entropy, samples=2) for _ in range(2))
    assert first.total.item() == again.total.item()  # no dropout
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [name for name, module in model.named_modules() if not module.training] == ["kept"]
    assert all(p.grad is None for p in model.parameters())
    F.cross_entropy(model(x), y).backward()  # still compiled, still under smoothing
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert lotion_fx.report(model)["up.weight"].estimator == "analytic"


class Branching(nn.Module):
    """What plain tracing stumbles over: a branch on values, a region without gradients, buffers, a metric, a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("scale", torch.full((), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        with torch.no_grad():
            shift = (self.scale * x).mean()
        h = torch.cumsum(self.norm(self.up(x)), -1)  # no rule: what is before takes the joint-graph form
        return self.down(h + shift) if x.abs().max().item() > 0 and h.sum() != 0 else h


def test_branches_buffers_and_regions_without_gradients():
    torch.manual_seed(0)
    model = lotion_fx.transform(Branching(), "int4", inner="aot_eager")
    x, y = torch.randn(8, 6), torch.randint(4, (8,))
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            result = lotion_fx.expected_loss(model, (x, y), F.cross_entropy, samples=2)
            assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert {n: c.kind for n, c in result.certificates.items()} == {
        "up.weight": "analytic",
        "down.weight": "second order",
    }
    assert model.calls == 0
    with lotion_fx.full_precision(model):
        model.eval()
        assert result.loss.item() == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)


def test_a_layer_that_the_loss_does_not_see_is_exactly_nothing():
    torch.manual_seed(0)
    model = Normalized()
    model.unused = nn.Linear(6, 3)
    lotion_fx.transform(model, "int4", only={"unused.weight": "int4"}, inner="eager")
    result = lotion_fx.expected_loss(model, (torch.randn(8, 6), torch.randint(4, (8,))), F.cross_entropy)
    assert str(result.certificates["unused.weight"]) == "exact: it does not reach the loss"
    assert float(result.terms["unused.weight"]) == 0


def test_nothing_quantized_is_said():
    model = lotion_fx.transform(nn.Sequential(nn.Embedding(5, 3), nn.Flatten()), "int4", inner="eager")
    with pytest.raises(ValueError, match="no weight of it is quantized"):
        lotion_fx.expected_loss(model, (torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 3)), F.mse_loss)


def test_tied_weights_are_one_parameter():
    torch.manual_seed(0)
    model = lotion_fx.transform(LM(tied=True), "int4", only={"token.*": "int4"}, inner="aot_eager")
    result = lotion_fx.expected_loss(model, lm_batch(0), lm_loss, moments="closed")
    assert set(result.terms) == {"token.weight", "mlp.0.weight", "mlp.2.weight"}
    assert all(float(term) > 0 for term in result.terms.values())


def test_the_nearer_of_two_streams_is_taken():
    """A residual stream that a norm divides by its own length: dropped covariances cost less than the joint form's."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5,
    )  # fmt: skip
    model = lotion_fx.transform(transformers.LlamaForCausalLM(config), "int4", inner="aot_eager")
    tokens = torch.randint(64, (4, 16))
    batch = {"input_ids": tokens, "labels": tokens}
    auto, closed, diagonal = (
        lotion_fx.expected_loss(model, batch, samples=32, moments=moments) for moments in ("auto", "closed", "diagonal")
    )
    away = [abs(result.total.item() - auto.sampled) for result in (closed, diagonal)]
    assert away[0] > 2 * away[1] and auto.total.item() == diagonal.total.item()
    assert auto.ratio_error > 0 and f"ratio {auto.ratio:.2f} ± " in str(auto)
