"""The term's size is measured: against enumeration of what is measured, and against roundings of the whole model.

Broken once and seen red: parameters left rounded after a step, the noise of one weight used for another, the slope not
taken out, a closure's forwards at other weights.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from benchmarks.losses import LOSSES, batches, increase, train
from lotion_fx.amplitude import CHANGE, LEAST, LITTLE, MUCH, next_amplitude
from lotion_fx.held import narrowed
from lotion_fx.measuring import EVERY, FIRST
from lotion_fx.numerics import rounding
from lotion_fx.numerics.uniforms import uniforms
from lotion_fx.state import registry, smoothings_of
from tests.models import LM, MLP, counted, ids, lm_loss
from tests.runtime.steps import one_step


def measuring_of(model):
    return smoothings_of(model)[0].tally.measuring


def run(model, optimizer, steps, loss=None):
    for step in range(steps):
        one_step(model, optimizer, loss or (lambda m, step=step: lm_loss(m, ids(seed=step))))


def trained(steps=3, rate=0.0, make=LM, fmt="int4", **options):
    torch.manual_seed(0)
    model = lotion_fx.transform(make(), fmt, inner="aot_eager", **options)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    run(model, optimizer, steps)
    return model, optimizer


# ----------------------------------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize(("between", "amplitude"), [(nn.Tanh, 0.5), (nn.Tanh, 1.0), (nn.Tanh, 2.0), (nn.Identity, 8.0)])
def test_the_measurement_is_unbiased(between, amplitude, monkeypatch):
    """The mean of many is the increase of the loss, which roundings of the whole model tell."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 6), between(), nn.Linear(6, 3)), torch.randn(64, 8)
    target = net(x).detach() + 1.0  # a slope, of which the measurement is to be free
    plain = copy.deepcopy(net)
    model = lotion_fx.transform(net, "int4", inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)
    found, measuring = [], measuring_of(model)
    observe = measuring._common.observe
    measuring._common.observe = lambda *told: (found.append(told[0].item() / amplitude**2), observe(*told))
    monkeypatch.setattr(lotion_fx.measuring, "next_amplitude", lambda *_: amplitude)
    measuring._pause, measuring.amplitude = lambda steps: 1, amplitude
    for _ in range(200):
        one_step(model, optimizer, lambda m: F.mse_loss(m(x), target))
    measured = torch.tensor(found)
    own = [p.detach().clone() for p in plain.parameters()]
    before = F.mse_loss(plain(x), target)
    slopes = torch.autograd.grad(before, list(plain.parameters()))
    draws, increases = torch.Generator().manual_seed(1), []
    with torch.no_grad():
        for _ in range(400):
            linear = 0.0  # has mean zero, and most of the spread
            for p, w, slope in zip(plain.parameters(), own, slopes, strict=True):
                if p.dim() == 2:
                    p.copy_(lotion_fx.rounding.rr(w, lotion_fx.resolve("int4"), 1, generator=draws))
                    linear += (slope * (p - w)).sum()
            increases.append(F.mse_loss(plain(x), target) - before - linear)
    increases = torch.stack(increases)
    expected, errors = increases.mean(), [t.std() / len(t) ** 0.5 for t in (measured, increases)]
    assert abs(measured.mean() - expected) < 4 * math.hypot(*errors) and max(errors) < 0.1 * expected


@pytest.mark.parametrize("amplitude", [0.5, 1.0, 4.0])
def test_wide_noise_of_two_layers_is_told_from_rounding_s_own(amplitude):
    """Of the loss (w v)^2 / 2, all signs of the noise enumerated."""
    weights, noise = torch.tensor([1.5, -0.7], dtype=torch.float64), torch.tensor([0.3, 0.14], dtype=torch.float64)
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    moved = weights + amplitude * noise * signs
    slopes = moved.flip(1).square() * moved
    shown = 0.5 * (amplitude * noise * signs * slopes).mean(0)
    factor = narrowed((amplitude * noise).square(), weights.square(), amplitude)
    increase = 0.5 * ((weights + noise * signs).prod(1).square().mean() - weights.prod().square())
    torch.testing.assert_close((factor * shown).sum() / amplitude**2, increase)
    assert narrowed(torch.zeros(1), torch.zeros(1), amplitude) == 1  # of a weight that is zero, and has no noise


