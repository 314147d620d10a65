"""The report leaves no parameter out and says what is so."""

import io
import json
import math
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import lotion_fx
from lotion_fx.numerics import rounding
from tests.models import LM, ids, lm_loss


def trained(**options):
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager", **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lm_loss(model, ids()).backward()
    optimizer.step()
    return model


def test_every_parameter_is_there_with_a_reason_or_an_estimator():
    model = trained()
    rows = lotion_fx.report(model).rows
    assert {row.name for row in rows} == {name for name, _ in model.named_parameters()}
    for row in rows:
        assert bool(row.format) != bool(row.reason), row
        assert (row.estimator is None) == (row.format is None)
    assert lotion_fx.report(model)["norm.weight"].reason == "fewer than two dimensions"


def test_the_figures_are_what_they_say():
    model = trained()
    report = lotion_fx.report(model)
    w = model.head.weight.detach().double()
    noise = rounding.rtn(model.head.weight.detach(), lotion_fx.resolve("int4"), 1).double() - w
    assert report["head.weight"].sqnr == pytest.approx(
        10 * math.log10(w.square().sum() / noise.square().sum()), rel=1e-4
    )
    assert sum(row.share or 0 for row in report.rows) == pytest.approx(1)
    assert report.term == pytest.approx(sum(row.term or 0 for row in report.rows))
    quantized = sum(
        p.numel() for name, p in model.named_parameters() if name in ("mlp.0.weight", "mlp.2.weight", "head.weight")
    )
    assert report.coverage == pytest.approx(quantized / sum(p.numel() for p in model.parameters()))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def deep_model():
    model = LM()
    for part in reversed(["a_rather_long_name", "of_several_modules", "each_of_which", "has_its_own"]):
        model = nn.Sequential(OrderedDict({part: model}))
    return lotion_fx.transform(model, "int4", inner="aot_eager", only={"*.mlp.0.*": None})


@pytest.mark.parametrize("columns", [80, 100, 140])
def test_it_prints_within_a_terminal(monkeypatch, columns):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", str(columns))
    for report in (lotion_fx.report(deep_model()), lotion_fx.report(trained())):
        lines = str(report).splitlines()
        assert max(map(len, lines)) <= columns
        assert any("head.weight" in line for line in lines)


def test_piped_nothing_is_cut():
    report = lotion_fx.report(deep_model())
    assert "..." not in str(report)
    for row in report.rows:
        assert row.name in str(report) and row.reason in str(report)


def test_it_dumps_to_json():
    report = lotion_fx.report(trained())
    assert "head.weight" in str(report) and "analytic" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["parameters"][0]["name"] == "token.weight"


def test_before_a_step_it_says_so():
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager")
    assert lotion_fx.report(model)["head.weight"].reason == "not run yet"
    lm_loss(model, ids()).backward()
    assert lotion_fx.report(model)["head.weight"].reason == "no step was taken yet"
    assert lotion_fx.report(model)["head.weight"].uses == ("mm",)


def test_frozen_and_added_parameters_are_named():
    model = LM()
    model.head.weight.requires_grad_(False)
    lotion_fx.transform(model, "int4", inner="aot_eager")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    lm_loss(model, ids()).backward()
    optimizer.step()
    row = lotion_fx.report(model)["head.weight"]
    assert (row.format, row.estimator) == ("int4", None) and "frozen" in row.reason
    model.extra = nn.Linear(16, 3)
    assert lotion_fx.report(model)["extra.weight"].reason == "in no optimizer that has stepped"
    with pytest.raises(KeyError, match="'nothing': no such parameter"):
        lotion_fx.report(model)["nothing"]


def test_a_model_that_was_not_transformed():
    with pytest.raises(ValueError, match="not under lotion_fx"):
        lotion_fx.report(LM())


class Turned(nn.Module):
    """``x @ op(w)``, then a layer that is known."""

    def __init__(self, op, *shape):
        super().__init__()
        self.op, self.w, self.head = op, nn.Parameter(torch.randn(*shape) / 8), nn.Linear(shape[-1], 3)

    def forward(self, x):
        return self.head(self.op(x, self.w).tanh())


def row_of_turned(op, *shape, fmt="int4", curvature="factored"):
    torch._dynamo.reset()
    model = lotion_fx.transform(Turned(op, *shape), fmt, inner="aot_eager", curvature=curvature)
    model(torch.randn(5, 32)).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    report = lotion_fx.report(model)
    assert report["head.weight"].reason == ""
    return report["w"]


@pytest.mark.parametrize("curvature", ["factored", "full"])
def test_of_joined_heads_the_last_summed_dimension_is_the_axis(curvature):
    def out_projection(x, w):
        return torch.einsum("bhd,hdo->bo", x.view(-1, 4, 8), w)

    row = row_of_turned(out_projection, 4, 8, 24, curvature=curvature)
    assert (row.block_axis, row.estimator, row.reason) == (1, "analytic", "")


def test_an_axis_that_nothing_tells_is_called_assumed():
    mixed = row_of_turned(lambda x, w: x @ torch.matrix_exp(w), 32, 32)
    assert mixed.block_axis == 1 and "blocks along dimension 1 by assumption: mm sums over no one" in mixed.reason
    assert "register_contraction" not in mixed.reason
    assert "assumption" not in row_of_turned(lambda x, w: x @ torch.matrix_exp(w), 32, 32, fmt="int8/tensor").reason
    assert "assumption" not in row_of_turned(lambda x, w: x @ w, 32, 24).reason
    custom = row_of_turned(torch.ops.coverage.product, 32, 32)
    assert "coverage.product sums over no one" in custom.reason and "register_contraction" in custom.reason


@torch.library.custom_op("coverage::product", mutates_args=())
def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w


product.register_fake(lambda x, w: x.new_empty(x.shape[0], w.shape[1]))
product.register_autograd(
    lambda ctx, grad: (grad @ ctx.saved_tensors[1].mT, ctx.saved_tensors[0].mT @ grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.filterwarnings("ignore:.*no compiled graph.*")
def test_so_is_that_of_a_weight_that_no_graph_shows():
    def in_a_thread(x, w):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: x @ w).result()

    row = row_of_turned(torch.compiler.disable(in_a_thread), 32, 24)
    assert row.block_axis == 1 and "by assumption: no graph shows what sums over it" in row.reason
