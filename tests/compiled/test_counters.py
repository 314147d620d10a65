"""What training with the term costs in the graphs that Inductor emits for a GPU, by Inductor's own count."""

import pytest
import torch

from lotion_fx.kernels.emit.emitted import emitted
from lotion_fx.passes.lower import fusion
from tests.harness.versions import needs_emission

pytestmark = needs_emission


WEIGHTS = 4  # of a block
SHAPE = (16, 1024, 768)  # the sizes of GPT-2 small; nothing of them is run
# A smaller batch has too few results for one kernel, and the last too few elements for reductions of both orders.
OTHERS = [(8, 1024, 768), (32, 1024, 768), (4, 2048, 768), (1, 8192, 768), (8, 1024, 1024), (4, 1024, 768)]


def cost(arch: int, method: str | None, dtype: torch.dtype, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Bytes, kernels of Triton and of libraries, and ATen's sums of workspaces, of the forward and the backward."""
    graphs = emitted(arch, method, shape=shape, heads=shape[2] // 64, dtype=dtype, step=False)
    assert [graph.graph for graph in graphs] == ["forward", "backward"]
    kernels = sum(len(graph.triton_launches) + len(graph.library_calls) for graph in graphs)
    return sum(graph.bytes for graph in graphs), kernels, sum(graph.workspace_sums for graph in graphs)


def check(arch: int, dtype: torch.dtype, shape: tuple[int, int, int] = SHAPE, most: float = 1.035) -> int:
    """Bytes and kernels; returns how many launches more there are, those of ATen's sums included."""
    plain_bytes, plain_kernels, plain_sums = cost(arch, None, dtype, shape)
    bytes_, kernels, sums = cost(arch, "lotion", dtype, shape)
    assert bytes_ <= most * plain_bytes, f"{bytes_ / plain_bytes:.3f} of the bytes of a plain block"
    assert kernels <= plain_kernels + WEIGHTS, f"{kernels} kernels, a plain block has {plain_kernels}"
    return kernels - plain_kernels + sums - plain_sums


@pytest.mark.slow
def test_a_block_moves_few_bytes_more_and_has_at_most_a_kernel_more_for_each_weight():
    assert check(80, torch.float32) <= WEIGHTS


def test_so_it_does_in_bf16_with_half_the_tokens():
    assert check(100, torch.bfloat16, OTHERS[0], 1.05) < WEIGHTS


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_so_it_does_in_bf16_and_on_every_generation(arch):
    assert check(arch, torch.bfloat16) < WEIGHTS


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", OTHERS, ids=str)
def test_so_it_does_at_other_sizes(dtype, shape):
    launches = check(100, dtype, shape, 1.05)
    assert launches <= WEIGHTS or (dtype == torch.float32 and shape[0] == 1)  # two kernels put vectors together


@pytest.mark.slow
def test_the_plain_forms_would_cost_what_is_forbidden(monkeypatch):
    monkeypatch.setattr(fusion, "on_gpu", lambda node: False)
    with pytest.raises(AssertionError, match="of the bytes"):
        check(80, torch.float32)
