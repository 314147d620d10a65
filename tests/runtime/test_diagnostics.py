"""`diagnose` on losses whose every quantity has a closed form."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx
from lotion_fx.numerics import rounding

FMT = lotion_fx.resolve("int3/tensor")
STEEP = torch.tensor([4.0, 0.3, 1.0, 2.5, 0.1, 7.0], dtype=torch.float64)  # the Hessian's diagonal
CENTRE = torch.tensor([0.9, -0.33, 0.42, 0.17, -0.61, 0.08], dtype=torch.float64)
START = CENTRE + torch.tensor([0.0, 0.05, -0.04, 0.06, 0.03, -0.05], dtype=torch.float64)


def half_squares(out: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (out - target).square().sum()


def quadratic(**options) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A model whose loss is ``1/2 sum_i STEEP_i (w_i - CENTRE_i)^2``."""
    model = nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(START)
    lotion_fx.transform(model, "int3/tensor", inner="eager", curvature="full", **options)
    return model, (STEEP.sqrt().diag(), (STEEP.sqrt() * CENTRE)[:, None])


def loss(w: Tensor) -> float:
    return float(0.5 * (STEEP * (w - CENTRE).square()).sum())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def nearest() -> Tensor:
    return rounding.rtn(START[None], FMT)[0]


def test_losses_on_the_line_are_the_quadratics() -> None:
    model, batch = quadratic()
    found = lotion_fx.diagnose(model, batch, half_squares, times=(-0.5, 0.0, 0.7, 1.0, 1.5))
    assert math.isclose(found.latent, loss(START)) and math.isclose(found.nearest.loss, loss(nearest()))
    assert [t for t, _ in found.nearest.line] == [-0.5, 0.0, 0.7, 1.0, 1.5]
    for t, seen in found.nearest.line:
        assert math.isclose(seen, loss(START + t * (nearest() - START)), rel_tol=1e-12)


@pytest.mark.parametrize("method", ["lotion", "ptq", "ste"])
def test_cosines_are_the_quadratics(method) -> None:
    model, batch = quadratic(method=method)
    found = lotion_fx.diagnose(model, batch, half_squares).nearest.over_all
    back = START - nearest()
    assert math.isclose(found.length, float(back.norm()))
    assert math.isclose(found.ste, cosine(STEEP * (CENTRE - nearest()), back), rel_tol=1e-9)
    descent = STEEP * (CENTRE - START)
    assert math.isclose(found.latent, cosine(descent, back), rel_tol=1e-9)
    # The full curvature is the sum of g^2 x^2 over rows, each of which holds one weight here; `expected_loss` has its
    # scale.
    h = (STEEP * (START - CENTRE)).square()
    w = START[None].clone().requires_grad_()
    term = 0.5 * (h * rounding.variance(w, FMT)[0]).sum()
    size = float(lotion_fx.expected_loss(model, batch, half_squares, moments="off").terms["weight"]) / float(
        term.detach()
    )
    (slope,) = torch.autograd.grad(rounding.variance(w, FMT)[0] @ (0.5 * size * h), w)
    assert math.isclose(found.term, cosine(-slope[0], back), rel_tol=1e-6)
    assert math.isclose(found.lotion, cosine(descent - slope[0], back), rel_tol=1e-6)


def test_edge_and_widths_are_roots_of_the_quadratic() -> None:
    model, batch = quadratic()
    growth, draw = 0.05, torch.Generator().manual_seed(3)
    found = lotion_fx.diagnose(model, batch, half_squares, growth=growth, directions=5, generator=draw)

    def root(step: Tensor) -> float:
        """Where ``t^2 d'Hd / 2 + t g'd`` is the growth."""
        a, b = float(STEEP @ step.square()) / 2, float(STEEP * (START - CENTRE) @ step)
        return (-b + math.sqrt(b * b + 4 * a * growth)) / (2 * a)

    step = nearest() - START
    assert math.isclose(found.nearest.edge, root(step), rel_tol=0.01)
    assert found.stays_inside(found.nearest) == (found.nearest.edge >= 1)
    draw.manual_seed(3)
    chances = []
    for width in found.widths:
        noise = torch.randn(1, 6, generator=draw)[0].double()
        noise *= step.norm() / noise.norm()
        assert math.isclose(width, root(noise), rel_tol=0.01)
        chances.append(cosine(STEEP * (CENTRE - START - noise), -noise))
    assert math.isclose(found.by_chance[0], sum(chances) / 5, rel_tol=1e-6)


