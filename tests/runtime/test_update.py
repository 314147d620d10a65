"""One weight's update: what a step does to its curvature state, and to the weight over a training."""

import copy

import pytest
import torch

import lotion_fx
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
