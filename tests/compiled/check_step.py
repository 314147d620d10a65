"""Training steps through Inductor's Triton in the interpreter, against ATen's operators; `test_step` runs this file."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import lotion_fx
from lotion_fx import alike
from lotion_fx.examples.quickstart import GPT, VOCAB, next_token_loss
from tests.harness.inductor import triton_on_cpu
from tests.harness.training import STRENGTH, Step, assert_same, train

BATCHES = torch.randint(VOCAB, (2, 2, 17), generator=torch.Generator().manual_seed(1))


def steps(inner: str, fmt: str, method: str, dtype: torch.dtype) -> Step:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return next_token_loss(model, batch)

    torch.manual_seed(0)
    model = GPT(width=32, depth=1)
    return train(lotion_fx.transform(model, fmt, method=method, inner=inner, strength=STRENGTH), loss, BATCHES)


@pytest.mark.parametrize(
    ("fmt", "method", "dtype"),
    [
        ("nvfp4", "lotion", torch.float32),
        pytest.param("int4", "ste_scale", torch.float32, marks=pytest.mark.slow),
        pytest.param("int4", "lotion", torch.float32, marks=pytest.mark.slow),
        pytest.param("nvfp4", "ste_scale", torch.float32, marks=pytest.mark.slow),
        pytest.param("nvfp4", "lotion", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_step(fmt: str, method: str, dtype: torch.dtype) -> None:
    with triton_on_cpu(), mock.patch.dict(alike._compiled, clear=True):
        found, sources = run_and_get_code(steps, "inductor", fmt, method, dtype)
    # Forward, backward and, with a term, the update at the optimizer's step.
    assert len(sources) >= (3 if method == "lotion" else 2)
    assert all("@triton.jit" in source and "cpp_fused" not in source for source in sources)
    assert_same(found, steps("aot_eager", fmt, method, dtype), term=method == "lotion")
