"""AdaRound, the rival: its neighbours, its objective, and the order of layers.

Broken once and seen red: layers rounded by their full-precision inputs, the regularizer left out, the upper neighbour
taken everywhere.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import adaround
from torch import Tensor, nn

import lotion_fx
from lotion_fx.numerics import rounding


def error(rounded: Tensor, w: Tensor, gram: Tensor) -> float:
    return (((rounded - w) @ gram) * (rounded - w)).sum().item()


@pytest.mark.parametrize("fmt", ["int3", "int4/tensor", "nvfp4", "mxfp4"])
def test_errors_cancel_in_the_inputs_second_moments(fmt):
    """Each weight is one of its two neighbours, and the layer errs by far less than rounded to nearest."""
    fmt = lotion_fx.resolve(fmt)
    torch.manual_seed(0)
    w, x = torch.randn(16, 32), torch.randn(400, 32) @ torch.randn(32, 32)
    gram = x.T @ x / len(x)
    (low, high), _ = rounding.outcomes(w, fmt, -1)
    mine = adaround.learned(w, fmt, gram, w @ gram)
    assert ((mine == low) | (mine == high)).all()
    assert error(mine, w, gram) < 0.7 * error(rounding.rtn(w, fmt), w, gram)


def test_uncorrelated_inputs_leave_nearest():
    fmt = lotion_fx.resolve("int3")
    torch.manual_seed(0)
    w = torch.randn(8, 32)
    assert (adaround.learned(w, fmt, torch.eye(32), w) == rounding.rtn(w, fmt)).float().mean() > 0.99


def test_layers_make_up_for_those_before():
    """The second layer sees what the first gives once it is rounded, and wants what it gave before."""
    torch.manual_seed(0)
    model, fmt = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)).eval(), lotion_fx.resolve("int2")
    first, second = (layer.weight.detach().clone() for layer in model)
    inputs = [torch.randn(64, 24) @ torch.randn(24, 24) for _ in range(3)]
    # The order is that of execution, not of the names.
    adaround.adaround(model, inputs, {"1.weight": fmt, "0.weight": fmt})
    with torch.no_grad():
        before = torch.cat(inputs) @ first.T + model[0].bias
        after = model[0](torch.cat(inputs))
    wanted = second @ before.T / len(before)
    expected = adaround.learned(second, fmt, after.T @ after / len(after), wanted @ after)
    assert (model[1].weight == expected).float().mean() > 0.99
    alone = adaround.learned(second, fmt, before.T @ before / len(before), wanted @ before)
    assert (model[1].weight == alone).float().mean() < 0.99


def test_what_is_no_linear_layer_is_refused():
    with pytest.raises(ValueError, match="'0.weight' is no linear layer's weight"):
        adaround.adaround(nn.Sequential(nn.Conv2d(1, 1, 3)), [], {"0.weight": lotion_fx.resolve("int4")})
