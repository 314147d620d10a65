"""`kernels.curvature` against float64 sums, per-position gradients by `torch.func`, and its stated errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from lotion_fx.kernels.audit import product_works
from lotion_fx.kernels.audit.aot import describe
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.curvature import CONFIGS, curvature_linear, launch, reference, shape_class

# Of the squares' product relative to h, of the gradient relative to its own size; each of one unit in the last place.
UNIT = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
DTYPES = pytest.mark.parametrize("dtype", UNIT, ids=lambda dtype: str(dtype).removeprefix("torch."))
SMALL = Config({"BM": 32, "BN": 64, "BK": 32, "TRANSPOSE": 1, "GROUP": 2}, num_warps=4, num_stages=2)


def operands(device: str, dtype: torch.dtype, positions: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor, str]:
    """g and x with a few orders of magnitude in each, and how to make them again."""
    seed = int(torch.randint(2**31, ()))
    generator = torch.Generator().manual_seed(seed)

    def draw(width: int) -> Tensor:
        spread = torch.randn(positions, 1, generator=generator).exp()
        return (torch.randn(positions, width, generator=generator) * spread).to(dtype).to(device)

    return draw(outputs), draw(inputs), f"seed {seed}"


def run(g: Tensor, x: Tensor, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """The kernel on poisoned outputs."""
    outputs, inputs = g.shape[1], x.shape[1]
    gradient = torch.full((outputs, inputs), torch.nan, dtype=g.dtype, device=g.device)
    curvature = torch.full((outputs, inputs), torch.nan, device=g.device)
    launch(g, x, gradient, curvature, arch=80, config=config)
    return gradient, curvature


def assert_close(found: tuple[Tensor, Tensor], g: Tensor, x: Tensor, message: str) -> None:
    """Both outputs within a unit in the last place of float64's, and the gradient's sum within float32's error too."""
    gradient, curvature = reference(g.double(), x.double())
    size = g.double().abs().t() @ x.double().abs()
    error = (found[0].double() - gradient).abs()
    assert (error <= UNIT[g.dtype] * gradient.abs() + 1e-6 * size).all(), message
    assert ((found[1].double() - curvature).abs() <= UNIT[g.dtype] * curvature).all(), message


@DTYPES
@pytest.mark.parametrize("shape", [(300, 130, 75), (1, 1, 5), (64, 128, 64)], ids=str)
def test_equals_float64(device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    g, x, seed = operands(device, dtype, *shape)
    assert_close(run(g, x), g, x, seed)


def each_configuration() -> list[Any]:
    """Each once: the first of each class fast."""
    first = [configs[0] for configs in CONFIGS.values()]
    every = {describe(config): config for configs in CONFIGS.values() for config in configs}
    return [pytest.param(c, marks=() if c in first else pytest.mark.slow, id=name) for name, c in every.items()]


@pytest.mark.parametrize("config", each_configuration())
def test_every_configuration(device: str, config: Config) -> None:
    g, x, seed = operands(device, torch.bfloat16, 70, 130, 140)
    assert_close(run(g, x, config=config), g, x, seed)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=["bfloat16", "float16"]
)
def test_error_of_every_pair_of_mantissas(device: str, dtype: torch.dtype) -> None:
    """With one position, every product that can occur up to powers of two: the bound is one of the worst case."""
    steps = round(1 / torch.finfo(dtype).eps)
    mantissas = ((steps + torch.arange(steps)) / steps).to(dtype).to(device)[None]
    _, h = run(mantissas, mantissas, config=CONFIGS["large"][2])
    exact = mantissas.double().square().t() @ mantissas.double().square()
    error = ((h.double() - exact) / exact).abs().max()
    assert UNIT[dtype] / 2 < error < UNIT[dtype]


def test_squares_are_the_only_loss(device: str) -> None:
    g, x, seed = operands(device, torch.bfloat16, 300, 60, 50)
    _, h = run(g, x)
    rounded = [t.double().square().to(torch.bfloat16).double() for t in (g, x)]
    torch.testing.assert_close(h.double(), rounded[0].t() @ rounded[1], rtol=1e-6, atol=0, msg=seed)


def test_small_float16_gradients_do_not_vanish(device: str) -> None:
    g = torch.full((64, 16), 2.0**-24, dtype=torch.float16, device=device)
    x = torch.ones(64, 16, dtype=torch.float16, device=device)
    _, h = run(g, x)
    assert (h == 64 * 2.0**-48).all()


def test_is_the_sum_of_squared_gradients_of_positions(device: str) -> None:
    """``h = sum_n (d loss_n / dW)^2``, what the contraction of squares stands for."""
    torch.manual_seed(0)
    weight, x, target = (torch.randn(*s, dtype=torch.float64) for s in ((40, 30), (100, 30), (100, 40)))

    def loss(weight: Tensor, x: Tensor, target: Tensor) -> Tensor:
        return torch.log_softmax(weight @ x, 0) @ target

    each = vmap(grad(loss), (None, 0, 0))(weight, x, target)
    y = x @ weight.t()
    g = target - y.softmax(1) * target.sum(1, keepdim=True)
    gradient, h = run(g.float().to(device), x.float().to(device))
    torch.testing.assert_close(gradient.double().cpu(), each.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h.double().cpu(), each.square().sum(0), rtol=1e-5, atol=0)


def test_rows_may_stand_apart(device: str) -> None:
    """Slices of a joint projection's output, as of queries, keys and values."""
    g, x, seed = operands(device, torch.float32, 100, 90, 40)
    g, x = g[:, 30:60], x[:, :20]
    assert_close(run(g, x), g, x, seed)


def test_moves_the_bytes_it_says(device: str) -> None:
    if device != "cpu":
        pytest.skip("counted in the interpreter")
    from tests.harness.interpreter import counted_traffic

    g, x, _ = operands(device, torch.bfloat16, 150, 140, 70)
    work = product_works.curvature(80, (150, 140, 70), torch.bfloat16)
    for config in (work.configs[0], SMALL):
        with counted_traffic() as traffic:
            run(g, x, config=config)
        assert traffic.loaded + traffic.stored == work.bytes(config) >= work.minimum_bytes, config


@DTYPES
def test_op(device: str, dtype: torch.dtype) -> None:
    if device != "cpu":
        pytest.skip("opcheck runs on the CPU path")
    g, x, seed = operands(device, dtype, 150, 30, 20)
    torch.library.opcheck(curvature_linear, (g, x), test_utils=("test_schema", "test_faketensor"))
    gradient, curvature = curvature_linear(g, x)
    assert gradient.dtype == dtype and curvature.dtype == torch.float32
    assert_close((gradient, curvature), g, x, seed)


def test_refuses() -> None:
    g, x = torch.zeros(4, 3), torch.zeros(4, 2)
    with pytest.raises(
        ValueError, match=r"g is torch.float32 \(3, 4\) and x torch.float32 \(4, 2\): expected \[N, O\]"
    ):
        curvature_linear(g.t(), x)
    with pytest.raises(ValueError, match="of one dtype"):
        curvature_linear(g, x.half())


def test_shape_classes() -> None:
    assert shape_class(768, 768, torch.bfloat16, "ieee") == "small"
    assert shape_class(14336, 4096, torch.float16, "tf32") == "large"
    assert shape_class(14336, 4096, torch.float32, "tf32") == "tf32"
