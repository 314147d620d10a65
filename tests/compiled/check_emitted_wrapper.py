"""Training steps by the wrappers emitted for a GPU, run on CPU tensors; `test_emitted_wrapper` runs this file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx

import lotion_fx
import tests.harness.attention  # noqa: F401, which the wrappers call
from lotion_fx import alike, private
from lotion_fx.kernels.emit.emitted import Block, Emitted, compile_for
from tests.harness.inductor import cuda_wrapper_on_cpu
from tests.harness.training import STRENGTH, Step, assert_same, train

BATCHES = torch.randn(2, 2, 16, 32, generator=torch.Generator().manual_seed(1))


def steps(fmt: str, method: str, inner: str) -> Step:
    torch.manual_seed(0)
    model = lotion_fx.transform(Block(32, 2), fmt, method=method, inner=inner, strength=STRENGTH)
    return train(model, lambda model, batch: model(batch).square().mean(), BATCHES)


def emitted_steps(fmt: str, method: str, arch: int) -> tuple[Step, list[Emitted]]:
    """The same by the wrappers emitted for an architecture."""
    wrappers: list[Emitted] = []

    def compile_fx(gm: fx.GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any]) -> Callable[..., Any]:
        function, found = compile_for(arch, gm, inputs, config_patches, cuda_wrapper_on_cpu)
        wrappers.extend(found)
        return function

    torch._dynamo.reset()
    with mock.patch.object(private, "compile_fx", compile_fx), mock.patch.dict(alike._compiled, clear=True):
        return steps(fmt, method, "inductor"), wrappers


@pytest.mark.parametrize(
    ("arch", "fmt", "method"),
    [
        (100, "nvfp4", "lotion"),
        pytest.param(80, "nvfp4", "lotion", marks=pytest.mark.slow),
        pytest.param(80, "int4", "ste_scale", marks=pytest.mark.slow),
    ],
)
def test_emitted_wrapper(arch: int, fmt: str, method: str) -> None:
    found, wrappers = emitted_steps(fmt, method, arch)
    graphs = ["forward", "backward", "step"] if method == "lotion" else ["forward", "backward"]
    assert [wrapper.graph for wrapper in wrappers] == graphs
    assert all(wrapper.triton_launches and f"cc={arch}" in wrapper.source for wrapper in wrappers)
    assert_same(found, steps(fmt, method, "aot_eager"), term=method == "lotion")
