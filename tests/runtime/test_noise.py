"""Training under a noise law: the objective around its mean, sampling, saved state, refusals."""

from __future__ import annotations

import copy

import pytest
import sympy
import torch
from torch import nn

import lotion_fx
from lotion_fx.compiling import cacheable
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import resolve
from lotion_fx.numerics.noise import (
    SMOOTHSTEP,
    D,
    NoiseLaw,
    register_noise,
    resolve_noise,
)
from lotion_fx.state import registry, smoothings_of
from lotion_fx.update import term_of
from tests.models import MLP, counted


def objective_gradient(weight: torch.Tensor, loss, h: torch.Tensor, fmt: lotion_fx.Format, law: NoiseLaw):
    """d/dw [L(mean) + 1/2 sum h sigma^2] by autograd in float64 through the symbolic law; two-level laws."""
    w = weight.detach().double().requires_grad_()
    s = w.abs().amax(-1, keepdim=True) / fmt.grid.max
    x = w / s
    low, high = (level.detach() for level in fmt.grid.neighbours(x.detach()))
    position = (x - low) / torch.where(high == low, 1.0, high - low)
    p = position**2 * (3 - 2 * position) if law is SMOOTHSTEP else None
    assert p is not None
    mean = s * (low + (high - low) * p)
    sigma2 = s**2 * (high - low) ** 2 * p * (1 - p)
    return torch.autograd.grad(loss(mean) + 0.5 * (h * sigma2).sum(), w)[0]


def test_a_step_trains_the_objective_around_the_mean():
    torch.manual_seed(0)
    model, fmt = nn.Sequential(nn.Linear(12, 5, bias=False)).double(), resolve("int4/channel")
    x, y = torch.randn(20, 12, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    weight = model[0].weight
    counted(model, "int4/channel", noise="smoothstep", curvature="full", inner="aot_eager")
    loss = (model(x) - y).square().sum() / 20
    loss.backward()
    mean = rounding.mean(weight.detach(), fmt, law=SMOOTHSTEP)
    error = x @ mean.T - y
    assert loss.item() == pytest.approx((error.square().sum() / 20).item())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = weight.detach().clone()
    optimizer.step()
    g = 2 * error / 20
    h = 20 * g.square().T @ x.square()  # T = 20 rows
    expected = objective_gradient(before, lambda m: (x @ m.T - y).square().sum() / 20, h, fmt, SMOOTHSTEP)
    assert (before - weight.detach() - expected).norm() < 1e-5 * expected.norm()
    assert smoothings_of(model)[0].settings.noise is SMOOTHSTEP
    term, after = lotion_fx.penalty(model), weight.detach()
    expected = 0.5 * (h * rounding.variance(after, fmt, law=SMOOTHSTEP)).sum()
    torch.testing.assert_close(term.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(term_of(registry[weight]), expected, rtol=1e-5, atol=0)
    (slope,) = torch.autograd.grad(term, weight)
    torch.testing.assert_close(slope, 0.5 * rounding.variance_vjp(after, h, fmt, law=SMOOTHSTEP), rtol=1e-4, atol=1e-9)


def test_a_registered_noise_is_in_the_key_of_compile_caches():
    def key():
        return cacheable()

    before = key()
    register_noise("test_key", D**2)
    assert key() != before


def test_an_unbiased_noise_adds_no_node():
    for noise, mode in (("randomized", "latent"), ("gaussian", "mean")):
        model = counted(MLP(), "int4", noise=noise, inner="eager")
        assert [smoothing.tally.forward_mode for smoothing in smoothings_of(model)] == [mode]


def never() -> NoiseLaw:
    """A law that rounds down up to D = 0.9."""
    return register_noise("test_never", sympy.Piecewise((0, D < 0.9), (10 * D - 9, True)))


def rounds_down(rounded: torch.Tensor, weight: torch.Tensor, fmt: lotion_fx.Format) -> bool:
    scale = rounding.scale(weight, fmt)[..., 0]
    x, low = weight / scale, (weight / scale).remainder(1) < 0.89
    return torch.allclose((rounded / scale)[low], x.floor()[low], atol=1e-4, rtol=0)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_randomized_and_rr_sample_from_the_law(inner):
    model, fmt = nn.Sequential(nn.Linear(64, 64, bias=False)), resolve("int4/channel")
    counted(model, "int4/channel", method="rr", noise=never(), inner=inner)
    weight = model[0].weight.detach()
    assert rounds_down(model(torch.eye(64)).T.detach(), weight, fmt)
    with lotion_fx.randomized(model), torch.no_grad():
        assert rounds_down(model(torch.eye(64)).T, weight, fmt)


def test_eval_is_at_the_nearest_whatever_the_noise():
    model = counted(nn.Sequential(nn.Linear(32, 8, bias=False)), "int4", noise="smoothstep", inner="eager")
    weight = model[0].weight.detach()
    torch.testing.assert_close(model.eval()(torch.eye(32)).T, rounding.rtn(weight, resolve("int4")))


def test_the_state_of_another_noise_is_refused():
    make = lambda noise: counted(MLP(), "int4", noise=noise, inner="eager")  # noqa: E731
    state = lotion_fx.state_dict(make("smoothstep"))
    lotion_fx.load_state_dict(make("smoothstep"), state)
    with pytest.raises(ValueError, match=r"noise=\['smoothstep'\], this model has \['randomized'\]"):
        lotion_fx.load_state_dict(make("randomized"), state)


def test_unknown_noise_is_refused_before_anything_changes():
    model = MLP()
    with pytest.raises(ValueError, match="noise='gausian': unknown noise; did you mean gaussian"):
        counted(model, noise="gausian")
    counted(model, noise="gaussian", inner="eager")


def test_torch_compile_s_backend_takes_a_noise():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(32, 8, bias=False))
    options = {"fmt": "int4", "noise": "smoothstep", "inner": "aot_eager"}
    out = torch.compile(model, backend="lotion_fx", options=options)(torch.eye(32))
    mean = rounding.mean(model[0].weight.detach(), resolve("int4"), law=SMOOTHSTEP)
    torch.testing.assert_close(out.detach().T, mean)


class Recurrent(nn.Module):
    """Dynamo skips its recurrent part."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.RNN(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def test_a_weight_outside_of_every_graph_runs_at_the_mean():
    model, x = Recurrent(), torch.randn(3, 2, 8)
    at_mean = copy.deepcopy(model)
    law, fmt = resolve_noise("smoothstep"), resolve("int4")
    with torch.no_grad():
        for parameter in at_mean.parameters():
            if parameter.dim() > 1:
                parameter.copy_(rounding.mean(parameter, fmt, 1, law=law))
    counted(model, "int4", noise="smoothstep", inner="eager")
    torch.testing.assert_close(model(x), at_mean(x))


def test_a_weight_outside_of_every_graph_is_sampled_from_the_law():
    model = counted(Recurrent(), "int4/channel", noise=never(), inner="eager")
    weight, seen = model.rnn.weight_ih_l0.detach().clone(), []
    model.rnn.register_forward_pre_hook(lambda module, _: seen.append(module.weight_ih_l0.detach().clone()))
    with lotion_fx.randomized(model), torch.no_grad():
        model(torch.randn(3, 2, 8))
    assert not torch.equal(seen[0], weight) and rounds_down(seen[0], weight, resolve("int4/channel"))
