"""`regions="blocks"`: which modules it finds, and that equal ones are compiled once."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx.blocks import blocks_of
from lotion_fx.compiling import compiles
from tests.models import MLP, VOCAB, counted, ids, lm_loss
from tests.runtime.steps import Recorder, one_step


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Trunk(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.token, self.layers = nn.Embedding(VOCAB, 16), nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(16)

    def forward(self, ids):
        x = self.token(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Deep(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.trunk, self.head = Trunk(depth), nn.Linear(16, VOCAB)

    def forward(self, ids):
        return self.head(self.trunk(ids))


def test_blocks_are_the_members_of_the_outermost_lists_and_what_else_holds_weights():
    model = Deep(3)
    assert blocks_of(model) == [model.trunk.token, *model.trunk.layers, model.head]
    nested = nn.Sequential(nn.ModuleDict({"stem": nn.Linear(4, 4)}), nn.Sequential(*(MLP() for _ in range(2))))
    assert blocks_of(nested) == [nested[0]["stem"], *nested[1]]
    experts = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(MLP() for _ in range(2))}) for _ in range(2))
    assert blocks_of(nn.ModuleList([experts])) == list(experts)
    shared, other = MLP(), MLP()
    assert blocks_of(nn.Sequential(shared, other, shared)) == [shared, other]


@pytest.mark.parametrize("model", [MLP(), nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))])
def test_a_model_without_alike_blocks_is_refused_and_left_alone(model):
    with pytest.raises(ValueError, match="regions='blocks'.*no nn.ModuleList or nn.Sequential of alike blocks"):
        lotion_fx.transform(model, "int4", regions="blocks", inner="aot_eager")
    lotion_fx.transform(model, "int4", inner="aot_eager")


class Gaps(nn.Module):
    """A list of layers that has places without one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), None, nn.Linear(8, 8)])

    def forward(self, x):
        for layer in self.layers:
            x = x if layer is None else layer(x)
        return x


def test_a_list_may_have_places_without_a_module():
    model = lotion_fx.transform(Gaps(), "int4", inner="aot_eager")
    model(torch.randn(2, 8)).sum().backward()
    assert [row.format for row in lotion_fx.report(model).rows] == ["int4", None, "int4", None]


def test_equal_blocks_are_compiled_once():
    counts = []
    for depth in (2, 12):
        torch._dynamo.reset()
        before = compiles["aot_eager"]
        model = lotion_fx.transform(Deep(depth), "int4", regions="blocks", inner="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(2):
            one_step(model, optimizer, lambda m, seed=seed: lm_loss(m, ids(seed=seed)))
        counts.append(compiles["aot_eager"] - before)
        rows = [row for row in lotion_fx.report(model).rows if row.format is not None]
        assert len(rows) == 2 * depth + 1 and all(row.estimator == "analytic" for row in rows)
    assert counts[0] == counts[1]


def test_the_term_is_that_of_the_whole_model():
    torch.manual_seed(0)
    model, given = Deep(3), []
    for regions in (None, "blocks"):
        torch._dynamo.reset()
        chosen = counted(copy.deepcopy(model), "int4", regions=regions, inner="aot_eager")
        recorder = Recorder(chosen)
        one_step(chosen, recorder, lambda m: lm_loss(m, ids()))
        given.append(recorder.given)
    lm_loss(model, ids()).backward()
    for name, grad in given[0].items():
        torch.testing.assert_close(given[1][name], grad, rtol=1e-5, atol=1e-7)
    plain = model.head.weight.grad
    assert F.mse_loss(given[1]["head.weight"], plain) > 1e-12, "there is a term"
