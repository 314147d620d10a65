"""Weights that a loss depends on where it has no gradient, against the sum over all their roundings."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx
from tests.enumeration import two_points

FMT = "int2/tensor"


def _gate(model: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return (h > 0).to(x.dtype)


def _nearest_code(model: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return model.book[(h[:, None] - model.book).square().sum(-1).argmin(-1)]


def _by_mask(model: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return x * x[h > 0].sum()  # whose size depends on data


def _in_place(model: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, 0] = h[:, 0].sign()
    return out


def _without_gradients(model: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        return h.round()


WAYS = {
    "gt": _gate,
    "argmin": _nearest_code,
    "sign": lambda model, h, x: torch.sign(h),
    "round": lambda model, h, x: torch.round(h),
    "topk": lambda model, h, x: h.topk(1).indices * x,
    "lt": lambda model, h, x: torch.where(h < 0, x, 2 * x),
    "ge": lambda model, h, x: x.masked_fill(h >= 0, 0.0),
    "div": lambda model, h, x: torch.div(h, 0.3, rounding_mode="floor"),
    "a cast to torch.int64": lambda model, h, x: (3 * h).long().to(x.dtype),
}
OTHER_WAYS = {
    "by mask": (_by_mask, "gt"),
    "in place": (_in_place, "sign"),
    "without gradients": (_without_gradients, "round"),
}


class Stepping(nn.Module):
    """A layer whose outputs go by a step to another one, which is not quantized."""

    def __init__(self, way) -> None:
        super().__init__()
        self.first, self.last, self.way = nn.Linear(2, 2), nn.Linear(2, 2), way
        self.register_buffer("book", torch.tensor([[-1.0, 0.0], [0.3, 0.4], [0.1, -0.5]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.way(self, self.first(x), x))


def transformed(way, also: bool = False) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Stepping(way).double()
    only = {"first.weight": FMT, "last.weight": FMT if also else None}
    lotion_fx.transform(model, FMT, only=only, inner="eager")
    return model, (torch.randn(64, 2).double(), torch.randn(64, 2).double())


def increase(model: nn.Module, batch: tuple[Tensor, Tensor], name: str = "first.weight") -> float:
    """What one weight's roundings add to the loss on average, the sum over all of them."""
    parameter = model.get_parameter(name)
    latent = parameter.detach().clone()
    low, high, p = two_points(latent, lotion_fx.resolve(FMT))
    total = 0.0
    with lotion_fx.full_precision(model), torch.no_grad():
        start = float(F.mse_loss(model(batch[0]), batch[1]))
        for bits in itertools.product([False, True], repeat=latent.numel()):
            up = torch.tensor(bits)
            parameter.copy_(torch.where(up, high, low).view_as(latent))
            total += float(torch.where(up, p, 1 - p).prod() * F.mse_loss(model(batch[0]), batch[1]))
        parameter.copy_(latent)
    return total - start


@pytest.mark.parametrize("moments", ["auto", "off"])
@pytest.mark.parametrize("op", [*WAYS, *OTHER_WAYS])
def test_what_is_behind_a_step_is_not_called_nothing(op, moments):
    way, op = OTHER_WAYS.get(op) or (WAYS[op], op)
    model, batch = transformed(way)
    assert abs(increase(model, batch)) > 1e-4
    with pytest.warns(UserWarning, match=r"rounding 'first.weight' costs is not known, for its gradient is 0 behind"):
        result = lotion_fx.expected_loss(model, batch, F.mse_loss, moments=moments)
    assert str(result.certificates["first.weight"]) == f"unknown: its gradient is 0 behind {op}"
    assert "?" in str(result)
    assert float(result.terms["first.weight"]) == 0


@pytest.mark.parametrize("op", ["gt", "sign"])
def test_suggest_diagnose_and_round_tell_of_it(op):
    model, batch = transformed(WAYS[op], also=True)
    why = f"its gradient is 0 behind {op}"
    with pytest.warns(UserWarning, match=f"suggest, which leaves it narrow: .*{why}"):
        suggestion = lotion_fx.suggest(model, batch, F.mse_loss, bits=8)
    assert {choice.name: choice.why for choice in suggestion.choices} == {"first.weight": why, "last.weight": ""}
    assert f"first.weight: its costs are not known, {why}" in str(suggestion)
    with pytest.warns(UserWarning, match=f"diagnose, whose cosines have no part of it: .*{why}"):
        lotion_fx.diagnose(model, batch, F.mse_loss, directions=2, samples=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "round_: the batches' loss")  # of two weights on one batch
        rounded = lotion_fx.round_(model, [batch], F.mse_loss)
    assert {row.name: row.why for row in rounded.weights}["first.weight"] == why


@pytest.mark.parametrize(
    "way",
    [lambda model, h, x: x, lambda model, h, x: x + torch.zeros_like(h), lambda model, h, x: x.expand_as(h > 0)],
    ids=["not used", "its shape", "its shape, of a step"],
)
@pytest.mark.parametrize("moments", ["auto", "off"])
def test_what_the_loss_does_not_use_is_exactly_nothing(way, moments):
    model, batch = transformed(way, also=True)
    assert increase(model, batch) == 0
    result = lotion_fx.expected_loss(model, batch, F.mse_loss, moments=moments)
    assert result.certificates["first.weight"].kind == "exact"
    assert float(result.terms["first.weight"]) == 0


def test_a_way_with_a_gradient_beside_the_step_is_an_estimate():
    model, batch = transformed(lambda model, h, x: h + (torch.sign(h) - h).detach())
    result = lotion_fx.expected_loss(model, batch, F.mse_loss)
    assert result.certificates["first.weight"].kind == "analytic"


def test_what_a_mask_chooses_is_not_called_exact():
    """Chosen by their own signs, values pass as by a ReLU; in a trace the choice is fixed."""

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out[out > 0], y[out > 0])

    model, batch = transformed(lambda model, h, x: h)
    result = lotion_fx.expected_loss(model, batch, loss)
    assert str(result.certificates["first.weight"]) == "second order: gt: what gt chooses is taken as fixed"


@pytest.mark.parametrize("hidden", ["detach", "no_grad"])
def test_what_a_model_hides_from_its_gradient_is_in_the_stream(hidden):
    """It trains nothing, and rounding changes it."""

    def way(model: nn.Module, h: Tensor, x: Tensor) -> Tensor:
        if hidden == "detach":
            return h.detach()
        with torch.no_grad():
            return model.first(x)

    model, batch = transformed(way)
    result = lotion_fx.expected_loss(model, batch, F.mse_loss)
    assert result.certificates["first.weight"].kind == "exact"
    assert float(result.terms["first.weight"]) == pytest.approx(increase(model, batch), rel=1e-9)
    assert result.total.item() == pytest.approx(float(result.loss + result.terms["first.weight"]), rel=1e-12)


def test_calibration_leaves_it_out():
    model, batch = transformed(WAYS["gt"], also=True)
    found = lotion_fx.calibrate(model, [batch], F.mse_loss, samples=64)
    assert set(found) == {"last.weight"}
