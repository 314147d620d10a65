"""One tensor scale for weights that stand side by side: the same weights, bit for bit, or refused."""

import pytest
import torch

from lotion_fx.deploy.sharing import groups_of, shared
from lotion_fx.deploy.weights import QuantizedWeight
from lotion_fx.numerics.formats import resolve


def weights(fmt="nvfp4/pow2", **sizes):
    torch.manual_seed(0)
    return {
        f"layers.0.{name}.weight": QuantizedWeight.of(torch.randn(32, 64) * size, resolve(fmt), 1)
        for name, size in sizes.items()
    }


@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value")])
def test_weights_stay_as_they_are_under_the_largest_scale(names):
    before = weights(**{name: 2.0**-i for i, name in enumerate(names)}, o_proj=0.1)
    after = shared(before)
    largest = max(float(before[f"layers.0.{name}.weight"].tensor_scale) for name in names)
    assert {float(after[f"layers.0.{name}.weight"].tensor_scale) for name in names} == {largest}
    assert all(torch.equal(after[name].dequantize(), before[name].dequantize()) for name in before)
    assert after["layers.0.o_proj.weight"] is before["layers.0.o_proj.weight"]


def test_blocks_of_zeros_do_not_hinder():
    w = torch.randn(32, 64) / 16
    w[3] = 0.0
    before = weights(q_proj=1.0) | {"layers.0.k_proj.weight": QuantizedWeight.of(w, resolve("nvfp4/pow2"), 1)}
    after = shared(before)["layers.0.k_proj.weight"]
    assert torch.equal(after.dequantize(), before["layers.0.k_proj.weight"].dequantize())
    assert (after.scales != 0).all()  # which a client may divide by


def test_a_block_too_small_for_the_scale_is_refused_by_name():
    w = torch.randn(32, 64) / 16
    w[3, :16] *= 2.0**-13
    before = weights(q_proj=1.0) | {"layers.0.k_proj.weight": QuantizedWeight.of(w, resolve("nvfp4/pow2"), 1)}
    with pytest.raises(ValueError, match=r"'layers.0.k_proj.weight' cannot take .* 1 of its 128 block scales"):
        shared(before)


def test_who_stands_side_by_side():
    names = ["a.q_proj", "a.v_proj", "b.q_proj", "b.up_proj", "b.gate_proj", "a.unquery", "key"]
    some = {f"{name}.weight": QuantizedWeight.of(torch.randn(16, 16), resolve("nvfp4"), 1) for name in names}
    assert groups_of(some) == [["a.q_proj.weight", "a.v_proj.weight"], ["b.up_proj.weight", "b.gate_proj.weight"]]
    assert shared(some) == some  # other scales than powers of two cannot be changed
