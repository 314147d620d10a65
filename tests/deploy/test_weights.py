"""`quantized`: codes and scales that are, bit for bit, what `eval()` computes with."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import lotion_fx
from lotion_fx.deploy.weights import DTYPES, QuantizedWeight
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import formats, resolve
from tests.models import MLP

NAMES = sorted(
    {resolve(name).name for name in formats()} | {"int4/tensor", "int4/channel", "mxfp4/even", "mxfp4/floor"}
)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def hard(dtype, columns=50):
    """Rows hard to round: ties, both zeros, denormals, all zero, saturating, of one size; a short last block."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(40, columns, generator=generator) * torch.randn(40, 1, generator=generator).exp()
    tie = torch.arange(columns) % 14 / 2 - 3.5
    w[0], w[1] = tie, tie * 2**-9
    w[2], w[3] = 0.0, -0.0
    w[4] = torch.where(torch.arange(columns) % 2 == 0, 0.0, -0.0)
    w[5] = torch.finfo(dtype).tiny / 4 * torch.arange(columns)
    w[6], w[7] = torch.finfo(dtype).max / 4, 1.0
    w[8, 1:] = 0.0
    w[9] = torch.finfo(dtype).tiny
    return w.to(dtype)


def bits(w):
    return w.contiguous().view(BITS[w.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", NAMES)
@pytest.mark.parametrize("axis", [0, 1])
def test_dequantized_codes_are_the_rounded_weight_bit_for_bit(fmt, axis, dtype):
    w = hard(dtype) if axis == 1 else hard(dtype).t()
    weight = QuantizedWeight.of(w, resolve(fmt), axis)
    rounded = rounding.rtn(w, resolve(fmt), axis)
    assert weight.dequantize().dtype == dtype and weight.dequantize().isfinite().all()
    assert torch.equal(bits(weight.dequantize()), bits(rounded))


@pytest.mark.parametrize("fmt", NAMES)
def test_a_tensor_of_zeros_stays_zeros(fmt):
    assert torch.equal(QuantizedWeight.of(torch.zeros(3, 40), resolve(fmt), 1).dequantize(), torch.zeros(3, 40))


def test_nvfp4_is_read_by_other_definitions_of_its_types():
    """Codes as ml_dtypes' E2M1 and scales as its E4M3, multiplied as the layout says."""
    weight = QuantizedWeight.of(torch.randn(32, 64, generator=torch.Generator().manual_seed(1)), resolve("nvfp4"), 1)
    levels = weight.each_code().numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scales = weight.scales.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32) * weight.tensor_scale.numpy()
    expected = (levels.reshape(32, 4, 16) * scales[..., None]).reshape(32, 64)
    np.testing.assert_array_equal(weight.dequantize().numpy(), expected)
    np.testing.assert_array_equal(weight.block_scales().numpy(), scales)


@pytest.mark.parametrize(("fmt", "bits"), [("nvfp4", 4.5), ("mxfp4", 4.25), ("int4", 5.0), ("int8", 8.125)])
def test_bits_per_weight(fmt, bits):
    weight = QuantizedWeight.of(torch.randn(64, 256), resolve(fmt), 1)
    assert weight.bits_per_weight == pytest.approx(bits, rel=0.003)  # one tensor scale among 16,384 weights


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fmt", ["nvfp4", "int4/tensor", "mxfp4", "nf4", "int8"])
def test_they_are_what_eval_computes_with(fmt, inner):
    torch.manual_seed(0)
    model, x = MLP(), torch.randn(5, 20)
    lotion_fx.transform(model, fmt, inner=inner)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = lotion_fx.quantized(model)  # while it trains
    by_hand = MLP()
    by_hand.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, weight in weights.items():
            by_hand.get_parameter(name).copy_(weight.dequantize())
        expected = torch.compile(by_hand, backend=inner)(x)
        assert torch.equal(model.eval()(x), expected)
    assert {row.name for row in lotion_fx.report(model).rows if row.format} == set(weights)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8, 5))

    def forward(self, x):
        return self.conv(x).mean((-1, -2)) @ self.out


def test_blocks_run_along_what_the_graph_says():
    model = lotion_fx.transform(Convolution(), "int4", inner="aot_eager").eval()
    with pytest.raises(ValueError, match=r"'out'.*no forward has told yet; call the model once"):
        lotion_fx.quantized(model)
    model(torch.randn(2, 3, 6, 6))
    found = lotion_fx.quantized(model)
    assert {name: (w.axis, w.shape) for name, w in found.items()} == {
        "conv.weight": (1, (8, 3, 3, 3)),
        "out": (0, (8, 5)),
    }
    assert found["out"].codes.shape == (5, 4)


def test_what_cannot_be_deployed_is_refused():
    with pytest.raises(ValueError, match="not under lotion_fx; call"):
        lotion_fx.quantized(MLP())
    model = lotion_fx.transform(MLP(), "int4", inner="eager")
    parameter = next(p for p in model.parameters() if p.dim() == 2)
    with torch.no_grad():
        parameter[0, 0] = torch.nan
    with pytest.raises(ValueError, match="no finite numbers"):
        lotion_fx.quantized(model)
    with pytest.raises(ValueError, match=r"is float64; .*model.float\(\)"):
        lotion_fx.quantized(lotion_fx.transform(MLP().double(), "int4", inner="eager"))
    with pytest.raises(ValueError, match="nothing to deploy"):
        lotion_fx.quantized(lotion_fx.transform(nn.Embedding(5, 4), "int4", inner="eager"))


def test_tied_weights_are_there_once():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    model = lotion_fx.transform(nn.Sequential(first, second), "int4", inner="eager")
    assert list(lotion_fx.quantized(model)) == ["0.weight"]
