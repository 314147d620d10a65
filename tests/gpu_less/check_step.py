"""Training steps through Inductor's Triton in the interpreter, against ATen's operators; `test_step` runs this file."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import lotion_fx
from lotion_fx import update
from lotion_fx.examples.quickstart import GPT, VOCAB, next_token_loss
from tests.gpu_less.inductor import triton_on_cpu

STEPS = 2  # the second from a curvature that the first has moved
STRENGTH = 30.0  # makes the term a good part of the gradient


def train(inner: str, fmt: str, method: str, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Losses of all steps; of the last one each parameter's gradient, what the term added to it, and the new value."""
    torch.manual_seed(0)
    model = lotion_fx.transform(GPT(width=32, depth=1), fmt, method=method, inner=inner, strength=STRENGTH)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    losses, gradients = [], []
    for tokens in torch.randint(VOCAB, (STEPS, 2, 17), generator=torch.Generator().manual_seed(1)):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = next_token_loss(model, tokens)
        loss.backward()
        losses.append(loss.detach())
        gradients = [p.grad.clone() for p in parameters]
        optimizer.step()
    terms = [p.grad - gradient for p, gradient in zip(parameters, gradients, strict=True)]
    return {"losses": losses, "gradients": gradients, "terms": terms, "parameters": [p.data for p in parameters]}


@pytest.mark.parametrize(
    ("fmt", "method", "dtype"),
    [
        ("nvfp4", "lotion", torch.float32),
        ("int4", "ste_scale", torch.float32),
        pytest.param("int4", "lotion", torch.float32, marks=pytest.mark.slow),
        pytest.param("nvfp4", "ste_scale", torch.float32, marks=pytest.mark.slow),
        pytest.param("nvfp4", "lotion", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_step(fmt: str, method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "_compiled", {})  # one test's updates are not another's
    with triton_on_cpu():
        found, sources = run_and_get_code(train, "inductor", fmt, method, dtype)
    # Forward, backward and, with a term, the update at the optimizer's step.
    assert len(sources) >= (3 if method == "lotion" else 2)
    assert all("@triton.jit" in source and "cpp_fused" not in source for source in sources)
    expected = train("aot_eager", fmt, method, dtype)
    for name in expected:
        for at, (a, b) in enumerate(zip(found[name], expected[name], strict=True)):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max(), f"{name} {at}"
    shares = [t.abs().max() / g.abs().max() for t, g in zip(expected["terms"], expected["gradients"], strict=True)]
    assert (max(shares) > 0.1) == (method == "lotion")
