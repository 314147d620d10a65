"""Noise at outputs tells the loss's curvature there: against closed forms, and with batches cut and padded.

Broken once and seen red: curvature of moved outputs averaged in, phases by row, the gradient's squares of moved rows in
the denominator, no bound at 0 and 1, the observation believed beside the average instead of the step's own squares.
"""

import copy
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx.lag import YOUNG, Lag
from lotion_fx.output_noise import LOOK, MOVE, OUTPUTS, SHARE, TRIES, OutputNoise, told_of
from lotion_fx.state import smoothings_of
from tests.runtime.steps import one_step


def ready(z, amplitude=0.1, steps=3):
    """The noise of a model whose outputs, of this kind, were looked at."""
    noise = OutputNoise(is_on=True)
    noise.forward_comes(0, is_due=True, gathers=True)
    assert noise.now == LOOK
    noise.observe(told_of(0, z, None, torch.ones_like(z)), 1.0, 1.0, 1, known=None)
    noise.forward_comes(steps, is_due=True, gathers=True)
    assert noise.now == MOVE and noise.amplitude > 0
    noise.amplitude = amplitude
    return noise


def told(noise, z, gradient, terms, **options):
    s = noise.noise(z, 0)
    g = gradient(z + s)
    return s, noise.observe(told_of(0, z + s, s, g), terms, 1.0, 1, known=None, **options)


# ------------------------------------------------------------------------------------------------------- what it tells


@pytest.mark.parametrize("residual", [0.01, 1.0, 100.0])
def test_it_is_the_trace_of_a_quadratic_over_squared_gradients(residual):
    """Of the mean of c/2 (z - y)^2 over N elements H is c/N, and T sum g^2 is T c^2 r^2 / N^2: N / (T r^2) between."""
    torch.manual_seed(0)
    rows, columns = 4096, 10
    z = torch.randn(rows, columns)
    y = z + residual * torch.randn(rows, columns)
    noise = ready(z, amplitude=SHARE * residual)
    _, seen = told(noise, z, lambda at: (at - y) / z.numel(), float(rows))
    exact = columns / residual**2
    assert math.log(exact) == pytest.approx(seen.log, abs=4 * seen.variance**0.5) and seen.variance < 0.02


def test_moved_rows_do_not_enter_the_squared_gradients():
    """Noise as wide as residuals doubles their squares; those it is compared with have none."""
    torch.manual_seed(0)
    z = torch.randn(8192, 4)
    y = z + 0.1 * torch.randn_like(z)
    _, seen = told(ready(z, amplitude=0.3), z, lambda at: (at - y) / z.numel(), 8192.0)
    assert seen.log == pytest.approx(math.log(4 / 0.01), abs=0.15)


def test_a_loss_without_curvature_ends_it():
    torch.manual_seed(0)
    z = torch.randn(64, 4)
    noise = ready(z)
    for step in range(TRIES):
        assert noise.is_on and noise.amplitude <= 0.1 * 4**step + 1e-6
        assert told(noise, z, lambda at: torch.randn_like(at), 64.0)[1] is None
        noise.forward_comes(4 + step, is_due=True, gathers=True)
    assert not noise.is_on and noise.now == ""


def test_noise_shrinks_where_the_loss_is_narrow_and_grows_where_it_is_wide():
    torch.manual_seed(0)
    z = torch.randn(1024, 8)
    for residual, way in ((1e-3, -1), (1e2, 1)):
        y, noise = z + residual * torch.randn_like(z), ready(z)
        told(noise, z, lambda at, y=y: at - y, 1024.0)
        assert math.copysign(1, noise.amplitude - 0.1) == way


# ---------------------------------------------------------------------------------------------------------- what it is


def test_the_noise_is_that_of_the_whole_batch_however_it_is_cut():
    torch.manual_seed(0)
    z = torch.randn(32, 7)
    noise, state = ready(z), torch.get_rng_state()
    whole = noise.noise(z, 0)
    assert torch.equal(torch.cat([noise.noise(z[:5], 0), noise.noise(z[5:], 0)]), whole)
    assert torch.equal(state, torch.get_rng_state()) and whole.std() > 0.01
    still = whole.eq(0).all(-1).float().mean()
    assert 0.2 < still < 0.6 and noise.noise(z, 1) is None and noise.noise(z, OUTPUTS) is None
    assert noise.noise(z.long(), 0) is None
    noise.forward_comes(9, is_due=True, gathers=True)
    assert not torch.allclose(noise.noise(z, 0), whole, atol=0.05)


def test_padded_rows_tell_nothing():
    torch.manual_seed(0)
    z, g = torch.randn(16, 3), torch.randn(16, 3)
    padded = torch.cat([z, 7 * torch.ones(9, 3)]), torch.cat([g, torch.zeros(9, 3)])
    assert torch.allclose(told_of(2, z, None, g), told_of(2, padded[0], None, padded[1]))


