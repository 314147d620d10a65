"""Printed PyTorch and Triton against SymPy's own evaluation of the same expressions."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import sympy
import torch

from lotion_fx.numerics.noise import (
    RANDOMIZED,
    D,
    NoiseLaw,
    gaussian,
)
from lotion_fx.numerics.printer import TorchPrinter, gap, hi, lo, reach, source, third, torch_function, z
from tests.numerics.laws import (
    LAWS,
    laws,
)


def random_points(n: int = 10_000, seed: int = 0) -> list[torch.Tensor]:
    """z, lo, hi and the third level, float32, on uneven grids and at a few levels."""
    g = torch.Generator().manual_seed(seed)
    low = torch.randint(-12, 12, (n,), generator=g) / 4
    high = low + torch.randint(1, 9, (n,), generator=g) / 8
    at = low + (high - low) * torch.rand(n, generator=g)
    outer = torch.randint(0, 5, (n,), generator=g) / 4
    outer = torch.where(at - low < high - at, low - outer, high + outer)
    at[::50] = low[::50] = high[::50]
    return [at, low, high, outer]


def symbolic(law: NoiseLaw, name: str, given: list[torch.Tensor]) -> torch.Tensor:
    """The expressions by SymPy's own printing to NumPy, at the float32 points in float64; [outputs, n]."""
    at, low, high, outer = (x.double() for x in given)
    distance = high - low
    safe = torch.where(distance == 0, 1.0, distance)
    position, far = (at - low) / safe, torch.where(distance == 0, 0.0, outer - low) / safe
    function = sympy.lambdify((z, lo, hi, third, gap, D, reach), law.expressions[name], ["scipy", "numpy"])
    values = function(*(x.numpy() for x in (at, low, high, outer, distance, position, far)))
    return torch.stack([torch.as_tensor(value, dtype=torch.float64).expand_as(at) for value in values])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().amax(1, keepdim=True).clamp(min=1)
    assert torch.allclose(found.double() / scale, expected / scale, rtol=1e-6, atol=1e-6)


@laws
def test_printed_pytorch_agrees_with_the_expression(law):
    given = random_points()
    for name in law.expressions:
        for dtype, compare in ((torch.float32, close), (torch.float64, torch.testing.assert_close)):
            outputs = law.torch[name](*(x.to(dtype) for x in given))
            found = torch.stack([torch.as_tensor(out, dtype=dtype).expand(10_000) for out in outputs])
            compare(found, symbolic(law, name, given))


def test_printed_triton_agrees_with_the_expression(tmp_path):
    pytest.importorskip("triton")
    given = random_points(seed=1)
    parts = [(law.name, str(law.up), str(law.beyond) if law.beyond is not None else None) for law in LAWS]
    torch.save((parts, given), tmp_path / "inputs.pt")
    worker = [sys.executable, "-m", "tests.numerics.noise_worker", tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
    subprocess.run(worker, check=True, cwd=Path(__file__).parents[2])
    found = torch.load(tmp_path / "outputs.pt")
    assert len(found) == 5 * len(LAWS)
    for law, name in itertools.product(LAWS, RANDOMIZED.expressions):
        close(found[law.name, name], symbolic(law, name, given))


def test_printed_powers():
    exponents = [sympy.Rational(e) for e in ("-1", "-2", "-1/2", "1/2", "3/2", "-1/3", "5", "17", "-20")]
    at = torch.linspace(0, 1, 11, dtype=torch.float64)
    found = torch_function("powers", [(1 + D) ** e for e in exponents])(at, 0 * at, 0 * at + 1, 0 * at)
    for exponent, value in zip(exponents, found, strict=True):
        torch.testing.assert_close(value, (1 + at) ** float(exponent))


def test_printed_source_takes_common_subexpressions_once():
    text = source("mean_slopes", gaussian().expressions["mean_slopes"], TorchPrinter())
    assert text.count("torch.exp") == 1
    assert "torch.sqrt" not in text  # constants are worked out beforehand


def test_the_core_package_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import lotion_fx.noise, lotion_fx.rounding"
    subprocess.run([sys.executable, "-c", code], check=True)
