"""What is no argument is refused in one sentence that names it, before anything is changed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from tests.models import LM, MLP, ids

BAD = [
    (dict(strength="a"), TypeError, "strength='a', of type str: expected a finite number"),
    (dict(strength=None), TypeError, "strength=None"),
    (dict(strength=True), TypeError, "strength=True"),
    (dict(strength=torch.ones(())), TypeError, "strength=tensor"),
    (dict(strength=float("nan")), ValueError, "strength=nan"),
    (dict(decay="a"), TypeError, "decay='a', of type str: expected a number between 0 and 1"),
    (dict(decay=1), ValueError, "decay=1: expected a number between 0 and 1"),
    (dict(finish="a", steps=9), TypeError, "finish='a'.*a share of the training"),
    (dict(finish=True, steps=9), TypeError, "finish=True"),
    (dict(finish=0.4, steps=1.5), ValueError, "steps=1.5.*a whole number"),
    (dict(finish=0.4, steps="9"), TypeError, "steps='9'.*a whole number"),
    (dict(finish=0.4, steps=True), TypeError, "steps=True"),
    (dict(finish_term=None), TypeError, "finish_term=None: expected True or False"),
    (dict(start=1.5, steps=9), ValueError, "start=1.5: expected a share of the training"),
    (dict(start=0.6, finish=0.5, steps=9), ValueError, "start=0.6 and finish=0.5: expected shares.*at most 1"),
    (dict(start=0.6), ValueError, "start=0.6 has phases.*pass steps="),
    (dict(steps=9), ValueError, "steps=9: method='lotion' has no phases.*leave it out"),
    (dict(schedule="auto"), ValueError, "schedule='auto' has phases.*pass steps="),
    (dict(schedule="late", steps=9), ValueError, "schedule='late': expected pairs of a phase and its share.*'auto'"),
    (dict(schedule=3, steps=9), TypeError, "schedule=3: expected pairs"),
    (dict(schedule=[], steps=9), ValueError, r"schedule=\[\]: expected pairs"),
    (dict(schedule=["plain"], steps=9), TypeError, "schedule: 'plain' is no phase with its share"),
    (dict(schedule=[("plan", 1.0)], steps=9), ValueError, "schedule: phase='plan'.*did you mean 'plain'"),
    (dict(schedule=[("plain", "x")], steps=9), TypeError, "schedule: share of 'plain'='x'"),
    (dict(schedule=[("plain", 0.0), ("ste", 1.0)], steps=9), ValueError, "share of 'plain'=0.0: expected a number in"),
    (dict(schedule=[("plain", 0.6), ("ste", 0.3)], steps=9), ValueError, "add to 1, and these add to 0.9"),
    (dict(schedule=[("ste", 1.0)], start=0.1, steps=9), ValueError, "start=0.1 is a schedule of its own"),
    (dict(schedule=[("ste", 1.0)], method="ste", steps=9), ValueError, "method='ste' is a schedule of its own"),
    (dict(schedule=[("ste", 1.0)], steps=9, loss_fn="model"), ValueError, "a schedule of ste has no expected loss"),
    (dict(curvature="ggn", refresh=True), TypeError, "refresh=True.*a whole number"),
    (dict(curvature="ggn", refresh=0), ValueError, "refresh=0: expected of how many steps.*1 or more"),
    (dict(refresh=2.5), ValueError, "refresh=2.5"),
    (dict(curvature="ggn", likelihood=[1]), ValueError, r"likelihood=\[1\]"),
    (dict(loss_fn="mse"), ValueError, "loss_fn='mse': expected a function.*'model'"),
    (dict(loss_fn=3), TypeError, "loss_fn=3: expected a function"),
    (dict(loss_fn=nn.MSELoss), TypeError, r"loss_fn=MSELoss.*MSELoss\(\)"),
    (dict(fmt=None), TypeError, "fmt=None: expected a format name"),
    (dict(fmt=["int4"]), TypeError, r"fmt=\['int4'\]: expected a format name"),
    (dict(regions=5), TypeError, "regions=5: expected the modules"),
    (dict(regions="mlp"), TypeError, "regions='mlp': expected the modules"),
    (dict(regions=["mlp"]), TypeError, "regions: expected modules of the model, got 'mlp'"),
    (dict(dynamic="yes"), TypeError, "dynamic='yes': expected True or False"),
    (dict(fullgraph=1), TypeError, "fullgraph=1: expected True or False"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[str(bad[0]) for bad in BAD])
def test_transform_refuses(arguments, error, message):
    model = LM()
    with pytest.raises(error, match=message) as raised:
        lotion_fx.transform(model, **arguments)
    assert "\n" not in str(raised.value)
    lotion_fx.transform(model)  # nothing was changed


def test_numbers_of_other_libraries_are_numbers():
    lotion_fx.transform(
        MLP(), strength=np.float32(0.5), decay=np.float64(0.9), finish=np.float32(0.5), steps=np.int64(9)
    )


def test_regions_that_are_one_module():
    model = LM()
    with pytest.raises(TypeError, match=r"regions=Linear.*regions=\[module\]"):
        lotion_fx.transform(model, regions=model.head)
    model.parts = nn.ModuleDict({"a": nn.Linear(2, 2)})
    with pytest.raises(TypeError, match=r"regions=list\(modules.values\(\)\)"):
        lotion_fx.transform(model, regions=model.parts)
    with pytest.raises(ValueError, match="a ModuleDict is never called"):
        lotion_fx.transform(model, regions=[model.parts])
    lotion_fx.transform(model, regions=model.mlp)  # a Sequential is its modules


@pytest.mark.parametrize("model", [None, "gpt2", nn.Linear, [nn.Linear(2, 2)], dict(LM().named_parameters())])
def test_a_model_that_is_none(model):
    with pytest.raises(TypeError, match="model=.*expected an nn.Module, not") as raised:
        lotion_fx.transform(model)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200
    for call in (lotion_fx.report, lotion_fx.explain, lotion_fx.penalty, lotion_fx.state_dict, lotion_fx.finish):
        with pytest.raises(TypeError, match="model=.*expected a transformed nn.Module"):
            call(model)
    for context in (lotion_fx.full_precision, lotion_fx.randomized):
        with pytest.raises(TypeError, match="expected a transformed nn.Module"), context(model):
            pass


# --------------------------------------------------------------------------------------------------------- other calls


@pytest.fixture(scope="module")
def model():
    return lotion_fx.transform(MLP(), "int4", inner="aot_eager")


BATCH = torch.randn(8, 20), torch.randn(8, 7)

CALLS = [
    (lambda m: lotion_fx.expected_loss(m, BATCH, "mse"), ValueError, "loss_fn='mse': expected a function.*None where"),
    (lambda m: lotion_fx.expected_loss(m, BATCH, 3), TypeError, "loss_fn=3"),
    (lambda m: lotion_fx.expected_loss(m, BATCH, F.mse_loss, samples="a"), TypeError, "samples='a'"),
    (lambda m: lotion_fx.expected_loss(m, BATCH, F.mse_loss, samples=2.5), ValueError, "samples=2.5"),
    (lambda m: lotion_fx.expected_loss(m, BATCH, F.mse_loss, samples=1, generator=3), TypeError, "generator=3"),
    (lambda m: lotion_fx.calibrate(m, [BATCH], "mse"), ValueError, "loss_fn='mse'"),
    (lambda m: lotion_fx.calibrate(m, 5), TypeError, r"batches=5: expected an iterable of batches.*\[batch\]"),
    (lambda m: lotion_fx.calibrate(m, "ab"), TypeError, "batches='ab'"),
    (lambda m: lotion_fx.calibrate(m, {"x": 1}), TypeError, "batches={'x': 1}"),
    (lambda m: lotion_fx.calibrate(m, BATCH[0]), TypeError, "batches=tensor"),
    (lambda m: lotion_fx.calibrate(m, [BATCH], F.mse_loss, samples=None), TypeError, "samples=None"),
    (lambda m: lotion_fx.calibrate(m, [BATCH], F.mse_loss, every=2.5), ValueError, "every=2.5"),
    (lambda m: lotion_fx.calibrate(m, [BATCH], F.mse_loss, every=True), TypeError, "every=True"),
    (lambda m: lotion_fx.finish(m, term="no"), TypeError, "term='no': expected True or False"),
    (
        lambda m: lotion_fx.load_state_dict(m, None),
        TypeError,
        "state=None: expected what lotion_fx.state_dict returned",
    ),
    (lambda m: lotion_fx.load_state_dict(m, m.state_dict()), ValueError, "version None with keys up.weight"),
    (lambda m: lotion_fx.load_state_dict(m, {"version": 1}), ValueError, "with keys version"),
    (lambda m: lotion_fx.codebook(None), TypeError, "levels=None: expected 2 to 256 numbers"),
    (lambda m: lotion_fx.codebook("12"), TypeError, "levels='12'"),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS, ids=[bad[2] for bad in CALLS])
def test_other_calls_refuse(call, error, message, model):
    with pytest.raises(error, match=message) as raised:
        call(model)
    assert "\n" not in str(raised.value)


def test_the_model_s_own_loss_goes_by_the_name_that_transform_has_for_it():
    class WithLoss(MLP):
        def forward(self, x, y):
            return F.mse_loss(super().forward(x), y)

    model = lotion_fx.transform(WithLoss(), "int4", inner="aot_eager")
    found = [float(lotion_fx.expected_loss(model, BATCH, loss).total.detach()) for loss in (None, "model")]
    assert found[0] == found[1]


# ---------------------------------------------------------------------------------------------------------- saved state


def test_a_state_of_other_formats_is_refused():
    saved = lotion_fx.state_dict(lotion_fx.transform(LM(), "int8", inner="aot_eager"))
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager")
    with pytest.raises(ValueError, match="'token.weight' in int8, this model has it in int4; .* same fmt and only"):
        lotion_fx.load_state_dict(model, saved)
    other = lotion_fx.transform(LM(), "int8", only={"head.*": None}, inner="aot_eager")
    with pytest.raises(ValueError, match="'head.weight' in int8, this model has it in full precision"):
        lotion_fx.load_state_dict(other, saved)
    lotion_fx.load_state_dict(lotion_fx.transform(LM(), "int8", inner="aot_eager"), saved)


def test_a_state_of_before_formats_were_saved_loads():
    model = lotion_fx.transform(LM(), "int8", inner="aot_eager")
    model(ids())
    saved = lotion_fx.state_dict(model)
    for weight in saved["weights"].values():
        del weight["format"]
    lotion_fx.load_state_dict(lotion_fx.transform(LM(), "int4", inner="aot_eager"), saved)