@pytest.mark.parametrize(
    ("z", "least", "most"),
    [
        (torch.rand(512, 4), 0.0, 1.0),
        (torch.rand(512, 4) * 9, 0.0, math.inf),
        (-torch.rand(512, 4), -math.inf, 0.0),
        (torch.rand(512).sigmoid(), 0.0, 1.0),
    ],
)
def test_rates_and_probabilities_stay_what_they_are(z, least, most):
    moved = z + ready(z, amplitude=50.0).noise(z, 0)
    assert moved.min() >= least and moved.max() <= most and not torch.equal(moved, z)


# ------------------------------------------------------------------------------------------------------- in a training


def outputs_of(model):
    return smoothings_of(model)[0].tally.measuring.outputs


def moved_steps(model, x, loss, steps=20, **options):
    """The steps whose training forward gave other outputs than the weights that it had."""
    optimizer, found = torch.optim.SGD(model.parameters(), 1e-3), []
    for step in range(steps):
        out = model(x)
        own = F.linear(x, model.weight.detach(), model.bias.detach())
        found += [step] * (not torch.allclose(out, own, atol=1e-6))
        loss(out).backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def test_a_recognized_likelihood_has_none():
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.randint(4, (64,))
    model = lotion_fx.transform(nn.Linear(8, 4), "int4", inner="aot_eager")
    assert moved_steps(model, x, lambda out: F.cross_entropy(out, y)) == []
    assert outputs_of(model).amplitude == 0 and outputs_of(model).log is not None


