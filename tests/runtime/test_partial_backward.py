"""Backward passes that name the gradients they want, among which no probe is.

Broken once and seen red: graphs' nodes not asked, gradients that were looked at counted beside the step's own, and what
`autograd.grad` told not handed over.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from tests.models import MLP, counted

X = torch.randn(9, 20, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(9) % 7


class Broken(nn.Module):
    """A graph ends within it."""

    def forward(self, x):
        torch._dynamo.graph_break()
        return x.relu()


def plainly(model, x, loss):
    loss.backward()


def by_inputs(model, x, loss):
    loss.backward(inputs=list(model.parameters()))


def by_hand(model, x, loss):
    parameters = list(model.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def by_tasks(model, x, loss):
    """As who weighs the gradients of several losses of one output against each other."""
    parameters = list(model.parameters())
    parts = [torch.autograd.grad(0.5 * loss, parameters, retain_graph=True) for _ in range(2)]
    for parameter, first, second in zip(parameters, *parts, strict=True):
        summed = first + second
        parameter.grad = summed if parameter.grad is None else parameter.grad + summed


def by_backwards(model, x, loss):
    for _ in range(2):
        (0.5 * loss).backward(retain_graph=True)


def after_a_look(model, x, loss):
    """As who logs or balances gradients takes one."""
    torch.autograd.grad(loss, [next(model.parameters())], retain_graph=True)
    loss.backward()


def after_an_attack(model, x, loss):
    """Gradients of inputs alone, which nobody is trained with."""
    torch.autograd.grad(loss, x, retain_graph=True)
    by_hand(model, x, loss)


def told(model):
    """T of the last step, and each weight's term and estimator."""
    terms = lotion_fx.state_dict(model)["phases"][0]["terms"].item()
    return [terms, *((row.term, row.estimator) for row in lotion_fx.report(model).rows if row.term)]


def trained(backward, *, breaks):
    """A model after two steps of two micro-batches each."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = counted(nn.Sequential(MLP(), *([Broken()] if breaks else []), nn.Linear(7, 7)), "int4", inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        for _ in range(2):
            x = X.clone().requires_grad_()
            backward(model, x, F.cross_entropy(model(x), LABELS) / 2)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("backward", [by_inputs, by_hand, after_a_look, after_an_attack])
def test_gradients_that_are_asked_for_alone_have_their_curvature(backward, breaks):
    """`backward(inputs=)`, as in a generator's step, and `autograd.grad`: T and the term are those of `backward()`."""
    terms, *rows = told(trained(plainly, breaks=breaks))
    same, *others = told(trained(backward, breaks=breaks))
    assert terms == same == 18
    assert len(rows) == 3
    for (term, estimator), (other, which) in zip(rows, others, strict=True):
        assert which == estimator
        assert other == pytest.approx(term, rel=1e-5)


def test_several_passes_through_one_output_count_its_rows_once():
    """Taken by `autograd.grad` as added by `backward()`."""
    expected, seen = (told(trained(way, breaks=False)) for way in (by_backwards, by_tasks))
    assert seen[0] == expected[0] == 18
    for (term, estimator), (other, which) in zip(expected[1:], seen[1:], strict=True):
        assert which == estimator
        assert other == pytest.approx(term, rel=1e-5)


def test_a_part_that_is_not_asked_for_gathers_nothing():
    """The half of a GAN whose turn it is not: its curvature is that of its own steps alone."""
    found = []
    for names in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = counted(MLP(), "int4", inner="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(3):
            if names:
                x = X.clone().requires_grad_()
                (100 * model(x).square().sum()).backward(inputs=[x])
            F.cross_entropy(model(X), LABELS).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(told(model))
    assert found[0] == found[1]


class PassedOn(nn.Module):
    """The second graph has an output that is a view of its input, the first's output."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(20, 7), nn.Linear(7, 7)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return x.view(3, 3, 7), self.second(x), x.view(-1)


def test_a_graph_that_passes_on_what_another_made():
    found = []
    for backward in (plainly, by_inputs, by_hand):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = counted(PassedOn(), "int4", inner="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(2):
            a, b, c = model(X)
            backward(model, X, F.cross_entropy(b, LABELS) + a.square().mean() + c.square().mean())
            optimizer.step()
            optimizer.zero_grad()
        found.append(told(model))
    for terms, *rows in found:
        assert terms == found[0][0]
        assert [row[1] for row in rows] == [row[1] for row in found[0][1:]]
        assert [row[0] for row in rows] == pytest.approx([row[0] for row in found[0][1:]], rel=1e-5)
