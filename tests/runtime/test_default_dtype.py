"""`torch.set_default_dtype` in force while a model is transformed, trained and read changes no number of ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx

OTHERS = (torch.float64, torch.bfloat16, torch.float16)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def trained(dtype: torch.dtype, optimizer: type[torch.optim.Optimizer], **settings: Any) -> dict[str, Tensor]:
    """A float32 model's numbers after three steps under a default dtype, the last with `penalty` in its loss."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 10))
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.2, 0.2, generator=generator)
    x, y = torch.randn(101, 32, generator=generator), torch.arange(101) % 10
    with default_dtype(dtype):
        lotion_fx.transform(model, inner="aot_eager", **settings)
        steps = optimizer(model.parameters(), lr=1e-3)  # type: ignore[call-arg]
        for step in range(3):
            torch.manual_seed(step)  # of the labels that "ggn" draws
            loss = F.cross_entropy(model(x), y)
            (loss + lotion_fx.penalty(model) if step == 2 else loss).backward()
            steps.step()
            steps.zero_grad()
        expected = lotion_fx.expected_loss(model, (x, y), F.cross_entropy)
        found = {"term": torch.tensor(lotion_fx.report(model).term, dtype=torch.float64)}
        found |= {"penalty": lotion_fx.penalty(model), "expected": expected.total}
        lotion_fx.calibrate(model, [(x, y)], F.cross_entropy, samples=2, generator=torch.Generator().manual_seed(1))
        found |= {"calibrated": lotion_fx.penalty(model), "evaluated": model.eval()(x)}
    return found | dict(model.named_parameters())


@pytest.mark.parametrize("curvature", ["factored", "full", "fisher", "ggn"])
def test_training_is_the_same_under_every_default_dtype(curvature: str) -> None:
    for optimizer, fmt in ((torch.optim.SGD, "int4"), (torch.optim.AdamW, "nvfp4")):
        expected = trained(torch.float32, optimizer, fmt=fmt, curvature=curvature)
        assert all(value.norm() > 0 for value in expected.values())
        for dtype in OTHERS:
            for name, value in trained(dtype, optimizer, fmt=fmt, curvature=curvature).items():
                assert value.dtype == expected[name].dtype, (name, dtype)
                torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=f"{name} under {dtype}")


def test_a_loss_in_the_graph_is_the_same_under_every_default_dtype() -> None:
    def loss(dtype: torch.dtype) -> Tensor:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 10))
        x, y = torch.randn(101, 32), torch.arange(101) % 10
        with default_dtype(dtype):
            lotion_fx.transform(model, "int4", inner="aot_eager", loss_fn=F.cross_entropy)
            value = lotion_fx.training_loss(model, (x, y))
            value.backward()
            weight = model[0].weight
            assert isinstance(weight, Tensor) and weight.grad is not None
            return torch.cat([value.detach()[None], weight.grad.flatten()])

    expected = loss(torch.float32)
    for dtype in OTHERS:
        torch.testing.assert_close(loss(dtype), expected, rtol=0, atol=0)
