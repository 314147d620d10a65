"""One rule for weights in graphs and outside of them: what a graph would leave alone is left alone without one."""

import pytest
import torch
from torch import nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import weight_norm

import lotion_fx
from lotion_fx.state import registry
from lotion_fx.unseen import axis_told, axis_unseen, why_not_unseen


class Net(nn.Module):
    """Every kind of parameter of two or more dimensions, each used in Python or in a graph."""

    def __init__(self, broken):
        super().__init__()
        self.call = torch.compiler.disable(self.body) if broken else self.body
        self.table, self.norm = nn.Embedding(7, 32), nn.LayerNorm((9, 32))
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 9, 32))
        self.gain, self.w = nn.Parameter(torch.ones(32, 1)), nn.Parameter(torch.randn(32, 32))
        self.layer, self.conv = nn.Linear(32, 32), nn.Conv1d(32, 16, 1)
        self.depthwise, self.up = nn.Conv1d(16, 16, 3, groups=16), nn.ConvTranspose1d(16, 8, 2)
        self.normed, self.old = weight_norm(nn.Linear(8, 8)), old_weight_norm(nn.Linear(8, 8))
        self.relative_position_bias_table = nn.Parameter(torch.randn(18, 8))
        self.head = nn.Linear(8, 4)

    def body(self, x):
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.table(x)], 1)
        x = nn.functional.linear(self.layer(self.norm(x + self.pos)), self.gain * self.w)
        x = self.up(self.depthwise(self.conv(x.mT))).mT
        return self.old(self.normed(x)) + self.relative_position_bias_table[: x.shape[1]]

    def forward(self, x):
        return self.head(self.call(x))


def found(broken):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = lotion_fx.transform(Net(broken), "int4", inner="aot_eager")
    model(torch.randint(7, (3, 8))).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    rows = [row for row in lotion_fx.report(model).rows if len(row.shape) > 1]
    assert all(row.reason for row in rows if row.format is None)
    return {row.name: row.block_axis for row in rows if row.format}


@pytest.mark.filterwarnings("ignore:.*no compiled graph.*", "ignore:.*weight_norm.*")
def test_the_same_weights_and_axes_with_a_graph_and_without():
    with_graph, without = found(False), found(True)
    assert with_graph == without
    assert set(with_graph) == {
        "w", "layer.weight", "conv.weight", "depthwise.weight", "up.weight", "old.weight_v", "head.weight",
        "normed.parametrizations.weight.original1",
    }  # fmt: skip
    assert [with_graph[name] for name in ("conv.weight", "depthwise.weight", "up.weight")] == [1, 2, 0]


STAYS_OUT = {
    "token": (nn.Module(), "cls", (1, 1, 32), "fewer than two dimensions longer than one"),
    "scale": (nn.Module(), "g", (48, 1), "fewer than two dimensions longer than one"),
    "bias of experts": (nn.Module(), "gate_up_proj_bias", (4, 64), "named as no product's weight is (bias)"),
    "decay": (nn.Module(), "A_log", (64, 16), "(a_log)"),
    "bias of keys": (nn.MultiheadAttention(8, 2, add_bias_kv=True), "bias_k", (1, 1, 8), "(bias)"),
    "table": (nn.EmbeddingBag(7, 8), "weight", (7, 8), "a lookup table or norm"),
    "norm": (nn.LayerNorm((4, 8)), "weight", (4, 8), "a lookup table or norm"),
}


@pytest.mark.parametrize("case", STAYS_OUT)
def test_says_why_it_is_left_alone(case):
    module, attribute, shape, reason = STAYS_OUT[case]
    assert reason in why_not_unseen([(module, attribute)], shape)


def test_operands_of_products_are_in_whatever_their_shape():
    rnn, attention = nn.LSTM(1, 8, proj_size=4), nn.MultiheadAttention(8, 2)
    for module in (rnn, attention, nn.GRUCell(4, 8), nn.Bilinear(1, 1, 3), nn.Linear(32, 1)):
        for attribute, parameter in module.named_parameters(recurse=False):
            assert bool(why_not_unseen([(module, attribute)], parameter.shape)) == ("bias" in attribute), attribute
    assert not why_not_unseen([(nn.Module(), "gate_up_proj"), (None, "gone")], (4, 64, 32))


def test_the_axis_is_the_module_s():
    stack = nn.Module()
    assert axis_unseen([(stack, "w")], (4, 32, 64)) == 2 and axis_told([(stack, "w")], (4, 32, 64)) is None
    stack.is_transposed = True
    assert axis_unseen([(stack, "w")], (4, 32, 64)) == 1
    stack.is_transposed = False
    assert axis_told([(stack, "w")], (4, 32, 64)) == 2
    assert axis_told([(nn.Linear(4, 8), "weight")], (8, 4)) == 1
    assert axis_unseen([(nn.GRU(8, 4), "weight_hh_l0")], (12, 4)) == 1
    assert axis_unseen([(nn.Conv2d(6, 9, 3, groups=3), "weight")], (9, 2, 3, 3)) == 1
    assert axis_unseen([(nn.ConvTranspose1d(6, 6, 3, groups=6), "weight")], (6, 1, 3)) == 2


def test_a_graph_that_sees_it_has_the_last_word():
    """A parameter whose name says otherwise, in a product after all."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.token_mixer, self.head = nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(x @ self.token_mixer)

    torch._dynamo.reset()
    model = lotion_fx.transform(Named(), "int4", inner="aot_eager")
    assert not registry[model.token_mixer].selected
    model(torch.randn(3, 16)).sum().backward()
    assert registry[model.token_mixer].selected and registry[model.token_mixer].axis == 0
