"""One weight's update: what a step does to its curvature state, and to the weight over a training."""

import copy

import pytest
import torch

import lotion_fx
from lotion_fx.state import registry
from lotion_fx.update import curvature_of, total_of
from tests.models import LM, MLP, counted, ids, lm_loss
from tests.runtime.steps import Recorder, one_step


def test_a_step_that_overflowed_leaves_nothing_behind():
    model = counted(LM(), "int4", inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    scaler.scale(lm_loss(model, ids()) * 1e3).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    before = copy.deepcopy(model)
    recorder = Recorder(model)
    one_step(model, recorder, lambda m: lm_loss(m, ids()))
    counted(before, "int4", inner="aot_eager")
    fresh = Recorder(before)
    one_step(before, fresh, lambda m: lm_loss(m, ids()))
    assert torch.equal(recorder.given["head.weight"], fresh.given["head.weight"])


def test_training_pulls_weights_to_their_levels():
    """At a loss whose gradient is noise, the term alone moves the weights: to where rounding costs less."""

    def final_term(strength):
        torch.manual_seed(0)
        model = counted(MLP(bias=False), "int4/tensor", inner="aot_eager", strength=strength)
        optimizer = torch.optim.SGD(model.parameters(), lr=2e-3)
        x = torch.randn(256, 20)
        target = model(x).detach()
        for _ in range(150):
            one_step(model, optimizer, lambda m: (m(x) - target + torch.randn_like(target)).square().sum(1).mean())
        return lotion_fx.report(model).term

    assert final_term(3.0) < 0.8 * final_term(0.0)


@pytest.mark.parametrize("kind", ["factored", "full", "fisher"])
def test_an_overflowing_step_teaches_nothing(kind):
    """Squares past float32's range, in a step that nothing skips."""
    model = counted(MLP(), "int4", curvature=kind, inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    one_step(model, optimizer, lambda m: m(torch.randn(4, 20)).square().mean())
    before = lotion_fx.penalty(model)
    one_step(model, optimizer, lambda m: m(torch.randn(4, 20)).square().mean() * 1e25)
    assert before > 0 and torch.equal(lotion_fx.penalty(model), before)


@pytest.mark.parametrize("kind", ["factored", "full", "fisher"])
def test_the_sum_of_a_curvature_is_its_elements(kind):
    net = torch.nn.Sequential(torch.nn.Conv1d(8, 12, 3, groups=2), torch.nn.Flatten(), torch.nn.Linear(24, 5))
    model = counted(net, "int4", curvature=kind, inner="aot_eager")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    parameters = [p for p in model.parameters() if p.dim() > 1]
    assert all(float(total_of(registry[p], p)) == 0 for p in parameters)
    for _ in range(3):
        one_step(model, optimizer, lambda m: m(torch.randn(16, 8, 4)).square().mean())
    for p in parameters:
        expected = curvature_of(registry[p], p).sum(dtype=torch.float64)
        assert expected > 0
        torch.testing.assert_close(total_of(registry[p], p)[0], expected, rtol=1e-5, atol=0.0)


def test_between_two_measurements_the_size_moves_against_curvature_that_falls():
    """Squares whose residuals shrink: the loss's curvature stays, and so does the term with it."""
    torch.manual_seed(0)
    model = lotion_fx.transform(torch.nn.Linear(16, 8), "int4", inner="aot_eager")
    measuring = registry[model.weight].smoothing.tally.measuring
    optimizer, x = torch.optim.Adam(model.parameters(), 0.0), torch.randn(256, 16)
    sizes, noise = [], torch.randn(256, 8)
    with torch.no_grad():
        target = x @ model.weight.T + model.bias
    for step in range(60):
        one_step(model, optimizer, lambda m, s=step: (m(x) - target - 0.8**s * noise).square().mean())
        sizes.append(measuring.size(registry[model.weight]))
    starts = [step for step in range(8, 60) if sizes[step] > 1.05 * sizes[step - 1]]
    assert len(starts) > 12  # it is measured at 8, 16 and 32 alone
