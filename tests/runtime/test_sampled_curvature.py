"""curvature="ggn" is the Gauss-Newton diagonal on average, of labels that each step and each rank draws anew."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.testing._internal.distributed.fake_pg import FakeStore

import lotion_fx
from lotion_fx.likelihood import sampled_loss
from lotion_fx.passes.attach.probe import HEADER, Layout
from lotion_fx.state import Weight, registry
from lotion_fx.update import curvature_of
from tests.models import LM, MLP, counted, ids, lm_loss
from tests.runtime.steps import Recorder, curvature, inputs_and_gradients, one_step, term_gradient


def output_hessian(output, likelihood):
    """The Hessian in one sample's output [D] of its own -log p, [D, D], from torch.func."""
    if likelihood == "categorical":
        return jacrev(jacrev(lambda row: -row.log_softmax(-1)[0]))(output)
    if likelihood == "bernoulli":
        return jacrev(jacrev(lambda row: F.softplus(row).sum()))(output)
    return jacrev(jacrev(lambda row: row.square().sum()))(output)


def gauss_newton(model, name, batch, likelihood):
    """The exact diagonal of sum_n J_n^T H_n J_n over the number of labels, in the weight's shape."""
    weights = {key: p.detach() for key, p in model.named_parameters()}
    rows = lambda weight: functional_call(model, {**weights, name: weight}, batch).flatten(0, -2)  # noqa: E731
    jacobian, outputs = jacrev(rows)(weights[name]), rows(weights[name])
    hessians = torch.stack([output_hessian(row, likelihood) for row in outputs])
    count = len(outputs) if likelihood == "categorical" else outputs.numel()
    return torch.einsum("ncij,ncd,ndij->ij", jacobian, hessians, jacobian) / count


def linear():
    return nn.Sequential(nn.Linear(6, 5))


EXACT = [
    ("categorical", MLP, "up.weight", (9, 20)),
    ("categorical", MLP, "down.weight", (9, 20)),
    ("categorical", LM, "mlp.0.weight", None),  # its positions do not mix
    ("bernoulli", MLP, "up.weight", (9, 20)),
    ("gaussian", MLP, "up.weight", (9, 20)),
    ("gaussian", linear, "0.weight", (4, 6)),
]


@pytest.mark.parametrize(("likelihood", "make", "name", "shape"), EXACT, ids=[f"{a} {c}" for a, _, c, _ in EXACT])
def test_the_passes_average_to_the_exact_diagonal(likelihood, make, name, shape, monkeypatch):
    def in_full(weight):
        return Layout("full", weight.shape, 1, weight.shape[0])

    monkeypatch.setattr(Weight, "_make_layout", in_full)  # the contraction as it is, before it is factored
    torch.manual_seed(0)
    model = make().double()
    batch = ids(4, 3) if shape is None else torch.randn(shape, dtype=torch.float64)
    expected = gauss_newton(copy.deepcopy(model), name, batch, likelihood)
    if make is linear:  # and by hand
        by_hand = 2 / (len(batch) * 5) * batch.square().sum(0).expand(5, -1)
        torch.testing.assert_close(expected, by_hand)
    counted(model, "int4/tensor", inner="aot_eager", curvature="ggn", likelihood=likelihood)
    weight = registry[model.get_parameter(name)]
    drawn = []
    for step in range(200):
        weight.smoothing.tally.step_of_forwards = step  # which begins with this forward
        model(batch)
        drawn.append(weight.gathered.probe.grad[:-HEADER].view(expected.shape).double() / weight.smoothing.tally.draws)
    drawn = torch.stack(drawn)
    for found, exact in ((drawn, expected), (drawn.sum((1, 2)), expected.sum())):
        error = found.std(0) / math.sqrt(len(found))
        assert ((found.mean(0) - exact).abs() <= 5 * error + 1e-9).all()
    assert drawn.sum((1, 2)).std() / math.sqrt(len(drawn)) < 0.05 * expected.sum()  # a factor would have shown


def test_empirical_curvature_is_the_fisher_diagonal():
    """curvature="full" is T times the sum of squared per-sample gradients, by torch.func."""
    model = MLP()
    x, labels = torch.randn(9, 20), torch.randint(7, (9,))
    weights = {key: p.detach().double() for key, p in model.named_parameters()}

    def loss(weights, x, label):
        return F.cross_entropy(functional_call(model, weights, x), label) / 9

    each = vmap(grad(loss), (None, 0, 0))(weights, x.double(), labels)
    counted(model, "int4/tensor", inner="aot_eager", curvature="full")
    one_step(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m: F.cross_entropy(m(x), labels))
    for name in ("up.weight", "down.weight"):
        parameter = model.get_parameter(name)
        expected = 9 * each[name].square().sum(0)
        found = curvature_of(registry[parameter], parameter)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * expected.max().item())


def test_the_step_adds_the_formula():
    """Against hooks on a plain model that is given the same labels."""
    plain = LM().double()
    model = counted(copy.deepcopy(plain), "int4/channel", inner="aot_eager", curvature="ggn")
    recorder = Recorder(model)
    one_step(model, recorder, lambda m: lm_loss(m, ids()))
    generator = torch.Generator().manual_seed(hash((torch.initial_seed(), 0, 0, 0)))
    seen = inputs_and_gradients(plain, lambda m: sampled_loss(m(ids()), "categorical", generator))
    plain.zero_grad()
    lm_loss(plain, ids()).backward()
    for name in ("mlp.0", "mlp.2", "head"):
        linear = plain.get_submodule(name)
        expected = term_gradient(linear.weight, curvature(*seen[linear], "factored", ids().numel()), "int4/channel")
        added = recorder.given[f"{name}.weight"] - linear.weight.grad
        assert (added - expected).norm() < 1e-5 * expected.norm(), name


def test_each_rank_draws_its_own_labels():
    """Two ranks at one batch and one seed, and the first of them again: the seed alone would draw them all alike."""

    def drawn(rank):
        torch.distributed.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        try:
            torch.manual_seed(0)
            model = counted(MLP(), "int4", curvature="ggn", inner="aot_eager")
            parallel = nn.parallel.DistributedDataParallel(model)
            parallel.register_comm_hook(None, keep)  # no other rank is there to reduce with
            one_step(parallel, torch.optim.SGD(model.parameters(), lr=0.0), lambda m: m(x).square().mean())
            return lotion_fx.state_dict(model)["weights"]
        finally:
            torch.distributed.destroy_process_group()

    def keep(_, bucket):
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    x = torch.randn(5, 20)
    first, second, again = drawn(0), drawn(1), drawn(0)
    for name in ("up.weight", "down.weight"):
        assert torch.equal(first[name]["ema"], again[name]["ema"])
        assert not torch.equal(first[name]["ema"], second[name]["ema"])
