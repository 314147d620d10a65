"""What training with the term costs in the graphs that Inductor emits for a GPU, by Inductor's own count."""

import pytest
import torch

from lotion_fx.kernels.emitted import emitted
from lotion_fx.passes import curvature

WEIGHTS = 4  # of a block
SHAPE = (16, 1024, 768)  # the sizes of GPT-2 small; nothing of them is run


def cost(arch: int, method: str | None, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes and kernels, Triton's and libraries', of the forward and the backward graph."""
    graphs = emitted(arch, method, shape=SHAPE, dtype=dtype, step=False)
    assert [graph.graph for graph in graphs] == ["forward", "backward"]
    kernels = sum(len(graph.triton_launches) + len(graph.library_calls) for graph in graphs)
    return sum(graph.bytes for graph in graphs), kernels


def check(arch: int, dtype: torch.dtype) -> None:
    (plain, plain_kernels), (bytes_, kernels) = (cost(arch, method, dtype) for method in (None, "lotion"))
    assert bytes_ <= 1.035 * plain, f"{bytes_ / plain:.3f} of the bytes of a plain block"
    assert kernels <= plain_kernels + WEIGHTS, f"{kernels} kernels, a plain block has {plain_kernels}"


def test_a_block_moves_few_bytes_more_and_has_at_most_a_kernel_more_for_each_weight():
    check(80, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_so_it_does_in_bf16_and_on_every_generation(arch):
    check(arch, torch.bfloat16)


@pytest.mark.slow
def test_the_plain_forms_would_cost_what_is_forbidden(monkeypatch):
    monkeypatch.setattr(curvature, "on_gpu", lambda node: False)
    with pytest.raises(AssertionError, match="of the bytes"):
        check(80, torch.float32)
