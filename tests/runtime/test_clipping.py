"""What an optimizer's second moment is worth, against sums over its steps and against unclipped training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx.clipping import Clipping
from lotion_fx.state import registry
from lotion_fx.update import curvature_of
from tests.models import LM, counted, ids, lm_loss


@pytest.mark.parametrize("unseen", [0, 5])
def test_unclipped_squares_are_recovered_from_a_moment_of_clipped_ones(unseen):
    """Gradients of one size, of which clipping left various parts: any Adam's moment gives that size back."""
    decay, square, moment, clipping = 0.99, 7.0, 0.0, Clipping()
    for step in range(40):
        factor = torch.tensor(1.0 if step < unseen else 0.1 + (step % 4))
        moment = decay * moment + (1 - decay) * square * float(factor) ** 2
        if step >= unseen:
            clipping.told(factor, decay, step)
    assert float(clipping.over_moment(torch.tensor(3.0), 40, decay)) * moment == pytest.approx(3.0 * square, rel=1e-5)


def test_a_moment_without_steps_tells_nothing():
    assert float(Clipping().over_moment(torch.tensor(3.0), 0, 0.9)) == 0.0


def test_what_is_saved_goes_on():
    clipping = Clipping()
    clipping.told(torch.tensor(0.5), 0.99, 3)
    again = Clipping.restored(copy.deepcopy(clipping.saved()))
    for each in (clipping, again):
        each.told(torch.tensor(2.0), 0.99, 4)
    assert again == clipping and Clipping.restored(None) == Clipping()


def trained(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        lm_loss(model, ids(seed=step)).backward()
        optimizer.step()


def curvature(model):
    weight = registry[model.head.weight]
    return curvature_of(weight, model.head.weight).sum()


def fisher():
    torch.manual_seed(0)
    return counted(LM(), "int4", curvature="fisher", inner="aot_eager")


def test_fisher_curvature_is_the_same_after_the_optimizer_was_replaced():
    kept, replaced = fisher(), fisher()
    optimizer = torch.optim.Adam(kept.parameters(), 0.0)
    trained(kept, optimizer, 60)
    trained(replaced, torch.optim.Adam(replaced.parameters(), 0.0), 30)
    trained(replaced, torch.optim.Adam(replaced.parameters(), 0.0), 30, first=30)
    torch.testing.assert_close(curvature(replaced), curvature(kept), rtol=0.1, atol=0.0)  # of other batches in part


def test_a_layer_that_joins_late_has_its_fisher_curvature_at_once():
    late, early = fisher(), fisher()
    optimizers = []
    for model, joins in ((early, 0), (late, 40)):
        others = [p for p in model.parameters() if p is not model.head.weight]
        optimizer = torch.optim.Adam(others, 0.0)
        trained(model, optimizer, joins)
        optimizer.add_param_group({"params": [model.head.weight]})
        trained(model, optimizer, 20, first=40)
        optimizers.append(optimizer)
    torch.testing.assert_close(curvature(late), curvature(early), rtol=1e-4, atol=0.0)


def test_fisher_curvature_of_a_loaded_optimizer_counts_its_steps(tmp_path):
    model = fisher()
    optimizer = torch.optim.Adam(model.parameters(), 0.0)
    trained(model, optimizer, 20)
    resumed = fisher()
    other = torch.optim.Adam(resumed.parameters(), 0.0)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    other.load_state_dict(torch.load(tmp_path / "o.pt"))
    for each, by in ((model, optimizer), (resumed, other)):
        trained(each, by, 5, first=20)
    assert torch.equal(curvature(model), curvature(resumed))
    assert lotion_fx.report(model).term == lotion_fx.report(resumed).term


class Uncounted(torch.optim.Optimizer):
    """Adam's second moment, without a count of steps, as that of some optimizers that are not torch's."""

    def __init__(self, params, lr, betas):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                moment = self.state[p].setdefault("exp_avg_sq", torch.zeros_like(p))
                moment.lerp_(p.grad.square(), 1 - group["betas"][1])


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.9)])
def test_fisher_curvature_needs_no_count_of_the_optimizers(betas):
    found = []
    for make in (torch.optim.Adam, Uncounted):
        model = fisher()
        trained(model, make(model.parameters(), 0.0, betas=betas), 6)
        found.append(curvature(model))
    assert found[0] > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=0.0)


def test_an_optimizer_loaded_without_our_state_has_its_own_decay():
    """The first step already: the moment of 20 steps at beta2 = .9 is nearly whole."""
    terms = []
    for betas in ((0.9, 0.9), (0.9, 0.999)):
        model = fisher()
        optimizer = torch.optim.Adam(model.parameters(), 0.0, betas=betas)
        trained(model, optimizer, 20)
        state = optimizer.state_dict()
        for each in state["state"].values():
            each.pop("lotion_fx", None)
        fresh = fisher()
        other = torch.optim.Adam(fresh.parameters(), 0.0, betas=betas)
        other.load_state_dict(state)
        with pytest.warns(UserWarning, match="holds nothing of lotion_fx"):
            trained(fresh, other, 1, first=20)
        terms.append(curvature(fresh) / curvature(model))
    assert all(0.5 < float(ratio) < 2 for ratio in terms), terms


@pytest.mark.parametrize("strength", [1.0, 1000.0])
@pytest.mark.parametrize("calibrate", [False, True])
def test_hard_clipping_is_no_feedback(calibrate, strength):
    """Adam takes no notice of gradients that are all as many times smaller; nor does the term that it is given."""
    terms = []
    for shrunk in (1.0, 1e-2, 1e-4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 10)).double()
        lotion_fx.transform(model, "int4", inner="eager", curvature="fisher", calibrate=calibrate, strength=strength)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3, eps=0.0)
        for seed in range(20):
            torch.manual_seed(seed)
            F.cross_entropy(model(torch.randn(64, 16).double()), torch.randint(10, (64,))).backward()
            for parameter in model.parameters():
                parameter.grad *= shrunk
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.isfinite().all() for p in model.parameters())
        terms.append(lotion_fx.report(model).term)
    if not calibrate:  # else the term's size holds the clipping
        assert terms[1:] == pytest.approx([terms[0]] * 2, rel=1e-2) and terms[0] > 0
