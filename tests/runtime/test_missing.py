"""Where curvature does not arrive, the warning and the report name the true cause; where none is due, neither."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from tests.models import LM, MLP, ids, lm_loss


class Bare(nn.Module):
    """Owns its weight, and so has no part to be called."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(23, 16)
        self.weight = nn.Parameter(torch.randn(23, 16) / 4)

    def forward(self, batch):
        return F.linear(self.token(batch), self.weight)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


def said(model, optimizer=None, steps=3, call=None, loss=None):
    """What a training says, and its report."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            (lm_loss(call or model, ids()) if loss is None else loss(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [str(w.message) for w in caught if "lotion_fx" in w.filename], lotion_fx.report(model)


@pytest.mark.parametrize(
    "settings", [{}, {"curvature": "full"}, {"curvature": "fisher"}, {"method": "ptq"}, {"method": "rr"}]
)
def test_a_model_left_in_eval(settings):
    model = lotion_fx.transform(LM().eval(), "int4", inner="aot_eager", **settings)
    warned, report = said(model)
    assert len(warned) == 1 and "eval()" in warned[0] and "train()" in warned[0] and "head.weight" in warned[0]
    assert "graph" not in warned[0] and "outermost" not in warned[0]
    if settings.get("method", "lotion") == "lotion":
        assert "eval()" in report["head.weight"].reason and report["head.weight"].estimator == "fisher"
    assert said(model.train())[0] == []
    assert "eval()" not in lotion_fx.report(model)["head.weight"].reason


def test_what_trains_at_rounded_weights_anyway_may_be_in_eval():
    assert said(lotion_fx.transform(LM().eval(), "int4", inner="aot_eager", method="ste"))[0] == []


def test_a_part_left_in_eval_is_named_alone():
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager")
    model.mlp.eval()
    warned, report = said(model)
    assert len(warned) == 1 and "mlp.0.weight, mlp.2.weight did" in warned[0] and "head" not in warned[0]
    assert report["head.weight"].reason == "" and "eval()" in report["mlp.0.weight"].reason


def test_an_evaluation_between_two_steps_is_no_training_in_eval():
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def loss(model):
        with torch.no_grad():
            model.eval()(ids())
        return lm_loss(model.train(), ids())

    assert said(model, optimizer, loss=loss)[0] == []


def test_a_call_that_bypasses_the_compiled_one():
    """Of weights that the model itself owns; its parts are compiled where they are called."""
    model = lotion_fx.transform(Bare(), "int4", inner="aot_eager")
    warned, report = said(model, call=model.forward)
    assert any("forward()" in text and "weight" in text for text in warned)
    assert any("loss terms" in text and "itself" in text for text in warned)
    assert len(warned) == 2 and "not called" in report["weight"].reason
    assert said(model)[0] == [] and report != lotion_fx.report(model)


def test_a_recurrent_module_s_code_ran_in_python():
    model = lotion_fx.transform(nn.LSTM(8, 8), "int4", inner="aot_eager")
    warned, report = said(model, loss=lambda m: m(torch.randn(5, 2, 8))[0].square().mean())
    assert len(warned) == 1 and "no compiled graph contains weight_ih_l0" in warned[0] and "Python" in warned[0]
    assert report["weight_ih_l0"].reason == "reached by no compiled graph"


def test_an_optimizer_inside_of_backward():
    model = lotion_fx.transform(
        nn.Sequential(nn.Linear(20, 33), nn.GELU(), nn.Linear(33, 7)), "int4", inner="aot_eager"
    )
    optimizers = {p: torch.optim.SGD([p], 0.0) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    strangers = torch.optim.SGD([torch.zeros(1)], 0.1)
    warned, _ = said(model, strangers, loss=lambda m: m(torch.randn(16, 20)).square().mean())
    assert warned == []  # known from here on, it finds its curvature
    warned, report = said(model, strangers, loss=lambda m: m(torch.randn(16, 20)).square().mean())
    assert warned == [] and all(report[name].estimator == "analytic" for name in ("0.weight", "2.weight"))
    assert lotion_fx.state_dict(model)["phases"][0]["terms"] == 16


# ------------------------------------------------------------------------------------------------------------ no step


@pytest.mark.parametrize("held", ["copy", "biases"])
def test_an_optimizer_that_holds_no_transformed_weight(held):
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager")
    theirs = copy.deepcopy(LM()).parameters() if held == "copy" else [model.mlp[0].bias]
    optimizer = torch.optim.SGD(theirs, 0.1)
    warned, report = said(model, optimizer, steps=4)
    assert warned == [] and report["head.weight"].reason == "no step was taken yet"
    _, report = said(model, optimizer, steps=1)
    assert report["head.weight"].reason.startswith("no step was taken yet, after 5 forwards with backward")
    _, report = said(model)
    assert report["head.weight"].reason == ""


def test_one_weight_in_no_optimizer():
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager")
    warned, report = said(model, torch.optim.SGD([model.mlp[0].weight], 0.1))
    assert warned == [] and report["head.weight"].reason == "in no optimizer that has stepped"


def test_an_update_written_by_hand():
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager")

    def step(model):
        lm_loss(model, ids()).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None

    for _ in range(4):
        step(model)
    with pytest.warns(UserWarning, match="an update written by hand goes without it"):
        step(model)
    step(model)  # said once


def test_accumulating_long_is_no_update_by_hand():
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager")
    for _ in range(8):
        lm_loss(model, ids()).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert lotion_fx.report(model)["head.weight"].reason == ""


# ------------------------------------------------------------------------------------------------------------- no use


class Experts(nn.Module):
    """Each row to one of four experts, in Python, as much code of mixtures is written."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(20, 7) for _ in range(4))

    def forward(self, x, chosen):
        out = x.new_zeros(len(x), 7)
        for i, expert in enumerate(self.experts):
            if chosen == i or i == 3:
                out = out + expert(x)
        return out


@pytest.mark.parametrize("to_none", [True, False])
def test_experts_without_a_token_are_in_the_report_alone(to_none):
    model = lotion_fx.transform(Experts(), "int4", inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.randn(8, 20), torch.arange(8) % 7
    for chosen in (0, 1, 0, 1):  # a warning is an error
        F.cross_entropy(model(x, chosen), y).backward()
        optimizer.step()
        reasons = [lotion_fx.report(model)[f"experts.{i}.weight"].reason for i in range(4)]
        optimizer.zero_grad(set_to_none=to_none)
    assert reasons == ["no gradient in the last step", "", "no gradient in any step so far", ""]


@pytest.mark.parametrize("to_none", [True, False])
def test_frozen_weights_are_in_the_report_alone(to_none):
    model = lotion_fx.transform(MLP(), "int4", inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for frozen in (False, True, True, False):
        model.up.weight.requires_grad_(not frozen)
        model(torch.randn(4, 20)).square().mean().backward()
        optimizer.step()
        reason = lotion_fx.report(model)["up.weight"].reason
        assert reason == ("frozen: no gradient reaches it" if frozen else "")
        optimizer.zero_grad(set_to_none=to_none)


def test_a_resumed_training_does_not_call_its_weights_idle():
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager")
    said(model)
    fresh = lotion_fx.transform(LM(), "int4", inner="aot_eager")
    lotion_fx.load_state_dict(fresh, lotion_fx.state_dict(model))
    assert lotion_fx.report(fresh)["head.weight"].reason == ""