def test_randomized_rounding_is_within_its_error() -> None:
    model, batch = quadratic()
    found = lotion_fx.diagnose(model, batch, half_squares, samples=400)
    exact = loss(START) + float(0.5 * STEEP @ rounding.variance(START[None], FMT)[0])
    assert abs(found.randomized[0] - exact) < 4 * found.randomized[1] < 0.3 * exact


def test_a_rounding_that_is_given_stands_beside_the_nearest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    lotion_fx.transform(model, "int3/tensor", inner="eager")
    x = torch.randn(64, 12)
    batch = (x, torch.randint(4, (64,)))
    before = copy.deepcopy(model.state_dict())
    other = copy.deepcopy(model)
    lotion_fx.round_(other, [batch], F.cross_entropy)
    found = lotion_fx.diagnose(model, batch, F.cross_entropy, rounded=dict(other.named_parameters()))
    with torch.no_grad():
        assert math.isclose(found.rounded.loss, float(F.cross_entropy(other.eval()(x), batch[1])), rel_tol=1e-5)
        assert math.isclose(found.nearest.loss, float(F.cross_entropy(model.eval()(x), batch[1])), rel_tol=1e-5)
    assert found.rounded.loss < found.nearest.loss
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert list(found.rounded.cosines) == ["0.weight", "2.weight"]
    same = lotion_fx.diagnose(model, batch, F.cross_entropy, rounded=dict(other.named_parameters()))
    assert str(same) == str(found) and "as given" in str(found)
    assert found.to_dict()["nearest"]["over_all"]["ste"] == found.nearest.over_all.ste


def test_weights_at_their_levels_have_no_way_back() -> None:
    model, batch = quadratic()
    with torch.no_grad():
        model.weight.copy_(nearest())
    found = lotion_fx.diagnose(model, batch, half_squares)
    assert found.nearest.edge == math.inf and math.isnan(found.nearest.over_all.ste)
    assert "the weights lie on their levels already" in str(found)


def test_a_noise_law_without_rounding_says_so() -> None:
    model, batch = quadratic(noise="adaptive")
    assert "randomized rounding: none" in str(lotion_fx.diagnose(model, batch, half_squares))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"samples": 1}, "samples=1: expected the number of randomized roundings, 2 or more"),
        ({"directions": 0}, "directions=0: expected the number of random directions, 2 or more"),
        ({"growth": 0}, "growth=0: expected an increase of the loss above 0"),
        ({"times": (0, math.nan)}, "times=nan: expected finite numbers"),
        ({"rounded": {}}, "rounded: it names none of the quantized weights weight; pass dict"),
        ({"rounded": {"weight": torch.zeros(2)}}, r"rounded\['weight'\] has shape \(2,\); expected the weight's"),
    ],
)
def test_bad_input_is_refused(arguments, told) -> None:
    model, batch = quadratic()
    with pytest.raises(ValueError, match=told):
        lotion_fx.diagnose(model, batch, half_squares, **arguments)


def test_a_loss_of_zero_needs_a_growth() -> None:
    model, batch = quadratic()
    with torch.no_grad():
        model.weight.copy_(CENTRE)
    with pytest.raises(ValueError, match="growth=None: it is a tenth of the loss, which is"):
        lotion_fx.diagnose(model, (batch[0], batch[0] @ model.weight.detach().T), half_squares)
