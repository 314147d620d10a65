"""A measurement meets other optimizers, skipped steps, loaded weights, gradients of zero, and goes uphill.

Broken once and seen red: others' parameters left noisy, no hook before loading, the sign of an ascent left out, beliefs
told by an observation without noise.
"""

import copy
import io
import itertools
import math
import statistics
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx.gain import Gains
from lotion_fx.state import smoothings_of


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))


def smoothed(seed=0, **options):
    return lotion_fx.transform(net(seed), "int4", inner="aot_eager", **options)


def data(seed=0):
    torch.manual_seed(seed)
    return torch.randn(16, 32)


def values(model):
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def holds(model):
    return smoothings_of(model)[0].tally.measuring.holding.is_noisy


def step(model, optimizer, seed, loss=lambda out: out.square().mean()):
    optimizer.zero_grad()
    loss(model(data(seed))).backward()
    optimizer.step()


# ------------------------------------------------------------------------------------------ gradients that tell nothing


def nothing_flows(model, out):
    return 0.0 * out.sum()


def nothing_flows_into_one(model, out):
    hook = model[0].weight.register_hook(torch.zeros_like)
    out.square().mean().backward()
    hook.remove()
    return None


def size_where(which, curvature):
    """The size that is found where in two of the early steps nothing flows; the mean of three, of sixteen rows each."""
    return math.exp(statistics.fmean(math.log(one_size_where(which, curvature, first)) for first in (0, 200, 400)))


def one_size_where(which, curvature, first):
    model = smoothed(curvature=curvature)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for i in range(20):
        optimizer.zero_grad()
        out = model(data(first + i))
        loss = which(model, out) if which and i in (1, 2) else F.mse_loss(out, data(first + i + 50))
        if loss is not None:
            loss.backward()
        optimizer.step()
    assert values(model).isfinite().all()
    return lotion_fx.report(model).size[0]


@pytest.mark.parametrize("curvature", ["factored", "fisher"])
@pytest.mark.parametrize("which", [nothing_flows, nothing_flows_into_one])
def test_a_gradient_of_zero_in_a_measuring_step_tells_nothing(which, curvature):
    assert 1 / 2 < size_where(which, curvature) / size_where(None, curvature) < 2


def test_an_observation_without_noise_is_none():
    gains = Gains(2)
    before = gains.density.clone()
    gains.observe(*torch.tensor([[0.1, 0.0], [0.1, 0.1], [0.01, 0.0]], dtype=torch.float64))
    assert gains.density.isfinite().all() and torch.equal(gains.density[1], before[1])
    assert not torch.equal(gains.density[0], before[0])


# ------------------------------------------------------------------------------------------------ who else steps, reads


def test_an_optimizer_of_another_model_finds_no_noise():
    """An actor is trained through a critic, whose weights are averaged before they have stepped."""
    actor, critic = net(1), smoothed()
    optimizers = torch.optim.Adam(actor.parameters(), 1e-3), torch.optim.Adam(critic.parameters(), 1e-3)
    for i in range(5):
        before = values(critic)
        step(nn.Sequential(actor, critic), optimizers[0], i)
        assert torch.equal(values(critic), before)
        step(critic, optimizers[1], i)
        assert not holds(critic)
    assert lotion_fx.report(critic).size is not None  # it is measured all the same, in its own steps


def test_two_models_that_step_one_after_the_other_are_measured_as_alone():
    """Both losses go backward before either optimizer steps."""

    def trained(seeds):
        models = [smoothed(seed) for seed in seeds]
        optimizers = [torch.optim.Adam(model.parameters(), 1e-3) for model in models]
        for i in range(6):
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                F.mse_loss(model(data(i)), data(i + 50)).backward()
            for optimizer in optimizers:
                optimizer.step()
        return models

    for together, seed in zip(trained([1, 2]), [1, 2], strict=True):
        (alone,) = trained([seed])
        assert torch.equal(values(together), values(alone))
        assert lotion_fx.report(together).size == lotion_fx.report(alone).size is not None


def test_layers_in_no_optimizer_are_not_left_noisy():
    model = smoothed()
    step(model, torch.optim.Adam(model.parameters(), 1e-3), 0)
    head = torch.optim.Adam(model[2].parameters(), 1e-3)
    for i in range(8):
        trunk = model[0].weight.detach().clone()
        step(model, head, i)
        assert torch.equal(model[0].weight, trunk)


