"""What a training loop does between a forward and the step, and the measured size of the term.

Broken once and seen red: a waiting model's forward that measures, dropped passes that count, clipped gradients taken
for the loss's own.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx.clipping import Clipping
from lotion_fx.held import clipping_of
from lotion_fx.state import registry

X = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 10, (64,), generator=torch.Generator().manual_seed(2))


def made(width=10, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, width))
    return lotion_fx.transform(net, "int4", inner="aot_eager", **options)


def cross_entropy(model, **options):
    return F.cross_entropy(model(X), LABELS, **options)


def term_after(steps, spoil=lambda model, optimizer, step: None, after=lambda model, step: None, **options):
    """The report of a model that stays as it is after so many steps on one batch.

    Args:
        spoil: called with model, optimizer and step before each step's own pass.
        after: called with model and step between that pass and the step.
    """
    model = made(**options)
    optimizer = torch.optim.Adam(model.parameters(), 1e-30)
    for step in range(steps):
        spoil(model, optimizer, step)
        optimizer.zero_grad()
        cross_entropy(model).backward()
        after(model, step)
        optimizer.step()
    return lotion_fx.report(model)


def test_a_frozen_model_s_forwards_measure_nothing():
    """A discriminator waits while the generator learns through it: its turn to be measured is kept for it."""
    found = {}
    for freezes in (False, True):
        critic, generator = made(1), nn.Linear(32, 32)
        optimizers = [torch.optim.SGD(each.parameters(), 0.0) for each in (critic, generator)]
        for _ in range(20):
            made_up = generator(X)
            optimizers[0].zero_grad()
            (64 * ((critic(X) - 1).square().mean() + critic(made_up.detach()).square().mean())).backward()
            optimizers[0].step()
            critic.requires_grad_(not freezes)
            optimizers[1].zero_grad()
            (critic(made_up) - 1).square().mean().backward()
            optimizers[1].step()
            critic.requires_grad_(True)
        found[freezes] = lotion_fx.report(critic)
    assert not found[True].unmeasured and found[True].measurements == found[False].measurements
    assert found[True].term == pytest.approx(found[False].term, rel=0.5)


def test_a_model_of_which_no_weight_can_be_measured_says_so(monkeypatch):
    """As where shards cut every block: its term stands as it was counted."""
    monkeypatch.setattr(lotion_fx.measuring, "can_be_measured", lambda weight: False)
    found = term_after(6)
    assert "none of 5 measurements told anything" in found.unmeasured and found.size is None and found.term > 0


def attack(model, optimizer, step):
    """Of the inputs, by a backward pass of a sum that leaves gradients nobody wants."""
    cross_entropy(model, reduction="sum").backward()


def skipped_spike(model, optimizer, step):
    """One batch's loss is a thousand times as large in the first step that measures, and its step is left out."""
    if step == 1:
        optimizer.zero_grad()
        (1000 * cross_entropy(model)).backward()


@pytest.mark.parametrize("curvature", ["factored", "fisher"])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("spoil", [attack, skipped_spike])
def test_gradients_that_were_dropped_tell_no_size(spoil, set_to_none, curvature):
    def spoiled(model, optimizer, step):
        spoil(model, optimizer, step)
        optimizer.zero_grad(set_to_none=set_to_none)

    plain, other = term_after(12, curvature=curvature), term_after(12, spoiled, curvature=curvature)
    assert other.term == pytest.approx(plain.term, rel=0.05) and other.size == pytest.approx(plain.size, rel=0.05)


@pytest.mark.parametrize("factor", [1e-3, 1e-1])
def test_one_scaled_step_is_not_all_of_them(factor):
    """Clipping that catches the first step that measures, as it does at the beginning of a training."""

    def scaled(model, step):
        for parameter in model.parameters():
            parameter.grad.mul_(factor if step == 1 else 1.0)

    plain, other = term_after(20), term_after(20, after=scaled)
    assert other.term == pytest.approx(plain.term, rel=0.15)


def terms_by_weight(model):
    return {row.name: row.term for row in lotion_fx.report(model).rows if row.format}


