"""The ways people train a model nobody here wrote: checkpointing, autocast, frozen weights, adapters."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx.numerics import rounding
from tests.zoo import (
    FORMAT,
    HOOKED,
    assert_covered,
    assert_curvature,
    assert_same_gradients,
    block_axes,
    curvature_of,
    fresh,
    rounded,
    step,
    text,
)


def test_gradient_checkpointing():
    model = fresh()
    plain = copy.deepcopy(model)
    # transformers 5.23 renamed it and warns.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    plain.config.use_cache = model.config.use_cache = False  # else a logging call breaks the graph
    run = step(model, text(), plain)
    assert_same_gradients(run)
    assert_covered(run.model)
    assert_curvature(run, HOOKED["llama"])


def test_autocast():
    run = step(fresh(), text(), context=lambda: torch.autocast("cpu", torch.bfloat16))
    assert_same_gradients(run, 0.02)
    assert_covered(run.model)
    assert_curvature(run, HOOKED["llama"], 0.05)


@pytest.mark.parametrize(
    "frozen",
    [("q_proj",), pytest.param(("lm_head",), marks=pytest.mark.slow), ("lm_head", "mlp", "o_proj")],
    ids="+".join,
)
def test_frozen_weights_have_no_term(frozen):
    model = fresh()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    run = step(model, text())
    assert_same_gradients(run)
    report = lotion_fx.report(model)
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value) and model.get_parameter(name).grad is None
        row = report[name]
        assert row.format == "nvfp4" and row.estimator is None and row.reason and row.term is None, row
    trainable = [n for n in block_axes(model) if n not in before]
    assert trainable and all(report[n].estimator == "analytic" and report[n].term > 0 for n in trainable)
    assert_curvature(run, [n for n in trainable if "k_proj" in n or "down_proj" in n])


class Adapted(nn.Module):
    """A frozen linear layer with a trained low-rank correction."""

    def __init__(self, base: nn.Linear, rank: int = 4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def test_low_rank_adapters():
    model = fresh().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj, layer.mlp.up_proj = Adapted(layer.self_attn.q_proj), Adapted(layer.mlp.up_proj)
    run = step(model, text())
    assert_same_gradients(run)
    rows = {row.name: row for row in lotion_fx.report(model).rows}
    adapters = [name for name in rows if name.endswith((".a.weight", ".b.weight"))]
    assert len(adapters) == 8 and all(rows[name].estimator == "analytic" for name in adapters)
    assert rows["model.layers.0.self_attn.q_proj.base.weight"].term is None
    assert_curvature(run, adapters)


class LSTMClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def test_an_lstm_is_reached_by_no_graph():
    model = fresh(LSTMClassifier)
    x, labels = torch.randn(4, 6, 16), torch.tensor([0, 1, 2, 0])
    plain = copy.deepcopy(model)
    lotion_fx.transform(model, FORMAT, inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for each in (model, plain):
        F.cross_entropy(each(x), labels).backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    gradient = model.lstm.weight_ih_l0.grad.clone()
    with pytest.warns(UserWarning, match="no compiled graph contains lstm.weight_ih_l0, lstm.weight_hh_l0"):
        optimizer.step()
    rows = {row.name: row for row in lotion_fx.report(model).rows}
    for name in ("lstm.weight_ih_l0", "lstm.weight_hh_l0"):
        assert rows[name].estimator == "fisher" and rows[name].reason == "reached by no compiled graph"
        assert rows[name].format == "nvfp4" and rows[name].term > 0
    # Dynamo skips the whole frame that calls an LSTM, and with it the layers around.
    assert rows["head.weight"].estimator in ("analytic", "fisher") and rows["lstm.bias_ih_l0"].format is None
    squares = 4 * gradient.square()  # T = 4 labels
    expected = torch.outer(squares.sum(1), squares.sum(0)) / squares.sum()
    torch.testing.assert_close(curvature_of(model, "lstm.weight_ih_l0").float(), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()  # said once
    by_hand = copy.deepcopy(model).eval()
    with torch.no_grad():
        for weight in (by_hand.lstm.weight_ih_l0, by_hand.lstm.weight_hh_l0, by_hand.head.weight):
            weight.copy_(rounding.rtn(weight, FORMAT, 1))
        torch.testing.assert_close(model.eval()(x), by_hand(x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_llama_under_inductor():
    run = step(fresh(), text(), inner="inductor")
    assert_same_gradients(run, 1e-4)
    assert_covered(run.model)
    assert_curvature(run, HOOKED["llama"])
    with torch.no_grad():
        mine, theirs = (model(**run.batch).logits for model in (run.model.eval(), rounded(run.model)))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
