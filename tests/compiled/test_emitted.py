"""The source that Inductor emits for a device that is not there holds the kernels that it should."""

import pytest
import torch
import triton
import triton.language as tl

import lotion_fx
from lotion_fx import private
from lotion_fx.kernels.emit.emitted import Block, compile_kernels, emitted, forward_and_backward
from lotion_fx.variants import Backend
from tests.harness.versions import needs_emission

pytestmark = needs_emission


SMALL = {"shape": (4, 64, 64), "heads": 2}


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 100])
def test_a_training_step_is_emitted_and_compiles(arch):
    graphs = emitted(arch, "lotion", "nvfp4", **SMALL)
    assert [each.graph for each in graphs] == ["forward", "backward", "step"]
    for each in graphs:
        assert each.triton_launches and f"cc={arch}" in each.source
        assert "empty_strided_cpu(" not in each.source and "_for_cpu" not in each.source
        assert each.bytes > 0
    forward, backward, step = graphs
    # Forward and both gradients of four matrix products, and the attention.
    assert len([call for call in forward.library_calls if "mm" in call]) == 4
    assert len([call for call in backward.library_calls if "mm" in call]) == 8
    assert [call for call in forward.library_calls + backward.library_calls if "attention" in call] == [
        "torch.ops.aten._scaled_dot_product_efficient_attention.default",
        "torch.ops.aten._scaled_dot_product_efficient_attention_backward.default",
    ]
    # A kernel of ours, which `smooth/term` in the table is.
    assert set(step.library_calls) <= {"torch.ops.lotion_fx.add_term.default"}
    name, config, kernel = compile_kernels(forward.source, arch)[0]
    assert name in forward.triton_launches and config.num_warps >= 1
    assert kernel.metadata.target.arch == arch and kernel.asm["cubin"]


def test_what_is_emitted_is_what_a_user_of_bf16_gets():
    forward, backward = emitted(90, "ste", "nvfp4", dtype=torch.bfloat16, step=False, **SMALL)
    assert "_scaled_dot_product_flash_attention.default" in forward.source
    assert "_scaled_dot_product_flash_attention_backward.default" in backward.source
    assert "div_rn" in forward.source, "a code depends on w / s: the backend's options are not Inductor's own"


def test_nothing_is_left_behind():
    before = torch.cuda.is_available(), torch.Tensor.copy_, private.compile_fx
    model = lotion_fx.transform(Block(32, 2), "int4/8")
    forward_and_backward(lambda: model(torch.randn(2, 8, 32, requires_grad=True)), 80)
    assert (torch.cuda.is_available(), torch.Tensor.copy_, private.compile_fx) == before


@triton.jit
def _doubled(x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < size), mask=at < size)


@torch.library.triton_op("lotion_fx::doubled_in_a_test", mutates_args={})
def doubled(x: torch.Tensor) -> torch.Tensor:
    if x.device.type == "cpu":
        return 2 * x
    y = torch.empty_like(x)
    torch.library.wrap_triton(_doubled)[(triton.cdiv(x.numel(), 128),)](x, y, x.numel(), BLOCK=128)
    return y


def test_an_op_of_ours_is_inlined():
    doubled.register_autograd(lambda ctx, grad: doubled(grad), setup_context=lambda ctx, inputs, output: None)
    linear = torch.nn.Linear(32, 32)
    call = torch.compile(lambda x: linear(doubled(x)), backend=Backend())
    graphs = forward_and_backward(lambda: call(torch.randn(64, 32, requires_grad=True)), 80)
    for each in graphs:
        assert any(name.startswith("_doubled") for name in each.triton_launches)
        assert not [call for call in each.library_calls if "lotion_fx" in call]
    names = [name for name, _, _ in compile_kernels(graphs[0].source, 80)]
    assert any(name.startswith("_doubled") for name in names)