def test_each_optimizer_s_gradients_are_clipped_by_themselves():
    """One of two, the other one not; one of both ascends, which is no scaling."""
    found = {}
    for factor in (1.0, 0.01):
        model = made()
        optimizers = [torch.optim.Adam(model[place].parameters(), 1e-30, maximize=place == 0) for place in (0, 2)]
        for _ in range(12):
            cross_entropy(model).backward()
            for parameter in model[0].parameters():
                parameter.grad.mul_(factor)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        found[factor] = terms_by_weight(model)
    assert found[0.01]["0.weight"] == pytest.approx(0.01 * found[1.0]["0.weight"], rel=1e-3)
    assert found[0.01]["2.weight"] == pytest.approx(found[1.0]["2.weight"], rel=1e-3)


@pytest.mark.parametrize("unscales", [True, False])
def test_a_loss_scale_is_no_factor_of_the_loop(unscales):
    """A GradScaler's, of which a loop may unscale gradients itself to clip them."""
    found = {}
    for scale, factor in ((1.0, 1.0), (4096.0, 0.1 if unscales else 1.0)):
        model = made()
        optimizer = torch.optim.Adam(model.parameters(), 1e-30)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(8):
            scaler.scale(cross_entropy(model)).backward()
            if unscales:
                scaler.unscale_(optimizer)
            for parameter in model.parameters() if unscales else ():
                parameter.grad.mul_(factor)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found[factor, scale] = lotion_fx.report(model).term
    plain, other = found.values()
    assert other == pytest.approx((0.1 if unscales else 1.0) * plain, rel=1e-3)


def test_gradients_that_were_replaced_are_not_scaled_ones():
    """A third of what it was; one that points elsewhere; one that vanished: the last two keep what was told before."""
    product, seen, now = (torch.tensor(each, dtype=torch.float64) for each in ([3, 5, 0], [9, 9, 9], [1, 9, 0]))
    factor, told = clipping_of([product, seen, now], [1.0, 0.5, 0.25])
    assert factor.tolist() == pytest.approx([1 / 3, 0.5, 0.25]) and told.tolist() == [True, False, False]


@pytest.mark.parametrize("options", [{}, {"curvature": "full"}, {"curvature": "ggn"}, {"refresh": 8}, {"refresh": 3}])
@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_the_term_is_scaled_as_gradients_are(factor, options):
    """By the loop, in each step between backward and step; also in those that gather no curvature."""

    def scaled(model, step):
        for parameter in model.parameters():
            parameter.grad.mul_(factor)

    plain, other = term_after(12, **options), term_after(12, after=scaled, **options)
    assert other.term == pytest.approx(factor * plain.term, rel=1e-2)


