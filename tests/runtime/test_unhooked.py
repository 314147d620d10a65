"""Updates that no hook sees: `apply_term` makes the term for them, and without it they are told, once."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

import lotion_fx
from tests.models import MLP

X, Y = torch.randn(8, 20, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 7


def pair(**options):
    torch.manual_seed(0)
    models = [MLP()]
    models.append(copy.deepcopy(models[0]))
    return [lotion_fx.transform(model, "int4", inner="aot_eager", **options) for model in models]


def backward(model):
    model.zero_grad()
    F.cross_entropy(model(X), Y).backward()


def by_hand(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad


def said(function):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function()
    return [str(each.message) for each in found]


@pytest.mark.parametrize("kind", ["factored", "full", "fisher"])
def test_a_loop_by_hand_with_apply_term_is_sgd(kind):
    ours, theirs = pair(curvature=kind)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for _ in range(4):
        for model in (ours, theirs):
            backward(model)
        lotion_fx.apply_term(ours.parameters())
        by_hand(ours)
        optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    assert lotion_fx.report(ours).term == pytest.approx(lotion_fx.report(theirs).term, rel=1e-5)
    assert not said(lambda: ours.eval()(X))


def test_apply_term_says_what_it_cannot_take():
    model = pair()[0]
    for given, error, told in [
        (model, TypeError, "such as model.parameters"),
        (["up.weight"], TypeError, "expected tensors, got 'up.weight'"),
        (MLP().parameters(), ValueError, "none is a quantized weight"),
        (model.parameters(), ValueError, "no quantized weight has a .grad, 'up.weight' among them"),
    ]:
        with pytest.raises(error, match=told):
            lotion_fx.apply_term(given)


def no_optimizer(model):
    for _ in range(3):
        backward(model)
        by_hand(model)


def autograd_by_hand(model):
    for _ in range(8):
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(F.cross_entropy(model(X), Y), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.data -= 0.1 * gradient


def replaced_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step = lambda: by_hand(model)
    for _ in range(3):
        backward(model)
        optimizer.step()


@pytest.mark.parametrize("train", [no_optimizer, autograd_by_hand, replaced_step])
@pytest.mark.parametrize("ask", [lambda model: model.eval()(X), lotion_fx.report], ids=["eval", "report"])
def test_what_no_hook_saw_is_told_once(train, ask):
    model = pair()[0]
    train(model)
    told = said(lambda: ask(model))
    assert len(told) == 1 and "'up.weight' and 1 more changed" in told[0] and "apply_term" in told[0], told
    assert not said(lambda: ask(model))


def test_nothing_is_told_of_what_is_stepped_loaded_or_copied():
    model, other = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        backward(model)
        optimizer.step()
    for _ in range(3):
        other(X)
    other.load_state_dict(model.state_dict())
    average = copy.deepcopy(other)
    for _ in range(3):
        with torch.no_grad():
            average(X)
            average.up.weight.lerp_(model.up.weight, 0.5)
    for each in (model, other, average):
        assert not said(lambda each=each: each.eval()(X))
    plain = pair(method="ptq")[0]
    no_optimizer(plain)
    assert not said(lambda: plain.eval()(X))


class Left(torch.nn.Module):
    """Two weights that no graph has yet told to leave alone: one reaches no product, the forward writes the other."""

    def __init__(self):
        super().__init__()
        self.positions = torch.nn.Parameter(torch.randn(20, 20))
        self.layer = torch.nn.Linear(20, 20)
        self.classes = torch.nn.Linear(20, 7)

    def forward(self, x):
        with torch.no_grad():
            self.layer.weight.clamp_(-0.1, 0.1)
        return self.classes(self.layer(x[:, None] + self.positions).tanh().mean(1))


def test_nothing_is_told_of_weights_that_graphs_leave_alone():
    torch.manual_seed(0)
    model = lotion_fx.transform(Left(), "int4", inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        backward(model)
        optimizer.step()
    assert not said(lambda: model.eval()(X))
    assert [row.name for row in lotion_fx.report(model).rows if row.format] == ["classes.weight"]
    torch._dynamo.reset()
    model = lotion_fx.transform(Left(), "int4", inner="aot_eager")
    no_optimizer(model)
    told = said(lambda: model.eval()(X))
    assert len(told) == 1 and told[0].startswith("'classes.weight' changed"), told


def loss_at(model, parameters):
    return F.cross_entropy(torch.func.functional_call(model, parameters, (X,)), Y)


def parameters_of_its_own(model, steps):
    moved = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(moved.values(), 0.1)
    for _ in range(steps):
        loss_at(model, moved).backward()
        optimizer.step()


def an_ensemble(model, steps):
    moved = {name: torch.stack([p.detach()] * 2).requires_grad_() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(moved.values(), 0.1)
    for _ in range(steps):
        torch.func.vmap(lambda parameters: loss_at(model, parameters))(moved).sum().backward()
        optimizer.step()


def gradients_of_a_function(model, steps):
    for _ in range(steps):
        grads = torch.func.grad(lambda p: loss_at(model, p))({k: v.detach() for k, v in model.named_parameters()})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= 0.1 * grads[name]


def inner_steps(model, steps):
    """Meta-learning: the model's own parameters take the outer step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        fast = dict(model.named_parameters())
        for _ in range(2):
            grads = torch.autograd.grad(loss_at(model, fast), fast.values())
            fast = {name: p - 0.1 * g for (name, p), g in zip(fast.items(), grads, strict=True)}
        loss_at(model, fast).backward()
        optimizer.step()


@pytest.mark.parametrize("loop", [parameters_of_its_own, an_ensemble, gradients_of_a_function])
@pytest.mark.parametrize("asked", ["eval", "report"])
def test_training_at_other_tensors_than_the_model_s_is_told_once(loop, asked):
    model = pair()[0]
    loop(model, 6)
    ask = (lambda: model.eval()(X)) if asked == "eval" else lambda: lotion_fx.report(model)
    told = [text for text in said(ask) if "training forwards ran at other tensors" in text]
    assert len(told) == 1 and told[0].startswith("6 training forwards") and "apply_term" in told[0]
    assert not said(lambda: (model.eval()(X), lotion_fx.report(model)))


def test_a_few_forwards_at_other_tensors_are_no_training():
    model = pair()[0]
    gradients_of_a_function(model, 3)
    assert not said(lambda: model.eval()(X))
    other = pair()[0]
    inner_steps(other, 4)
    assert not [text for text in said(lambda: other.eval()(X)) if "at other tensors" in text]
