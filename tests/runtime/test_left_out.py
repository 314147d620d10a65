"""What a step did not use has no term in it, and what was looked at stays: against steps where nothing of it happened.

Broken once and seen red: the last curvature's term where gradients are zeros, a term that was looked at and dropped.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx


class Skipping(nn.Module):
    """Its second layer is left out at will, as by stochastic depth."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8)
        self.is_skipping = False

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.head(hidden if self.is_skipping else torch.relu(self.second(hidden)))


@pytest.mark.parametrize("options", [{}, {"curvature": "full"}, {"refresh": 3}], ids=str)
@pytest.mark.parametrize("to_none", [True, False])
def test_a_layer_that_a_step_leaves_out_stays_where_it_is(to_none, options):
    """Under SGD, which does nothing where the gradient is zero; at rest once a gathering step has shown it."""
    torch.manual_seed(0)
    model = lotion_fx.transform(Skipping(), "int4", inner="aot_eager", calibrate=False, **options)
    optimizer, weight = torch.optim.SGD(model.parameters(), 1.0), model.second.weight
    terms = {True: [], False: []}
    for step in range(12):
        model.is_skipping = step % 4 in (1, 2)
        optimizer.zero_grad(set_to_none=to_none)
        F.cross_entropy(model(torch.randn(16, 32)), torch.randint(0, 8, (16,))).backward()
        own = None if weight.grad is None else weight.grad.clone()
        optimizer.step()
        terms[model.is_skipping].append(0.0 if own is None else float((weight.grad - own).norm()))
    shown = 3 if "refresh" in options else 0
    assert all(term > 0 for term in terms[False]) and not any(terms[True][shown:])


def looked_at_by_grad(model):
    torch.autograd.grad(lotion_fx.penalty(model), model[0].weight)


def looked_at_by_backward(model):
    lotion_fx.penalty(model).backward()


def terms(look=None, added=None, steps=5):
    """The norm of what each step adds to the first weight's gradient; something happens from the fourth step on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    lotion_fx.transform(model, "int4", inner="aot_eager", calibrate=False)
    optimizer, found = torch.optim.SGD(model.parameters(), 0.0), []
    for step in range(steps):
        x, y = torch.randn(16, 32), torch.randint(0, 8, (16,))
        if look is not None and step > 2:
            look(model)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        own = model[0].weight.grad.clone()
        if added is not None and step > 2:
            added(model)
        optimizer.step()
        found.append(float((model[0].weight.grad - own).norm()))
    return found


@pytest.mark.parametrize("look", [looked_at_by_grad, looked_at_by_backward])
def test_a_penalty_that_is_looked_at_takes_no_step_s_term(look):
    assert terms(look) == pytest.approx(terms(), rel=1e-5)


def test_a_penalty_whose_gradient_is_added_is_the_step_s_term():
    """Not twice it: of the curvature up to the step before, which is near."""
    assert terms(added=looked_at_by_backward) == pytest.approx(terms(), rel=0.2)