def hessian_term(model, x, loss):
    """``1/2 sum sigma^2 H_ii`` of a linear layer's weight, by second derivatives."""
    weight, bias = model.weight.detach(), model.bias.detach()
    hessian = torch.autograd.functional.hessian(lambda w: loss(F.linear(x, w, bias)), weight)
    sigma2 = lotion_fx.rounding.variance(weight, lotion_fx.resolve("int4"))
    return 0.5 * float((sigma2.flatten() * hessian.reshape(weight.numel(), -1).diagonal()).sum())


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_a_likelihood_tells_its_curvature_where_its_labels_are_learned_by_heart(likelihood):
    """There squared gradients vanish as (1 - p)^2, and the curvature of the loss as p (1 - p)."""
    ratios = []
    for seed in range(4):
        torch.manual_seed(seed)
        x, net = torch.randn(256, 8), nn.Linear(8, 4)
        with torch.no_grad():
            net.weight *= 12
            labels = net(x).argmax(1) if likelihood == "categorical" else (net(x) > 0).float()
        loss = F.cross_entropy if likelihood == "categorical" else F.binary_cross_entropy_with_logits
        model = lotion_fx.transform(net, "int4", inner="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        for _ in range(16):
            one_step(model, optimizer, lambda m, x=x, labels=labels, loss=loss: loss(m(x), labels))
        exact = hessian_term(net, x, lambda z, labels=labels, loss=loss: loss(z, labels))
        ratios.append(lotion_fx.report(model).term / exact)
    assert statistics.geometric_mean(ratios) == pytest.approx(1, abs=0.2), ratios


def test_few_steps_have_some_and_none_without_calibrating():
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.randn(64, 4)
    model = lotion_fx.transform(nn.Linear(8, 4), "int4", inner="aot_eager")
    found = moved_steps(model, x, lambda out: F.mse_loss(out, y), steps=40)
    assert 3 < len(found) < 14 and outputs_of(model).log is not None
    model = lotion_fx.transform(nn.Linear(8, 4), "int4", inner="aot_eager", calibrate=False)
    assert moved_steps(model, x, lambda out: F.mse_loss(out, y)) == []


@pytest.mark.parametrize(("deviation", "off"), [(0.01, 0.25), (1.0, 0.25), (100.0, 0.9)])
def test_the_term_of_squares_is_their_increase_whatever_the_targets(deviation, off):
    """Of a linear layer it has a closed form: 1/2 sum h sigma^2 with h_ij = 2/K mean x_j^2, of any residual."""
    ratios = []
    for seed in range(4):
        torch.manual_seed(seed)
        net, true = nn.Linear(16, 8), torch.randn(8, 16)
        model = lotion_fx.transform(net, "int4", inner="aot_eager")
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(40):
            x = torch.randn(256, 16)
            y = deviation * (x @ true.T + torch.randn(256, 8))
            one_step(model, optimizer, lambda m, x=x, y=y: F.mse_loss(m(x), y))
        sigma2 = lotion_fx.rounding.variance(net.weight.detach(), lotion_fx.resolve("int4"))
        exact = 0.5 * (2 / 8) * float(sigma2.sum())
        ratios.append(math.log(lotion_fx.report(model).term / exact))
    assert abs(statistics.fmean(ratios)) < off  # 1.9 of far targets where only parameters have noise


def test_micro_batches_are_one_batch():
    """Four micro-batches are one batch, in steps with noise as well."""
    ends = []
    for cut in (1, 4):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        model = lotion_fx.transform(net, "int4", inner="aot_eager")
        optimizer, data = torch.optim.SGD(model.parameters(), 0.05), torch.Generator().manual_seed(1)
        for _ in range(14):
            x, y = torch.randn(256, 8, generator=data), torch.randn(256, 3, generator=data)
            for part_x, part_y in zip(x.chunk(cut), y.chunk(cut), strict=True):
                (F.mse_loss(model(part_x), part_y) / cut).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert outputs_of(model).log is not None
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*ends, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("at", [3, 6, 7, 11, 14])
def test_what_is_resumed_goes_on_bit_for_bit(at):
    def begun():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        model = lotion_fx.transform(net, "int4", inner="aot_eager")
        return model, torch.optim.Adam(model.parameters(), 1e-2)

    def go(model, optimizer, steps):
        for step in steps:
            data = torch.Generator().manual_seed(step)
            x, y = torch.randn(32, 8, generator=data), torch.randn(32, 3, generator=data)
            one_step(model, optimizer, lambda m, x=x, y=y: F.mse_loss(m(x), y))

    model, optimizer = begun()
    go(model, optimizer, range(at))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    go(model, optimizer, range(at, 26))
    again, resumed = begun()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    go(again, resumed, range(at, 26))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert outputs_of(model).saved() == outputs_of(again).saved()


class Named(nn.Module):
    """Returns tensors in a dictionary, and a number."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 4), nn.Linear(8, 1)

    def forward(self, x):
        return {"a": self.body(x), "both": (self.head(x)[:, 0], 3)}


def test_outputs_in_any_nesting_have_some_and_keep_it():
    torch.manual_seed(0)
    model = lotion_fx.transform(Named(), "int4", inner="aot_eager")
    optimizer, x = torch.optim.SGD(model.parameters(), 1e-3), torch.randn(64, 8)
    for _ in range(12):
        out = model(x)
        assert isinstance(out, dict) and out["both"][1] == 3
        (out["a"].square().mean() + (out["both"][0] - 1).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert outputs_of(model).log is not None


def test_a_step_with_noise_leaves_curvature_alone():
    torch.manual_seed(0)
    model = lotion_fx.transform(nn.Linear(8, 4), "int4", inner="aot_eager")
    optimizer, x, y = torch.optim.SGD(model.parameters(), 1e-3), torch.randn(64, 8), torch.randn(64, 4)
    weight = smoothings_of(model)[0].weights[0]
    kept = []
    for _ in range(12):
        before = None if weight.curvature.ema is None else weight.curvature.ema.clone()
        loss = F.mse_loss(model(x), y)
        is_moved = outputs_of(model).now == MOVE
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kept += [torch.equal(before, weight.curvature.ema)] if is_moved else []
    assert kept and all(kept)


# ----------------------------------------------------------------------------------------------------------------- lag


def test_an_average_that_is_behind_is_made_up_for():
    lag = Lag()
    for _ in range(12):
        lag.step_comes()
        assert lag.seen({"a": 1.0, "b": 2.0, "c": 0.0}, {"a": 3.0, "b": 6.0}) == pytest.approx(math.log(3))
        lag.learn(math.log(3), 5)
    assert lag.log == pytest.approx(math.log(3), rel=1e-3)
    lag.step_comes()
    assert lag.seen({"a": 1.0}, {"a": math.nan}) is None and lag.seen({}, {}) is None


def test_late_growth_is_not_believed():
    for steps, most in ((YOUNG, 2.0), (20 * YOUNG, 1.0025)):
        lag = Lag()
        for _ in range(30):
            lag.step_comes()
            lag.learn(5.0, steps)
        assert math.exp(lag.log) == pytest.approx(most, rel=1e-6)


def test_several_optimizers_tell_of_one_step():
    """What is learned of a step is of all that its optimizers told by then, not of each in turn."""
    one, two = Lag(), Lag()
    one.step_comes(), two.step_comes()
    one.learn(one.seen({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 2.0, "b": 3.0, "c": 9.0}), 5)
    for name, now in (("a", 2.0), ("b", 3.0), ("c", 9.0)):
        two.learn(two.seen({name: 1.0}, {name: now}), 5)
    assert one.log == pytest.approx(two.log)


class Complex(nn.Module):
    """Returns a spectrum beside real numbers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 4)

    def forward(self, x):
        out = self.body(x)
        return out, torch.fft.rfft(out)


def test_outputs_that_are_not_real_have_none():
    torch.manual_seed(0)
    model = lotion_fx.transform(Complex(), "int4", inner="aot_eager", refresh=1)
    optimizer, x = torch.optim.SGD(model.parameters(), 1e-3), torch.randn(128, 8)
    for _ in range(14):
        out, spectrum = model(x)
        ((out - 1).square().mean() + spectrum.abs().square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert outputs_of(model).log is not None


@pytest.mark.parametrize("loss", [F.binary_cross_entropy, F.mse_loss, F.l1_loss])
def test_losses_of_probabilities_stand_it(loss):
    torch.manual_seed(0)
    model = lotion_fx.transform(nn.Sequential(nn.Linear(8, 4), nn.Sigmoid()), "int4", inner="aot_eager")
    optimizer, x = torch.optim.Adam(model.parameters(), 0.05), torch.randn(128, 8)
    for _ in range(40):
        one_step(model, optimizer, lambda m: loss(m(x), (x[:, :4] > 0).float()))
    assert all(p.isfinite().all() for p in model.parameters())
