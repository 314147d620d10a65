"""The learned scales that LOTION is compared with, against the paper's equations in float64."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import lsq
from torch import nn

import lotion_fx
from lotion_fx.numerics import rounding

FORMATS = ("nvfp4", "mxfp4", "int4/tensor", "int4", "int3", "int2", "int4/bf16", "nf4")


def learned(fmt: str, rows: int = 5, columns: int = 70) -> tuple[nn.Linear, lsq.LearnedScale]:
    """A layer with learned scales, its last blocks short."""
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows, bias=False)
    lsq.learn_scales(layer, {"weight": lotion_fx.resolve(fmt)})
    return layer, layer.parametrizations.weight[0]


@pytest.mark.parametrize("fmt", FORMATS)
def test_it_begins_at_the_weights_rounded_to_nearest(fmt):
    layer, _ = learned(fmt)
    latent = layer.parametrizations.weight.original
    assert torch.equal(layer.weight, rounding.rtn(latent, lotion_fx.resolve(fmt)))


def test_gradients_are_those_of_the_paper():
    """Equation 3 and the gradient scale of section 2.2, in float64, weight by weight, with some past the last level."""
    layer, scale = learned("int3", rows=3, columns=64)
    with torch.no_grad():
        scale.relative.copy_(torch.linspace(0.5, 1.3, scale.relative.numel()).reshape(scale.relative.shape))
    upstream = torch.randn(3, 64)
    layer.weight.backward(upstream)
    w, top, saturated = layer.parametrizations.weight.original, 3, 0
    for row in range(3):
        for block in range(2):
            s = (scale.first[row, block, 0] * scale.relative[row, block, 0]).double().item()
            by_scale = 0.0
            for column in range(32 * block, 32 * block + 32):
                v, g = w[row, column].item(), upstream[row, column].item()
                past = abs(v / s) > top
                saturated += past
                by_scale += g * (math.copysign(top, v) if past else round(v / s) - v / s)
                assert w.grad[row, column].item() == pytest.approx(0.0 if past else g)
            expected = (
                by_scale / math.sqrt(32 * top) * scale.first[row, block, 0].item()
            )  # of a share of the first scale
            assert scale.relative.grad[row, block, 0].item() == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert saturated > 10


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_deployed_has_scales_that_the_format_stores(fmt):
    layer, scale = learned(fmt)
    with torch.no_grad():
        scale.relative.mul_(torch.empty_like(scale.relative).uniform_(0.6, 1.5))
    stored, law, latent = scale.stored(), scale.fmt.law, layer.parametrizations.weight.original.detach()
    if fmt == "nvfp4":
        of_block = (stored / scale.tensor_scale).to(torch.float8_e4m3fn).float() * scale.tensor_scale
        assert torch.equal(of_block, stored)
    elif fmt == "mxfp4":
        assert torch.equal(stored, law.type.decode(law.type.encode(stored)))
    elif fmt == "int4/bf16":
        assert torch.equal(stored, stored.bfloat16().float())
    else:
        assert torch.equal(stored, scale.first * scale.relative)
    blocks = rounding.to_blocks(latent, scale.fmt)
    expected = rounding.from_blocks(scale.fmt.grid.nearest(blocks / stored) * stored, scale.fmt, -1, latent.shape)
    state = lsq.deployed_state(layer)
    assert list(state) == ["weight"] and torch.equal(state["weight"], expected)
    assert not torch.equal(expected, rounding.rtn(latent, scale.fmt))  # the scales moved


def test_a_learned_scale_rounds_better_than_the_largest_weight_s():
    """Squared error of a Gaussian weight at two bits, where the largest weight is a bad scale."""
    layer, _ = learned("int2", rows=16, columns=64)
    latent = layer.parametrizations.weight.original.detach().clone()
    optimizer = torch.optim.Adam(lsq.scales_of(layer), 0.02)

    def error() -> torch.Tensor:
        return (layer.weight - latent).square().sum()

    before = error().item()
    for _ in range(100):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error().item() < 0.8 * before