def test_a_step_that_a_scaler_skips_leaves_no_noise():
    model = smoothed()
    optimizer, scaler = torch.optim.SGD(model.parameters(), 1e-3), torch.amp.GradScaler("cpu", init_scale=2.0)
    was_holding = False
    for i in range(4):
        before = values(model)
        optimizer.zero_grad()
        loss = model(data(i)).square().mean() * (float("inf") if i in (1, 2) else 1.0)
        was_holding |= i in (1, 2) and holds(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(values(model), before) == (i in (1, 2))
    assert was_holding


def amid_a_measurement():
    """A model between forward and backward, its parameters noisy, and its own values."""
    model = smoothed()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    step(model, optimizer, 0)
    own = values(model)
    model(data(1)).square().mean()
    assert holds(model) and not torch.equal(values(model), own)
    return model, optimizer, own


@pytest.mark.parametrize("part", ["model", "layer"])
def test_what_is_loaded_amid_a_measurement_is_what_was_saved(part):
    model, optimizer, own = amid_a_measurement()
    saved = copy.deepcopy(net(5).state_dict())
    if part == "model":
        model.load_state_dict(saved)
    else:
        model[0].load_state_dict({name.removeprefix("0."): v for name, v in saved.items() if name.startswith("0.")})
    loaded = values(net(5))
    count = 32 * 64 + 64
    assert torch.equal(values(model)[:count], loaded[:count])
    assert torch.equal(values(model)[count:], loaded[count:] if part == "model" else own[count:])
    optimizer.zero_grad()
    step(model, optimizer, 2)
    assert values(model).isfinite().all() and not holds(model)


def test_a_model_pickled_amid_a_measurement_has_its_own_values():
    model, _, own = amid_a_measurement()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(values(torch.load(file, weights_only=False)), own)


def test_a_generator_s_gradient_is_that_of_its_forward():
    """A discriminator steps between the forward and the backward pass of what made its examples."""
    generator, critic = smoothed(1), net(2)
    optimizers = [torch.optim.SGD(each.parameters(), 1e-3) for each in (generator, critic)]
    for i in range(5):
        optimizers[0].zero_grad()
        made = generator(data(i))
        noisy, measures = copy.deepcopy(net(1)), holds(generator)
        for mine, theirs in zip(noisy.parameters(), generator.parameters(), strict=True):
            mine.data.copy_(theirs.data)
        step(critic, optimizers[1], i)
        assert not holds(generator)
        critic(made).square().mean().backward()
        critic(noisy(data(i))).square().mean().backward()
        for mine, theirs in zip(generator.parameters(), noisy.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
        assert measures == (i in (1, 2, 4))
        optimizers[0].step()


@pytest.mark.parametrize("curvature", ["factored", "fisher"])
@pytest.mark.parametrize("amid", ["forward", "backward"])
def test_what_is_saved_amid_a_step_resumes_with_that_step(amid, curvature):
    """As whoever is interrupted saves: the step is lost, and is the first of the resumed run."""

    def run(model, optimizer, begin, end):
        for i in range(begin, end):
            step(model, optimizer, i, lambda out, i=i: F.mse_loss(out, data(i + 50)))

    for at in range(1, 6):
        whole, saved = [smoothed(curvature=curvature) for _ in range(2)]
        optimizers = [torch.optim.AdamW(each.parameters(), 1e-3) for each in (whole, saved)]
        run(whole, optimizers[0], 0, 8)
        run(saved, optimizers[1], 0, at)
        optimizers[1].zero_grad()
        loss = F.mse_loss(saved(data(at)), data(at + 50))
        if amid == "backward":
            loss.backward()
        file = io.BytesIO()
        torch.save((saved.state_dict(), optimizers[1].state_dict()), file)
        file.seek(0)
        resumed = smoothed(curvature=curvature)
        optimizer = torch.optim.AdamW(resumed.parameters(), 1e-3)
        for each, state in zip((resumed, optimizer), torch.load(file), strict=True):
            each.load_state_dict(state)
        run(resumed, optimizer, at, 8)
        assert torch.equal(values(resumed), values(whole)), at
        assert lotion_fx.report(resumed).size == lotion_fx.report(whole).size


def test_models_that_threads_train_are_as_trained_alone():
    """But for last bits, which depend on who runs before graphs are there; another's noise moves weights by .1."""
    batches = [(data(i), data(i + 50)) for i in range(40)]

    def trained(model):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for inputs, targets in batches:
            optimizer.zero_grad()
            F.mse_loss(model(inputs), targets).backward()
            optimizer.step()
        return values(model)

    alone = [trained(smoothed(seed)) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(trained, [smoothed(seed) for seed in (1, 2)]))
    for mine, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------- up the hill


@pytest.mark.parametrize(
    "make, curvature",
    [
        *itertools.product([torch.optim.SGD, torch.optim.AdamW], ["factored", "fisher"]),
        (lotion_fx.optim.AdamW, "fisher"),
    ],
)
@pytest.mark.parametrize("calibrate", [True, False])
def test_to_maximize_is_to_minimize_the_negative(make, curvature, calibrate):
    found = []
    for sign in (1.0, -1.0):
        model = smoothed(curvature=curvature, calibrate=calibrate, strength=30.0)
        optimizer = make(model.parameters(), 1e-2, maximize=sign < 0)
        for i in range(6):
            step(model, optimizer, i, lambda out, i=i, sign=sign: sign * F.mse_loss(out, data(i + 50)))
        found.append((values(model), lotion_fx.report(model).size))
    (down, size), (up, size_up) = found
    torch.testing.assert_close(up, down, rtol=0, atol=1e-6)
    assert (size is None) == (size_up is None) == (not calibrate)
    if calibrate:
        assert size == pytest.approx(size_up, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- closures


class Careful(torch.optim.SGD):
    """Evaluates its closure twice."""

    def step(self, closure):
        closure()
        return super().step(closure)


class Sharpness(torch.optim.SGD):
    """Sharpness-aware minimization as it is often written: weights move between two passes."""

    def first(self):
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(0.01 * parameter.grad)
                self.state[parameter]["moved"] = 0.01 * parameter.grad

    def second(self):
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(self.state[parameter]["moved"])
        self.step()


def run_with_closures(model, optimizer, steps=6):
    for i in range(steps):

        def closure(i=i):
            optimizer.zero_grad()
            loss = F.mse_loss(model(data(i)), data(i + 50))
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_a_closure_that_is_called_once_a_step_is_measured_as_a_step_without_is(make):
    """Lightning steps so, automatically and by hand."""
    found = []
    for closures in (True, False):
        model = smoothed()
        optimizer = make(model.parameters(), 1e-3)
        if closures:
            run_with_closures(model, optimizer)
        else:
            for i in range(6):
                step(model, optimizer, i, lambda out, i=i: F.mse_loss(out, data(i + 50)))
        found.append((values(model), lotion_fx.report(model).size))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1] is not None


@pytest.mark.parametrize("make", [Careful, lambda p, lr: torch.optim.LBFGS(p, lr, max_iter=2)])
def test_the_report_says_that_an_optimizer_compares_losses(make):
    model = smoothed()
    run_with_closures(model, make(model.parameters(), 1e-3))
    told = lotion_fx.report(model)
    assert told.size is None and "may call a closure several times" in told.unmeasured
    assert f"its size not measured: {told.unmeasured}" in str(told) and told.to_dict()["unmeasured"] == told.unmeasured


def test_the_report_says_that_no_measurement_told_anything():
    model = smoothed()
    optimizer = Sharpness(model.parameters(), 1e-3)
    for i in range(9):
        for move in (optimizer.first, optimizer.second):
            optimizer.zero_grad()
            F.mse_loss(model(data(i)), data(i + 50)).backward()
            move()
    told = lotion_fx.report(model)
    assert told.size is None and "measurements told anything: do weights change" in told.unmeasured


@pytest.mark.parametrize("options", [{"calibrate": False}, {"method": "ste"}, {}])
def test_otherwise_it_says_nothing(options):
    model = smoothed(**options)
    run_with_closures(model, torch.optim.SGD(model.parameters(), 1e-3))
    told = lotion_fx.report(model)
    assert told.unmeasured == "" and "not measured" not in str(told)
