"""What `benchmarks/accuracy.py` trains and keeps: a fork is a run from the start, a kept model is not trained again."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import runs, training
from accuracy.recipes import RECIPES
from accuracy.text import Text
from accuracy.training import Trainings

import lotion_fx

SETTING = Text(steps=10, windows=64, inner="aot_eager")


@pytest.fixture(scope="module")
def trainings(tmp_path_factory) -> Trainings:
    return Trainings(SETTING, tmp_path_factory.mktemp("trained"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ste_from_fp", "late_start"])
def test_a_forked_run_is_the_one_from_the_start_bit_for_bit(trainings, name):
    model = SETTING.make(1)
    lotion_fx.transform(model, "int3", **RECIPES[name].arguments, steps=SETTING.steps, inner=SETTING.inner)
    torch.manual_seed(1)
    SETTING.fit(model, 1, SETTING.optimizer(model.parameters()), 0, lambda step: None)
    forked, whole = trainings.trained(name, "int3", 1).state, model.state_dict()
    assert all(torch.equal(forked[key], whole[key]) for key in whole)
    plain = trainings.full_precision(1).state
    assert not any(torch.equal(forked[key], plain[key]) for key in whole if "qkv" in key)


@pytest.mark.slow
def test_a_kept_model_is_not_trained_again(trainings, monkeypatch):
    first = trainings.trained("lotion", "int3", 1)
    monkeypatch.setattr(training.Trainings, "_fit", None)
    again = Trainings(SETTING, trainings.folder).trained("lotion", "int3", 1)
    assert (again.latent, again.seconds) == (first.latent, first.seconds)
    assert all(torch.equal(again.state[key], first.state[key]) for key in first.state)
    assert trainings.trained("ptq", "int3", 1) is not None  # full precision itself
    with pytest.raises(TypeError):
        trainings.trained("lotion", "int3", 2)


@pytest.mark.slow
def test_losses_are_at_the_weights_that_are_deployed(trainings):
    """Full precision's own run, PTQ by hand, and LSQ, whose latent weights are not what it deploys."""
    full = trainings.full_precision(1)
    found = runs.run(runs.Job(SETTING, "fp32", "ptq", "nearest", 1), trainings)
    assert found.method == "full_precision" and found.excess == 0 and found.loss == full.latent
    model = SETTING.make(0)
    model.load_state_dict(full.state)
    assert SETTING.evaluate(model) == full.latent
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("qkv", "out", "up", "down", "head")):
                parameter.copy_(lotion_fx.rounding.rtn(parameter, lotion_fx.resolve("int2")))
    found = runs.run(runs.Job(SETTING, "int2", "ptq", "nearest", 1), trainings)
    assert found.loss == pytest.approx(SETTING.evaluate(model), abs=1e-6)
    assert found.latent == found.full_precision == full.latent and found.excess > 1e-3
    learned = runs.run(runs.Job(SETTING, "int2", "lsq", "nearest", 1), trainings)
    assert learned.loss != learned.latent and math.isfinite(learned.loss)


@pytest.mark.slow
def test_distilled_runs_learn_the_teacher(trainings):
    """Only what comes after the first phase differs from the run on the targets."""
    plain, taught = (trainings.trained(name, "int3", 1) for name in ("ste_from_fp", "ste_distilled"))
    assert any(not torch.equal(plain.state[key], taught.state[key]) for key in plain.state)
