"""A million weights, hard ones among them: codes, training graphs, the CPU's operator and plain arithmetic agree."""

import pytest
import torch
from torch import nn

import lotion_fx
from lotion_fx.deploy.packed_model import PackedWeight
from lotion_fx.kernels.packed import pack_in_aten, unpack
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import resolve
from tests.deploy.test_weights import NAMES, bits, hard

FAST = {"nvfp4", "nvfp4/pow2", "int4/bf16", "mxfp4"}
SIZE = 1000  # no multiple of a block: the last one is short


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "fmt", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in sorted({*NAMES, *FAST})]
)
def test_a_million_weights_agree_bit_for_bit(fmt, dtype):
    torch.manual_seed(0)
    format = resolve(fmt)
    w = torch.randn(SIZE, SIZE) * torch.randn(SIZE, 1).exp() * 0.02
    w[:40] = hard(torch.float32, SIZE).clamp(-1e4, 1e4)
    w[40:80, 0] = 1e30 if dtype == torch.float32 else 1e4  # beside it all others of its block are zero
    layer = nn.Linear(SIZE, SIZE, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(w)
    own = layer.weight.detach().clone()
    lotion_fx.transform(layer, fmt, inner="aot_eager").eval()
    found = lotion_fx.quantized(layer)["weight"]
    expected = found.dequantize()
    assert expected.isfinite().all() and expected.dtype == dtype
    assert torch.equal(bits(rounding.rtn(own, format, -1)), bits(expected))
    assert torch.equal(bits(unpack(pack_in_aten(own, format), format, SIZE).to(dtype)), bits(expected))
    with torch.no_grad():  # rows of the identity: what the graph multiplies with
        rows = torch.eye(SIZE, dtype=dtype)[:: SIZE // 8]
        by_graph = layer(rows)
        by_operator = lotion_fx.quantize(layer)(rows)
    few = expected.T[:: SIZE // 8]
    assert torch.equal(by_graph, few) and torch.equal(by_operator, few)
    assert torch.equal(bits(PackedWeight(found, own.stride())()), bits(expected))
