"""Parts called from outside of the model's own call are compiled as the model is: the same term, and no word of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import lotion_fx
from tests.models import LM, MLP, counted, ids, lm_loss
from tests.runtime.steps import Recorder


class Task(nn.Module):
    """As a Lightning module: it is never called itself."""

    def __init__(self, net):
        super().__init__()
        self.net = net


def by_trunk(model, batch):
    """The head by hand, as a trainer does that cuts the loss into pieces."""
    x = model.token(batch)
    x = model.norm(x + model.mlp(x))
    return F.cross_entropy(model.head(x).flatten(0, 1), batch.roll(-1, 1).flatten())


def by_blocks(model, batch):
    x = model.token(batch)
    for layer in model.mlp:
        x = layer(x)
    return F.cross_entropy(model.head(model.norm(x + model.token(batch))).flatten(0, 1), batch.roll(-1, 1).flatten())


def stepped(model, loss, micro=1, **options):
    """What one step's term adds to each gradient."""
    torch.manual_seed(0)
    counted(model, "int4", inner="aot_eager", **options)
    optimizer = Recorder(model)
    for part in ids(8).chunk(micro):
        (loss(part) / micro).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return {name.removeprefix("net."): p.grad - plain[name] for name, p in model.named_parameters() if name in plain}


def pair():
    torch.manual_seed(0)
    model = LM()
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("kind", ["factored", "full", "fisher"])
@pytest.mark.parametrize("loss", [by_trunk, by_blocks])
def test_the_term_is_that_of_the_model_called_whole(loss, kind):
    whole, apart = pair()
    expected = stepped(whole, lambda batch: lm_loss(whole, batch), curvature=kind)
    assert_same(stepped(apart, lambda batch: loss(apart, batch), curvature=kind), expected)


@pytest.mark.parametrize("kind", ["factored", "ggn"])
def test_so_is_that_of_a_module_that_is_never_called_itself(kind):
    whole, apart = pair()
    expected, task = stepped(whole, lambda batch: lm_loss(whole, batch), curvature=kind), Task(apart)
    assert_same(stepped(task, lambda batch: lm_loss(task.net, batch), curvature=kind), expected)
    assert lotion_fx.report(task)["net.head.weight"].estimator == {"factored": "analytic"}.get(kind, kind)


def assert_same(found, expected):
    assert found.keys() == expected.keys() and expected["head.weight"].any()
    for name, term in expected.items():
        torch.testing.assert_close(found[name], term, rtol=1e-5, atol=1e-9, msg=name)


def test_four_micro_batches_are_one_batch():
    one, four = pair()
    terms = [stepped(m, lambda b, m=m: by_trunk(m, b), micro=n) for m, n in ((one, 1), (four, 4))]
    for name in terms[0]:
        torch.testing.assert_close(terms[1][name], terms[0][name], rtol=1e-4, atol=1e-9, msg=name)


def test_a_part_runs_at_rounded_weights_in_eval_and_copies_do_too():
    task = counted(Task(MLP()), "int4", inner="aot_eager").eval()
    x, net = torch.randn(4, 20), task.net
    fmt = lotion_fx.resolve("int4")
    rounded = {f"{n}.weight": lotion_fx.rounding.rtn(getattr(net, n).weight, fmt, 1) for n in ("up", "down")}
    expected = torch.func.functional_call(MLP(), {**dict(net.named_parameters()), **rounded}, x)
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected)
        torch.testing.assert_close(copy.deepcopy(task).net(x), expected)


def test_called_whole_the_model_is_one_graph_as_before():
    torch._dynamo.reset()
    counters.clear()
    lm_loss(counted(LM(), "int4", inner="aot_eager", fullgraph=True), ids()).backward()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
