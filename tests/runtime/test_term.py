"""The term enters once a step, and is the formula's, under whatever the training loop does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx.numerics import rounding
from lotion_fx.passes.attach.probe import Code
from lotion_fx.state import registry
from tests.models import LM, MLP, counted, ids, lm_loss
from tests.runtime.steps import Recorder, curvature, inputs_and_gradients, one_step, term_gradient


@pytest.mark.parametrize("kind", ["factored", "full"])
@pytest.mark.parametrize("fmt", ["int4/channel", "fp4/8"])
def test_the_step_adds_the_formula(kind, fmt):
    plain = LM().double()  # so that the difference of two gradients keeps its digits
    model = counted(copy.deepcopy(plain), fmt, curvature=kind, inner="aot_eager", strength=0.7)
    targets = ids(seed=3).flatten()
    targets[::3] = -100  # ignored labels are no loss terms

    def loss(model):
        return F.cross_entropy(model(ids()).flatten(0, 1), targets)

    recorder = Recorder(model)
    one_step(model, recorder, loss)
    seen = inputs_and_gradients(plain, loss)
    terms = (targets >= 0).sum()
    for name in ("mlp.0", "mlp.2", "head"):
        linear = plain.get_submodule(name)
        x, g = seen[linear]
        # The head alone counts the positions with a label: the others see the same rows as zero gradients.
        expected = 0.7 * term_gradient(linear.weight, curvature(x, g, kind, terms), fmt)
        added = recorder.given[f"{name}.weight"] - linear.weight.grad
        assert (added - expected).norm() < 1e-5 * expected.norm(), name
    for name in ("token.weight", "norm.weight", "mlp.0.bias"):
        torch.testing.assert_close(recorder.given[name], plain.get_parameter(name).grad)


@pytest.mark.parametrize("kind", ["factored", "full", "fisher"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_accumulation_equals_one_batch(kind, inner):
    whole = counted(LM(), "int4", curvature=kind, inner=inner)
    parts = LM()
    parts.load_state_dict(whole.state_dict())
    counted(parts, "int4", curvature=kind, inner=inner)
    recorders = Recorder(whole), Recorder(parts)
    batch = ids(32)
    one_step(whole, recorders[0], lambda model: lm_loss(model, batch))
    for chunk in batch.split(8):
        (lm_loss(parts, chunk) / 4).backward()
    recorders[1].step()
    for name, mine in recorders[1].given.items():
        error = (mine - recorders[0].given[name]).norm() / recorders[0].given[name].norm()
        assert error < 1e-5, (name, error)
    plain = LM()
    plain.load_state_dict(whole.state_dict())
    lm_loss(plain, batch).backward()
    assert not torch.allclose(recorders[0].given["head.weight"], plain.head.weight.grad, rtol=1e-3)


@pytest.mark.parametrize("kind", ["factored", "fisher"])
def test_clipping_does_not_touch_the_term(kind):
    """The gradient shrinks by the clip, the term stays: Fisher curvature is of the unclipped gradient."""
    free = counted(LM().double(), "int4", curvature=kind, inner="aot_eager")
    clipped = LM().double()
    clipped.load_state_dict(free.state_dict())
    plain = copy.deepcopy(clipped)
    counted(clipped, "int4", curvature=kind, inner="aot_eager")
    recorders = Recorder(free), Recorder(clipped)
    one_step(free, recorders[0], lambda model: lm_loss(model, ids()))
    lm_loss(clipped, ids()).backward()
    lm_loss(plain, ids()).backward()
    norm = nn.utils.clip_grad_norm_(clipped.parameters(), 1e-3)
    recorders[1].step()
    grad = plain.head.weight.grad
    term = recorders[0].given["head.weight"] - grad
    torch.testing.assert_close(recorders[1].given["head.weight"], grad * (1e-3 / norm) + term, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["factored", "full", "fisher"])
@pytest.mark.parametrize("unscale_first", [True, False])
def test_grad_scaler_is_divided_out(kind, unscale_first):
    models = [counted(LM(), "int4", curvature=kind, inner="aot_eager")]
    models.append(LM())
    models[1].load_state_dict(models[0].state_dict())
    counted(models[1], "int4", curvature=kind, inner="aot_eager")
    recorders = [Recorder(model) for model in models]
    one_step(models[0], recorders[0], lambda model: lm_loss(model, ids()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
    scaler.scale(lm_loss(models[1], ids())).backward()
    if unscale_first:
        scaler.unscale_(recorders[1])
        nn.utils.clip_grad_norm_(models[1].parameters(), 1e9)
    scaler.step(recorders[1])
    for name, mine in recorders[1].given.items():
        torch.testing.assert_close(mine, recorders[0].given[name], rtol=1e-4, atol=1e-7, msg=name)


class _Sub(torch.optim.SGD):
    """Its step calls that of its base class, which torch hooks as well once there is an optimizer of that class."""

    def step(self, closure=None):
        return super().step(closure and (lambda: closure()))


@pytest.mark.parametrize("closes", [False, True])
def test_a_step_that_calls_its_base_class_s_has_the_term_once(closes):
    halves, x, labels = (("plain", 0.5), ("lotion", 0.5)), torch.randn(8, 20), torch.arange(8) % 7
    models = [MLP()]
    models.append(copy.deepcopy(models[0]))
    for model, kind in zip(models, (torch.optim.SGD, _Sub), strict=True):
        counted(model, "int2", inner="aot_eager", schedule=halves, steps=4)
        optimizer = kind(model.parameters(), lr=0.1)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            return loss

        for _ in range(3):
            if not closes:
                closure()
            optimizer.step(closure if closes else None)
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert len({str(lotion_fx.report(model)).splitlines()[-1] for model in models}) == 1


def test_an_lbfgs_closure_gets_the_term():
    model = MLP()
    plain = copy.deepcopy(model)
    counted(model, "int2/tensor", inner="aot_eager", strength=100.0)
    x = torch.randn(16, 20)

    def run(model):
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

        def closure():
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        return optimizer.step(closure)

    assert torch.isfinite(run(model)) and torch.isfinite(run(plain))
    assert (
        registry[model.up.weight].gathered.steps == 1 and registry[model.up.weight].curvature.ema[-1] > 0.02
    )  # three calls, one step
    assert not torch.allclose(model.up.weight, plain.up.weight)


OPTIMIZERS = [
    "SGD",
    "Adam",
    "AdamW",
    "NAdam",
    "RAdam",
    "Adamax",
    "Adagrad",
    "RMSprop",
    "Adadelta",
    "Rprop",
    "Adafactor",
]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["factored", "fisher"])
def test_any_optimizer(name, kind):
    model = counted(LM(), "int4", curvature=kind, inner="aot_eager")
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = lm_loss(model, ids())
        loss.backward()
        before = model.head.weight.grad.clone()
        optimizer.step()
        losses.append(loss.item())
        if losses[1:]:
            assert not torch.equal(before, model.head.weight.grad), "the term was added"
    assert losses[2] < losses[0]


def test_fisher_takes_adam_s_second_moment_and_no_state():
    model = counted(LM(), "int4", curvature="fisher", inner="aot_eager")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.9))
    one_step(model, optimizer, lambda m: lm_loss(m, ids()))
    moment = optimizer.state[model.head.weight]["exp_avg_sq"].clone() / (1 - 0.9)
    weight = registry[model.head.weight]
    weight.curvature.ema = None
    optimizer.zero_grad()
    lm_loss(model, ids(seed=1)).backward()
    grad = model.head.weight.grad.clone()
    optimizer.step()
    assert weight.curvature.ema is None and weight.curvature.code is Code.BY_CHOICE
    fmt = lotion_fx.resolve("int4")
    expected = 0.5 * rounding.variance_vjp(model.head.weight.detach(), ids().numel() * moment, fmt, 1)
    bound = 0.5 * moment.sqrt()
    expected = torch.maximum(torch.minimum(expected, bound), -bound)
    torch.testing.assert_close(model.head.weight.grad - grad, expected, rtol=1e-4, atol=1e-8)


def test_penalty_is_the_term_and_enters_once():
    model = counted(LM(), "int4", inner="aot_eager", strength=2.0, decay=0.5)
    recorder = Recorder(model)
    one_step(model, recorder, lambda m: lm_loss(m, ids()))
    with_hook = recorder.given["head.weight"]
    assert lotion_fx.penalty(model).item() == pytest.approx(2.0 * lotion_fx.report(model).term, rel=1e-5)
    loss = lambda m: lm_loss(m, ids()) + lotion_fx.penalty(m)  # noqa: E731
    one_step(model, recorder, loss)  # the same batch at the same weights: the same curvature
    torch.testing.assert_close(recorder.given["head.weight"], with_hook, rtol=1e-4, atol=1e-7)
    one_step(model, recorder, lambda m: lm_loss(m, ids()))  # and back to the hook
    torch.testing.assert_close(recorder.given["head.weight"], with_hook, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("term", [True, False])
def test_finish_moves_the_forward_to_rounded_weights(term):
    model = counted(LM(), "int4", inner="aot_eager")
    recorder = Recorder(model)
    one_step(model, recorder, lambda m: lm_loss(m, ids()))
    latent = model(ids())
    lotion_fx.finish(model, term=term)
    finishing = model(ids())
    assert not torch.equal(latent, finishing)
    torch.testing.assert_close(finishing, model.eval()(ids()))
    model.train()
    recorder.zero_grad()
    lm_loss(model, ids()).backward()
    before = model.head.weight.grad.clone()
    recorder.step()
    assert torch.equal(before, model.head.weight.grad) != term
    assert lotion_fx.report(model)["head.weight"].estimator == ("analytic" if term else None)


def test_finish_begins_by_itself():
    model = counted(LM(), "int4", inner="aot_eager", finish=0.4, steps=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    phases = []
    for _ in range(5):
        model.train()
        phases.append(torch.equal(model(ids()), model.eval()(ids())))
        one_step(model.train(), optimizer, lambda m: lm_loss(m, ids()))
    assert phases == [False, False, False, True, True]


def test_two_optimizers_share_one_step():
    model = counted(LM(), "int4", inner="aot_eager")
    both = copy.deepcopy(model)
    counted(both, "int4", inner="aot_eager")
    one = Recorder(model)
    head = torch.optim.SGD([both.head.weight], lr=0.0)
    rest = torch.optim.SGD([p for p in both.parameters() if p is not both.head.weight], lr=0.0)
    one_step(model, one, lambda m: lm_loss(m, ids()))
    lm_loss(both, ids()).backward()
    head.step()
    rest.step()
    for name, parameter in both.named_parameters():
        torch.testing.assert_close(parameter.grad, one.given[name], msg=name)


def test_an_optimizer_around_another_adds_the_term_once():
    class Around(torch.optim.Optimizer):
        def __init__(self, base):
            super().__init__(base.param_groups, {})
            self.base = base

        def step(self):
            self.base.step()

    models = [counted(LM(), "int4", inner="aot_eager")]
    models.append(LM())
    models[1].load_state_dict(models[0].state_dict())
    counted(models[1], "int4", inner="aot_eager")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    optimizers[1] = Around(optimizers[1])
    for model, optimizer in zip(models, optimizers, strict=True):
        for step in range(2):
            one_step(model, optimizer, lambda m, step=step: lm_loss(m, ids(seed=step)))
    assert torch.equal(models[0].head.weight, models[1].head.weight)
    assert registry[models[1].head.weight].gathered.steps == 2


def test_a_step_that_raised_leaves_later_ones_their_term():
    class Failing(torch.optim.SGD):
        def step(self):
            raise RuntimeError("no memory")

    other = counted(MLP(), "int4", inner="aot_eager")
    with pytest.raises(RuntimeError, match="no memory"):
        one_step(other, Failing(other.parameters(), lr=0.1), lambda m: m(torch.randn(4, 20)).square().mean())
    model = counted(LM(), "int4", inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        one_step(model, optimizer, lambda m: lm_loss(m, ids()))
    assert registry[model.head.weight].gathered.steps == 3


def test_a_clipped_spike_leaves_fisher_curvature_as_it_was():
    def largest_change(spike):
        torch.manual_seed(0)
        model = counted(LM(), "int4", curvature="fisher", inner="aot_eager")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.99))
        terms = []
        for step in range(7):
            optimizer.zero_grad()
            (lm_loss(model, ids(seed=step)) * (spike if step == 3 else 1.0)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            terms.append(lotion_fx.report(model).term)
        return max(terms[2:]) / min(terms[2:])

    assert largest_change(1000.0) < 3 * largest_change(1.0)  # dividing history by one step's clip made it thousands


def test_training_in_eval_mode_keeps_the_last_curvature():
    model = counted(LM(), "int4", inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    one_step(model, optimizer, lambda m: lm_loss(m, ids()))
    before = registry[model.head.weight].curvature.ema.clone()
    model.eval()
    with pytest.warns(UserWarning, match=r"curvature of .*head.weight did not arrive"):
        one_step(model, optimizer, lambda m: lm_loss(m, ids()))
    assert torch.equal(registry[model.head.weight].curvature.ema, before)
    one_step(model, optimizer, lambda m: lm_loss(m, ids()))  # said once
