"""`loss_graphs`: graphs of batches, those that are equal held once."""

import itertools

import torch
import torch.nn.functional as F

from lotion_fx.loss_graph import loss_graphs
from tests.models import MLP


def batch(rows):
    return torch.randn(rows, 20), torch.arange(rows) % 7


def test_batches_of_one_graph_hold_it_once():
    """What memory takes is of graphs, not of batches; what another batch shapes otherwise is its own."""
    torch.manual_seed(0)
    model = MLP()
    model.up.register_forward_pre_hook(lambda module, args: (args[0] * len(args[0]),))
    given = [batch(rows) for rows in (4, 4, 6, 4, 6)]
    graphs = loss_graphs(model, given, F.cross_entropy)
    assert [next(i for i, b in enumerate(graphs) if b.gm is a.gm) for a in graphs] == [0, 0, 2, 0, 2]
    for graph, (x, labels) in zip(graphs, given, strict=True):
        torch.testing.assert_close(graph.loss({}), F.cross_entropy(model(x), labels))


def test_graphs_that_read_other_constants_are_others():
    model, count = MLP(), itertools.count(1)
    model.up.register_forward_pre_hook(lambda module, args: (args[0] * torch.tensor(float(next(count))),))
    given = batch(4)
    a, b = loss_graphs(model, [given, given], F.cross_entropy)
    assert a.gm.code == b.gm.code and a.gm is not b.gm
    assert a.loss({}) != b.loss({})


def test_a_graph_that_writes_to_a_buffer_is_its_batch_s_own():
    """Or one batch's loss would depend on those before."""

    class Counting(MLP):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls.view(-1).add_(1)
            return super().forward(x) * self.calls

    given = batch(4)
    a, b = loss_graphs(Counting(), [given, given], F.cross_entropy)
    assert a.gm is not b.gm
    assert a.loss({}) == b.loss({})