@pytest.mark.parametrize("at", [1, 5])
def test_a_step_that_a_fused_kernel_leaves_out_is_none(at):
    """A GradScaler leaves other optimizers' out by itself; both trainings are the same."""
    models = [made(), made()]
    for model, fused in zip(models, (False, True), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
        for step in range(9):
            scaler.scale(cross_entropy(model) * (torch.inf if step == at else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert lotion_fx.report(model).steps == optimizer.state[model[0].weight]["step"] == 8
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_factor_of_the_loop_is_resumed():
    """Bit for bit, from what the optimizer's own state carries."""

    def stepped(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            F.cross_entropy(model(X + 0.1 * step), LABELS).backward()
            for parameter in model.parameters():
                parameter.grad.mul_(0.1 if step < 4 else 0.5)
            optimizer.step()

    models = [made() for _ in range(2)]
    whole, first = [torch.optim.Adam(model.parameters(), 1e-3) for model in models]
    stepped(models[0], whole, range(12))
    stepped(models[1], first, range(7))
    resumed = made()
    second = torch.optim.Adam(resumed.parameters(), 1e-3)
    resumed.load_state_dict(models[1].state_dict())
    second.load_state_dict(first.state_dict())
    stepped(resumed, second, range(7, 12))
    for one, other in zip(models[0].parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert lotion_fx.report(resumed).size == lotion_fx.report(models[0]).size


def test_a_moment_of_almost_nothing_is_no_infinite_curvature():
    """The mean square of clipping so strong that float32 holds no inverse of it, and squares that are 0 for it."""
    clipping = Clipping()
    clipping.told(torch.tensor(1e-20), 0.999, 0)
    factor = clipping.over_moment(torch.tensor(64.0), 1, 0.999)
    assert factor.isfinite() and factor * 0.0 == 0 and factor > 1e25


@pytest.mark.parametrize("reduction, size", [("mean", 1.0), ("sum", 1 / 64)])
def test_what_cannot_be_measured_is_told_by_the_output_s_gradients(reduction, size):
    """LBFGS compares losses, so that none of its forwards may be at other weights; a sum's term is not T times it."""
    terms, values = {}, []
    for strength in (0.0, 1.0):
        torch._dynamo.reset()
        model = made(strength=strength)
        optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=4)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = cross_entropy(model, reduction=reduction)
            loss.backward()
            return loss

        values += [optimizer.step(closure).item() for _ in range(8)]
        terms[strength] = lotion_fx.report(model)
    assert all(value < values[0] + 1e-6 for value in values)  # none is nan, nor is any of strength 1 far from 0's
    tally = next(iter(registry.owned[model[0]].values())).smoothing.tally
    assert [tally.measuring.size(weight) for weight in tally.weights] == pytest.approx([size] * 4, rel=0.02)
    assert terms[1.0].size is None
    assert ("times the count" in terms[1.0].unmeasured) == (reduction == "sum")
    again = made()
    lotion_fx.load_state_dict(again, lotion_fx.state_dict(model))
    assert lotion_fx.report(again).unmeasured == terms[1.0].unmeasured


@pytest.mark.parametrize("fused", [False, True])
def test_a_measurement_that_overflows_begins_anew(fused):
    """A GradScaler skips the step that was to tell it, or a fused kernel does."""
    model = made()
    optimizer = torch.optim.Adam(model.parameters(), 1e-30, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(40):
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model)).backward()
        if step in (1, 2, 3):  # the first steps that measure
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    plain = term_after(37)
    assert lotion_fx.report(model).measurements == plain.measurements
    assert lotion_fx.report(model).size[0] == pytest.approx(plain.size[0], rel=0.3)


@pytest.mark.parametrize("options", [{"method": "ste"}, {"schedule": (("plain", 0.9), ("lotion", 0.1)), "steps": 100}])
def test_where_no_term_is_nothing_is_gathered_for_its_size(options):
    torch._dynamo.reset()
    model = made(**options)
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    tally = next(iter(registry.owned[model[0]].values())).smoothing.tally
    assert tally.measuring.residuals.taken() is None


@pytest.mark.parametrize("looks_after_backward", [False, True])
def test_a_loop_that_skips_spikes_goes_on(looks_after_backward):
    """A measuring step's loss may be one. Its noise stays until an optimizer steps, unless more forwards come."""
    model = made()
    optimizer, taken, usual = torch.optim.Adam(model.parameters(), 1e-30), [], None
    for _ in range(30):
        loss = cross_entropy(model)
        if looks_after_backward:
            loss.backward()
        is_spike = usual is not None and abs(loss.item() - usual) > 1e-6
        taken.append(not is_spike)
        if not is_spike:
            usual = loss.item()
            if not looks_after_backward:
                loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    assert 0 < taken.count(False) <= 10 and all(taken[-4:])  # two of each of five measurements
    assert "none of" in lotion_fx.report(model).unmeasured


def measured(passes):
    """How many steps told the size, of 40 of so many passes each."""
    model = made()
    optimizer = torch.optim.Adam(model.parameters(), 1e-30)
    for step in range(40):
        for _ in range(passes(step)):
            (cross_entropy(model) / passes(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return lotion_fx.report(model).measurements


@pytest.mark.parametrize(
    "passes",
    [lambda step: 4, lambda step: 1 + 3 * (step > 3), lambda step: 1 + step * 5 % 12],
    ids=["4", "1, then 4", "1 to 12"],
)
def test_passes_of_one_step_are_no_reason_to_give_up(passes):
    """As under accumulation: their gradients are there."""
    assert measured(passes) == measured(lambda step: 1) > 3


def test_what_another_rank_gave_up_tells_nothing(monkeypatch):
    """Or ranks would believe different sizes."""
    monkeypatch.setattr(lotion_fx.measuring, "summed", lambda value, group: value + 1)
    assert measured(lambda step: 1) == 0
