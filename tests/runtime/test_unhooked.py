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