@pytest.mark.parametrize("scale", [1e-3, 512.0])
def test_the_term_of_a_scaled_loss_is_scaled(scale):
    """Of c L the term is c times that of L."""
    terms = []
    for factor in (1.0, scale):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = lotion_fx.transform(LM(), "int4/tensor", inner="aot_eager")
        run(model, torch.optim.SGD(model.parameters(), 0.0), 4, lambda m, c=factor: c * lm_loss(m, ids(32)))
        terms.append(lotion_fx.report(model).term)
    assert terms[1] / terms[0] == pytest.approx(scale, rel=0.05)


@pytest.mark.parametrize("scale", [1e-3, 512.0])
def test_labels_that_are_drawn_are_weighted_as_those_of_the_loss(scale):
    """Whatever ``"ggn"`` makes of a mean, of its multiple is that multiple, and rows without a loss are none."""
    found = []
    for factor, rows in ((1.0, 32), (scale, 32), (1.0, 8)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = lotion_fx.transform(LM(), "int4", inner="aot_eager", curvature="ggn")
        measuring, shifts = measuring_of(model), []
        measuring._common.shift = shifts.append

        def loss(model, factor=factor, rows=rows):
            found = F.cross_entropy(model(ids(32)).mT, ids(32).roll(-1, 1), reduction="none")
            return factor * found[:rows].sum() / found.numel()

        run(model, torch.optim.SGD(model.parameters(), 0.0), 2, loss)
        found.append(math.exp(shifts[0]))
    assert found == [pytest.approx(1.0, rel=0.01), pytest.approx(scale, rel=0.01), pytest.approx(0.25, rel=0.01)]


@pytest.mark.parametrize("curvature", ["factored", "full", "fisher"])
@pytest.mark.parametrize("name", ["sum", "squares, deviation .01", "masked mean", "binary, sum"])
def test_the_term_is_the_increase(name, curvature):
    model = train("mlp", LOSSES[name], 40, 0, fmt="int3", curvature=curvature)
    report = lotion_fx.report(model)
    measured, error = increase(model, LOSSES[name], batches("mlp", 12345), 100)
    said = report.term * report.size[1] / report.size[0]
    assert report.measurements >= FIRST and abs(report.term - measured) < 3 * math.hypot(error, said) + 0.25 * measured


# -------------------------------------------------------------------------------------------------- who holds what when


def test_parameters_have_their_own_values_again():
    model, optimizer = trained(1)
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = lm_loss(model, ids())
    assert not torch.equal(model.head.weight, own["head.weight"])  # the step measures
    rounded = model.head.weight.detach().clone()
    assert torch.equal(model.state_dict()["head.weight"], own["head.weight"])  # in place, and so from here on
    loss.backward()  # at the weights that the forward ran with, as autograd has no change to complain of
    for _ in range(2):
        one_step(model, optimizer, lambda m: lm_loss(m, ids()))
        assert all(torch.equal(p, own[name]) for name, p in model.named_parameters())
    grid = rounding.scale(own["head.weight"], lotion_fx.resolve("int4"), 1)
    codes = rounding.to_blocks(rounded, lotion_fx.resolve("int4"), 1) / grid
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("look", ["state_dict", "child", "eval", "no_grad", "report", "deepcopy", "full_precision"])
def test_nobody_sees_the_rounded_values(look):
    model, _ = trained(1)
    own, plain = model.head.weight.detach().clone(), LM()
    plain.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    loss = lm_loss(model, ids())
    assert not torch.equal(model.head.weight, own)
    if look == "state_dict":
        assert torch.equal(model.state_dict()["head.weight"], own)
    elif look == "child":
        assert torch.equal(model.head.state_dict()["weight"], own)
    elif look == "eval":
        model.eval()(ids())
    elif look == "no_grad":
        with torch.no_grad():
            model(ids())
    elif look == "report":
        lotion_fx.report(model)
    elif look == "deepcopy":
        twin = copy.deepcopy(model)
        assert torch.equal(twin.head.weight, own) and torch.equal(twin.token.weight, plain.token.weight)
    else:
        with lotion_fx.full_precision(model):
            assert torch.equal(model(ids()), plain(ids()))
    assert torch.equal(model.head.weight, own)
    loss.backward()
    assert torch.equal(model.head.weight, own)


@pytest.mark.parametrize("through_data", [False, True])
def test_what_an_optimizer_unseen_has_moved_stays_moved(through_data):
    model, optimizer = trained(1)
    own = model.head.weight.detach().clone()
    lm_loss(model, ids()).backward()
    if through_data:
        model.head.weight.data += 1.0
    else:
        with torch.no_grad():
            model.head.weight += 1.0
    assert measuring_of(model).draws == 0
    optimizer.step()
    torch.testing.assert_close(model.head.weight, own + 1.0)


def looks_by(model, how):
    if how == "validates":
        model.eval()(ids())
        model.train()
    elif how == "saves":
        model.state_dict()
    elif how == "steps another":
        other = nn.Linear(4, 4)
        other(torch.ones(1, 4)).sum().backward()
        torch.optim.SGD(other.parameters(), 0.1).step()


@pytest.mark.parametrize("how", ["validates", "saves", "steps another"])
@pytest.mark.parametrize("amid", ["forward and backward", "micro-batches"])
def test_who_looks_amid_a_step_changes_nothing(how, amid):
    """The gradient stays that of the loss at the noisy weights, and is measured."""
    found = []
    for looks in (how, ""):
        model, optimizer = trained(1)
        for batch in range(2):
            loss = lm_loss(model, ids(seed=batch))
            if batch == 0 and amid == "forward and backward":
                looks_by(model, looks)
            loss.backward()
            if batch == 0 and amid == "micro-batches":
                looks_by(model, looks)
        grads = [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
        assert measuring_of(model).draws == 1
        found.append((grads, measuring_of(model).common))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] == found[1][1]


@torch._functorch.config.patch(donated_buffer=False)  # which retain_graph=True asks for
def test_two_backward_passes_of_one_forward_are_at_its_weights():
    found = []
    for at_once in (True, False):
        model, _ = trained(1)
        logits = model(ids())
        losses = logits.square().mean(), logits.logsumexp(-1).mean()
        if at_once:
            sum(losses).backward()
        else:
            losses[0].backward(retain_graph=True)
            losses[1].backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("place", [0, 1])
def test_a_part_that_runs_by_itself_goes_backward_at_its_forward_s_weights(place):
    """Another backward pass comes before its own. A layer within a member of a list has no compiled call."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    model = lotion_fx.transform(nn.Sequential(block, nn.Linear(32, 8)), "int4", inner="aot_eager")
    optimizer, x = torch.optim.SGD(model.parameters(), 0.0), torch.randn(16, 32)
    one_step(model, optimizer, lambda m: m(x).square().mean())
    part = block[0] if place == 0 else model[1]
    given = torch.randn(4, 32, requires_grad=True)
    whole, out = model(x).square().mean(), part(given).square().mean()
    noisy = part.weight.detach().clone()
    whole.backward()
    out.backward()
    expected = given.detach().requires_grad_()
    F.linear(expected, noisy, part.bias).square().mean().backward()
    assert measuring_of(model).holding.held
    torch.testing.assert_close(given.grad, expected.grad)


def test_parameters_are_their_own_between_backward_and_step():
    """Who keeps a copy of them there, to put back in place of a step that is rejected, keeps no noise."""
    model, optimizer = trained(1)
    own = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(3):
        lm_loss(model, ids()).backward()
        kept = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.step()
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), kept, strict=True):
                parameter.copy_(value)
        optimizer.zero_grad()
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), own, strict=True))
    assert measuring_of(model).draws > 0


def test_curvature_at_noisy_weights_is_left_out():
    model, optimizer = trained(FIRST)
    weights = [weight for weight in measuring_of(model).weights if weight.curvature.ema is not None]
    before, seen = [weight.curvature.ema.clone() for weight in weights], []
    for step in (FIRST, FIRST + 1):
        begun, measuring_of(model).amplitude = measuring_of(model).begun, 4.0
        one_step(model, optimizer, lambda m: lm_loss(m, ids(seed=5)))
        after = [weight.curvature.ema.clone() for weight in weights]
        same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
        assert same == [measuring_of(model).begun > begun] * len(weights), step
        before, seen = after, [*seen, same[0]]
    assert True in seen and False in seen


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_optimizer_for_each_weight_measures_as_one_does(momentum):
    told = []
    for apart in (False, True):
        torch.manual_seed(0)
        model = lotion_fx.transform(LM(), "int4", inner="aot_eager")
        parameters = list(model.parameters())
        groups = [[parameter] for parameter in parameters] if apart else [parameters]
        optimizers = [torch.optim.SGD(group, 0.0, momentum=momentum) for group in groups]
        for step in range(10):
            lm_loss(model, ids(seed=step)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        measuring = measuring_of(model)
        told.append((measuring.draws, measuring.amplitude, *measuring.common))
    assert told[0] == pytest.approx(told[1], rel=5e-5) and told[0][0] > FIRST  # sums of float32 in another order


def test_a_skipped_step_is_measured_with_the_next():
    model, optimizer = trained(1)
    own = model.head.weight.detach().clone()
    lm_loss(model, ids()).backward()
    optimizer.zero_grad()
    lm_loss(model, ids()).backward()
    optimizer.step()
    assert measuring_of(model).draws == 1 and torch.equal(model.head.weight, own)


def test_parts_of_a_weight_draw_what_the_whole_does():
    whole = uniforms(7, torch.arange(24).view(4, 6))
    assert torch.equal(whole[1:3], uniforms(7, torch.arange(6, 18).view(2, 6)))
    many = uniforms(3, torch.arange(200_000))
    assert abs(many.mean() - 0.5) < 3e-3 and abs(many.var() - 1 / 12) < 1e-3 and many.min() >= 0 and many.max() < 1
    assert abs(torch.corrcoef(torch.stack([many, uniforms(4, torch.arange(200_000))]))[0, 1]) < 0.01


# ------------------------------------------------------------------------------------------------------- when and where


def test_measurements_become_rare():
    model, optimizer = trained(0, make=MLP)
    at = []
    for step in range(2 * EVERY):
        before = measuring_of(model).begun
        one_step(model, optimizer, lambda m: m(torch.ones(4, 20)).square().mean())
        at += [step] * (measuring_of(model).begun - before)
    assert at[:FIRST] == list(range(1, FIRST + 1)) and len(at) < 11
    measuring_of(model).next_at = 0
    measuring_of(model).hold(10_000)
    assert measuring_of(model).next_at == 10_000 + EVERY


def test_the_next_measurement_comes_after_as_many_steps_as_there_were():
    measuring = measuring_of(trained(1)[0])
    measuring.begun, at, found = FIRST, FIRST, []
    while at < 600 and len(found) < 10:
        measuring.hold(at)
        found.append(at := measuring.next_at)
    assert found == [4, 8, 16, 32, 64, 128, 256, 456, 656]


@pytest.mark.parametrize(
    "now, seen, widest, then",
    [
        (1.0, LITTLE, 100.0, 1.0),  # as it should be
        (1.0, MUCH, 100.0, 1.0),
        (1.0, LITTLE / 2, 100.0, 2.0),
        (1.0, LITTLE / 100, 100.0, CHANGE),  # not further at once
        (4.0, LITTLE / 4, 1.0, 2.0),  # half as wide as the weights
        (2.0, LITTLE / 4, 0.25, 1.0),  # rounding itself is wider
        (4.0, LITTLE * 8, 100.0, 1.0),  # rounding itself shows
        (1.0, MUCH * 2, 100.0, 0.5),
        (0.5, MUCH * 100, 100.0, LEAST),
        (2.0, 0.0, 100.0, 2.0),  # nothing was predicted
    ],
)
def test_noise_is_scaled_until_the_increase_shows(now, seen, widest, then):
    assert next_amplitude(now, seen, widest) == then


@pytest.mark.parametrize("options", [{"calibrate": False}, {"method": "ste"}, {"strength": 0.0}])
def test_where_nothing_is_measured_every_step_is_as_before(options):
    model, _ = trained(2, **options)
    own = model.head.weight.detach().clone()
    lm_loss(model, ids()).backward()
    assert torch.equal(model.head.weight, own) and measuring_of(model).begun == 0
    assert lotion_fx.report(model).size is None


def test_the_first_step_has_no_term_and_the_second_its_measured_one():
    model, optimizer = trained(0)
    plain = LM()
    plain.load_state_dict(model.state_dict())
    given = []
    optimizer.register_step_post_hook(lambda *_: given.append(model.head.weight.grad.clone()))
    run(model, optimizer, 2)
    lm_loss(plain, ids(seed=0)).backward()
    torch.testing.assert_close(given[0], plain.head.weight.grad)
    weight = registry[model.head.weight]
    assert (
        measuring_of(model).draws == 1 and measuring_of(model).factor(weight, 2) == measuring_of(model).size(weight) > 0
    )


def test_a_closure_compares_losses_at_the_weights_themselves():
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager")
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = lm_loss(model, ids())
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    measuring = measuring_of(model)
    assert measuring.draws == 0 and measuring.factor(registry[model.head.weight], 1) == pytest.approx(1, rel=1e-6)


def test_own_calibration_stands():
    model, optimizer = trained(3, rate=1e-3)
    lotion_fx.calibrate(model, [(ids(), ids().flatten())], lambda out, y: F.cross_entropy(out.flatten(0, 1), y))
    run(model, optimizer, 2)
    assert lotion_fx.report(model).size is None and not measuring_of(model).is_on


def test_micro_batches_measure_as_one_batch():
    reports = []
    for parts in (1, 4):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = lotion_fx.transform(LM(), "int4", inner="aot_eager")
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for step in range(4):
            for part in ids(32, seed=step).chunk(parts):
                (lm_loss(model, part) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        reports.append(lotion_fx.report(model))
    assert reports[1].size == pytest.approx(reports[0].size, rel=1e-4)
    assert reports[1].term == pytest.approx(reports[0].term, rel=1e-4)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_resume_amid_the_first_measurements_is_bit_identical(optimizer):
    def make():
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = lotion_fx.transform(LM(), "int4", inner="aot_eager")
        return model, optimizer(model.parameters(), 1e-2)

    whole, steps = make()
    run(whole, steps, 3)
    saved = copy.deepcopy((whole.state_dict(), steps.state_dict(), lotion_fx.state_dict(whole)))
    run(whole, steps, 4)
    resumed, steps = make()
    resumed.load_state_dict(saved[0])
    steps.load_state_dict(saved[1])
    lotion_fx.load_state_dict(resumed, saved[2])
    run(resumed, steps, 4)
    assert all(map(torch.equal, resumed.parameters(), whole.parameters()))
    assert lotion_fx.report(resumed).to_dict() == lotion_fx.report(whole).to_dict()


@pytest.mark.parametrize("fmt", ["int3", "int2/tensor"])
@pytest.mark.parametrize("curvature", ["factored", "fisher"])
@pytest.mark.parametrize("strength", [1.0, 30.0, 1e3])
def test_no_strength_ends_in_nan_where_momentum_gathers(strength, curvature, fmt):
    """Terms bound by the largest weight drove that up, and themselves with it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    model = lotion_fx.transform(net, fmt, inner="aot_eager", curvature=curvature, strength=strength)
    x = torch.randn(512, 32)
    y = x[:, :8].argmax(-1)
    steps = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(150):
        one_step(model, steps, lambda m: F.cross_entropy(m(x), y))
    assert max(float(p.detach().abs().max()) for p in model.parameters()) < 10


@pytest.mark.parametrize("curvature", ["factored", "fisher"])
def test_gradients_that_a_loop_zeroes_have_no_term_beyond_their_bound(curvature):
    """By what they shrank is 0: a bound that is divided by it is no number."""
    torch.manual_seed(0)
    model = lotion_fx.transform(MLP(), "int4", inner="aot_eager", curvature=curvature, strength=30.0)
    steps = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(4):
        F.cross_entropy(model(torch.randn(16, 20)), torch.arange(16) % 7).backward()
        for p in model.parameters():
            p.grad.mul_(0.0)
        steps.step()
        steps.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("curvature", ["factored", "fisher"])
def test_no_strength_ends_in_nan(curvature, optimizer):
    for reduction, strength in (("mean", 1e3), ("sum", 1.0), ("sum", 1e3)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = lotion_fx.transform(MLP(), "int4", inner="aot_eager", curvature=curvature, strength=strength)
        x, y = torch.randn(256, 20), torch.randint(0, 7, (256,))
        steps = optimizer(model.parameters(), 1e-3)
        for _ in range(30):
            one_step(model, steps, lambda m, x=x, y=y, r=reduction: F.cross_entropy(m(x), y, reduction=r))
        assert all(p.isfinite().all() for p in model.parameters()), (reduction, strength)


@pytest.mark.parametrize("fmt", ["int2/tensor", "int3/tensor", "int2/channel", "int2"])
def test_the_terms_of_many_weights_under_one_scale_do_not_feed_themselves(fmt):
    """The largest weight's gradient has the terms of all; its square enters the moment that its own term is made of."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 64), nn.GELU(), nn.Linear(64, 10))
    model = lotion_fx.transform(net, fmt, inner="aot_eager", curvature="fisher")
    x, y = torch.randn(2048, 256), torch.randint(0, 10, (2048,))
    steps = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(100):
        rows = slice(step * 128 % 2048, step * 128 % 2048 + 128)
        one_step(model, steps, lambda m, rows=rows: F.cross_entropy(m(x[rows]), y[rows]))
    largest = max(float(steps.state[p]["exp_avg_sq"].max()) for p in model.parameters())
    assert largest < 1 and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("fmt", ["int4", "int3"])
def test_a_term_made_of_a_second_moment_does_not_feed_it(fmt):
    """Where a loss is learned its gradient vanishes, and squares of the term are all that the moment is of."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    model = lotion_fx.transform(net, fmt, inner="aot_eager", curvature="fisher")
    x = torch.randn(2048, 32)
    y = x[:, :8].argmax(-1)
    steps = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(200):
        one_step(model, steps, lambda m: F.cross_entropy(m(x), y))
    assert F.cross_entropy(model(x), y) < 0.1  # nan in 137 steps before


def test_counted_models_tell_their_count():
    model = counted(LM(), "int4", inner="aot_eager")
    run(model, torch.optim.Adam(model.parameters(), 0.0), 2)
    assert "measured" not in str(lotion_fx.report(model))
    model, _ = trained(2)
    assert "measured in 1 steps" in str(lotion_fx.report(model))


def test_beliefs_follow_their_weights():
    """A model gets a head and loses one while it trains."""
    model, optimizer = trained(4, rate=1e-3)
    measuring = measuring_of(model)
    known = registry[model.mlp[0].weight]
    row = measuring._own.density[measuring.weights.index(known)].clone()
    assert not torch.equal(row, measuring._own.density[0])
    model.head = nn.Linear(16, model.head.out_features, bias=False)
    optimizer.add_param_group({"params": model.head.parameters()})
    lotion_fx.report(model)
    measuring._align()
    assert torch.equal(measuring._own.density[measuring.weights.index(known)], row)
    assert registry[model.head.weight] in measuring.weights
    drawn, measuring.next_at = measuring.draws, 0
    run(model, optimizer, 6)
    assert measuring.draws > drawn and measuring.size(registry[model.head.weight]) > 0


def test_a_state_of_other_weights_tells_the_common_size_alone():
    model, _ = trained(5)
    saved = measuring_of(model).saved()
    other = lotion_fx.transform(MLP(), "int4", inner="aot_eager")
    measuring = measuring_of(other)
    measuring.restore(saved)
    assert measuring.common == measuring_of(model).common
    assert measuring.size(registry[other.up.weight]) == measuring.common[0]


def test_a_state_of_before_is_measured_anew():
    model, _ = trained(5)
    saved = {name: value for name, value in measuring_of(model).saved().items() if name != "offset"}
    other, _ = trained(4)
    optimizer, measuring = torch.optim.Adam(other.parameters(), 0.0), measuring_of(other)
    measuring.restore(saved)
    assert measuring.draws == 0 and measuring.size(registry[other.head.weight]) == 1.0
    run(other, optimizer, 2)
    assert measuring.draws > 0


def test_own_calibration_stands_after_a_resume():
    model, _ = trained(3, rate=1e-3)
    lotion_fx.calibrate(model, [(ids(), ids().flatten())], lambda out, y: F.cross_entropy(out.flatten(0, 1), y))
    resumed = lotion_fx.transform(LM(), "int4", inner="aot_eager")
    lotion_fx.load_state_dict(resumed, lotion_fx.state_dict(model))
    assert not measuring_of(resumed).is_on
