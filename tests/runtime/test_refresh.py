"""Curvature gathered in some steps and kept in the others: what is added, what is compiled, what is told."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lotion_fx
from lotion_fx import arguments
from lotion_fx.compiling import compiles
from lotion_fx.passes.attach.probe import Header
from lotion_fx.state import registry
from tests.models import LM, counted, ids, lm_loss
from tests.runtime.steps import Recorder, curvature, inputs_and_gradients, one_step, term_gradient


def added(model, recorder, seed):
    """What a step adds to each gradient, by name."""
    plain = LM().double()
    plain.load_state_dict(model.state_dict())
    one_step(model, recorder, lambda m: lm_loss(m, ids(seed=seed)))
    lm_loss(plain, ids(seed=seed)).backward()
    return {name: grad - plain.get_parameter(name).grad for name, grad in recorder.given.items()}


def masses(model, optimizer, steps):
    """The mass of a weight's moving average after each step."""
    found = []
    for seed in range(steps):
        one_step(model, optimizer, lambda m, seed=seed: lm_loss(m, ids(seed=seed)))
        found.append(registry[model.head.weight].curvature.ema[-1].item())
    return found


@pytest.mark.parametrize("kind", ["factored", "full"])
def test_steps_between_have_the_term_of_the_last_curvature(kind):
    torch.manual_seed(0)
    model = counted(LM().double(), "int4/channel", curvature=kind, inner="aot_eager", refresh=3)
    plain, recorder = copy.deepcopy(LM().double()), Recorder(model)
    plain.load_state_dict(model.state_dict())
    found = [added(model, recorder, seed) for seed in range(6)]
    kept = 0.99**3
    for name in ("mlp.0", "mlp.2", "head"):
        linear, sums = plain.get_submodule(name), []
        for seed in (0, 3):  # rows of T g^2, columns of x^2, N, and the product of both
            x, g = inputs_and_gradients(plain, lambda m, seed=seed: lm_loss(m, ids(seed=seed)))[linear]
            outer = curvature(x, g, "full", 40)
            sums.append((40 * g.square().sum(0)[:, None], x.square().sum(0), torch.tensor(40.0), outer))
        rows, columns, count, outer = ((kept * a + b) / (kept + 1) for a, b in zip(*sums, strict=True))
        second = outer if kind == "full" else rows * columns / count
        first = sums[0][3] if kind == "full" else sums[0][0] * sums[0][1] / 40
        for step, h in enumerate([first] * 3 + [second] * 3):
            expected = term_gradient(linear.weight, h, "int4/channel")
            error = (found[step][f"{name}.weight"] - expected).norm() / expected.norm()
            assert error < 1e-5, (name, step)


def test_only_a_step_that_gathers_has_probes_in_its_graphs():
    torch._dynamo.reset()
    before = compiles["aot_eager"]
    model = counted(LM(), "int4", inner="aot_eager", refresh=2)
    recorder, weight = Recorder(model), registry[model.head.weight]
    for step in range(6):
        recorder.zero_grad()
        for batch in ids(seed=step).split(4):  # all of a step's batches, or none
            (lm_loss(model, batch) / 2).backward()
        grad = weight.gathered.probe.grad
        assert (grad is not None and Header.of(grad).calls == 2) if step % 2 == 0 else grad is None
        recorder.step()
    assert compiles["aot_eager"] - before == 2  # with probes and without


def test_a_weight_without_the_analytic_form_rests_as_well():
    class Powers(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6, 20) + 0.5)

        def forward(self, x):
            return (x[:, None] * self.weight.square()).sum(-1)

    model = counted(Powers(), inner="aot_eager", refresh=2, only={"weight": "int4"})
    optimizer, states = torch.optim.SGD(model.parameters(), lr=0.0), []
    for seed in range(4):
        x = torch.randn(5, 20, generator=torch.Generator().manual_seed(seed))
        one_step(model, optimizer, lambda m, x=x: m(x).square().mean())
        states.append(registry[model.weight].curvature.ema.clone())
    assert lotion_fx.report(model)["weight"].estimator == "fisher"
    assert torch.equal(states[0], states[1]) and torch.equal(states[2], states[3])
    assert not torch.equal(states[1], states[2])


def test_by_default_early_steps_all_gather(monkeypatch):
    monkeypatch.setattr(arguments, "EARLY", 3)
    model = counted(LM(), "int4", inner="aot_eager")
    expected, mass = [], 0.0
    for step in range(10):
        gap = 1 if step < 3 else 4
        if step % gap == 0:
            mass = 1 - 0.99**gap * (1 - mass)
        expected.append(mass)
    found = masses(model, torch.optim.SGD(model.parameters(), lr=0.0), 10)
    assert found == pytest.approx(expected)
    assert len(set(found)) == 5  # after steps 0, 1, 2, 4 and 8


def test_steps_are_counted_from_the_first_with_a_term(monkeypatch):
    monkeypatch.setattr(arguments, "EARLY", 2)
    schedule = (("plain", 0.25), ("lotion", 0.75))
    model = counted(LM(), "int4", inner="aot_eager", schedule=schedule, steps=12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for seed in range(3):
        one_step(model, optimizer, lambda m, seed=seed: lm_loss(m, ids(seed=seed)))
    found = masses(model, optimizer, 9)
    assert [b > a for a, b in zip([0.0, *found], found, strict=False)] == [i in (0, 1, 4, 8) for i in range(9)]


def test_a_resumed_training_rests_in_the_same_steps():
    def run(stop):
        torch.manual_seed(0)
        model = lotion_fx.transform(LM(), "int4", inner="aot_eager", refresh=3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(8):
            if step == stop:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                model = lotion_fx.transform(LM(), "int4", inner="aot_eager", refresh=3)
                model.load_state_dict(saved[0])
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
                optimizer.load_state_dict(saved[1])
            one_step(model, optimizer, lambda m, step=step: lm_loss(m, ids(seed=step)))
        return model.state_dict()

    whole = run(None)
    for stop in (4, 6):
        resumed = run(stop)
        assert all(torch.equal(resumed[name], whole[name]) for name in whole), stop


def test_nothing_is_said_of_steps_that_rest():
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager", refresh=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(6):
            one_step(model, optimizer, lambda m, seed=seed: lm_loss(m, ids(seed=seed)))
    row = lotion_fx.report(model)["head.weight"]
    assert (row.estimator, row.reason) == ("analytic", "")
