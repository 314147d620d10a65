"""What is saved and loaded: a resumed run goes on bit for bit, and a state that does not fit is refused."""

import copy
import io

import pytest
import torch

import lotion_fx
from tests.models import LM, MLP, counted, ids, lm_loss
from tests.runtime.steps import one_step


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["factored", "full", "fisher"])
def test_a_resumed_run_is_bit_identical(inner, kind):
    def make(state=None):
        torch.manual_seed(0)
        model = LM()
        if state is not None:
            model.load_state_dict(state["model"])
        lotion_fx.transform(model, "nvfp4", curvature=kind, inner=inner, finish=0.5, steps=6)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
            lotion_fx.load_state_dict(model, state["lotion"])
        return model, optimizer

    def run(model, optimizer, steps):
        for step in steps:
            one_step(model, optimizer, lambda m, step=step: lm_loss(m, ids(seed=step)))

    whole, optimizer = make()
    run(whole, optimizer, range(6))
    first, optimizer = make()
    run(first, optimizer, range(2))
    file = io.BytesIO()
    saved = {"model": first.state_dict(), "optimizer": optimizer.state_dict(), "lotion": lotion_fx.state_dict(first)}
    torch.save(saved, file)
    file.seek(0)
    resumed, optimizer = make(torch.load(file, weights_only=True))
    run(resumed, optimizer, range(2, 6))
    for (name, mine), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert lotion_fx.report(resumed).to_dict() == lotion_fx.report(whole).to_dict()


def test_states_that_do_not_fit_are_refused():
    model = lotion_fx.transform(LM(), inner="eager")
    state = lotion_fx.state_dict(model)
    other = lotion_fx.transform(MLP(), inner="eager")
    with pytest.raises(ValueError, match="parameters differ.*'down"):
        lotion_fx.load_state_dict(other, state)
    with pytest.raises(ValueError, match="curvature=.*'factored'.*'full'"):
        lotion_fx.load_state_dict(lotion_fx.transform(LM(), curvature="full", inner="eager"), state)
    with pytest.raises(ValueError, match="version"):
        lotion_fx.load_state_dict(model, {})


def test_without_our_state_the_optimizer_s_second_moment_is_read_by_its_own_count():
    """As where a run under another tool goes on under this one: no average of clipping factors was kept."""

    def make():
        model = counted(LM(), "int4", curvature="fisher", inner="aot_eager")
        return model, torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.99))

    def step(model, optimizer, seed):
        optimizer.zero_grad()
        lm_loss(model, ids(seed=seed)).backward()
        before = model.head.weight.grad.clone()
        optimizer.step()
        return model.head.weight.grad - before

    whole, optimizer = make()
    for seed in range(4):
        step(whole, optimizer, seed)
    resumed, loaded = make()
    resumed.load_state_dict(whole.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(4, 6):
        torch.testing.assert_close(step(resumed, loaded, seed), step(whole, optimizer, seed), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_loading_drops_what_the_step_under_way_had_gathered(set_to_none):
    models = [lotion_fx.transform(LM(), "int4", inner="aot_eager")]
    models.append(LM())
    models[1].load_state_dict(models[0].state_dict())
    lotion_fx.transform(models[1], "int4", inner="aot_eager")
    state = lotion_fx.state_dict(models[0])
    lm_loss(models[0], ids(6, seed=1)).backward()
    lotion_fx.load_state_dict(models[0], state)
    models[0].zero_grad(set_to_none=set_to_none)
    for model in models:
        lm_loss(model, ids()).backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
    states = [lotion_fx.state_dict(model) for model in models]
    assert states[0]["phases"][0]["terms"] == states[1]["phases"][0]["terms"] == 40
    for mine, expected in zip(*(state["weights"].values() for state in states), strict=True):
        torch.testing.assert_close(mine["ema"], expected["ema"])
