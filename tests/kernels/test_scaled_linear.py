"""Weight and activations of 4 bits: codes against the formats' own methods, products against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lotion_fx.kernels.audit import product_works
from lotion_fx.kernels.device import target_of
from lotion_fx.kernels.packed import Packed, unpack
from lotion_fx.kernels.packed_linear import launch
from lotion_fx.kernels.scaled_linear import (
    block_scaled,
    candidates,
    decoded_rows,
    launch_product,
    launch_rows,
    quantize_rows,
    scaled_linear,
    scaled_product,
    supported,
)
from lotion_fx.kernels.targets import TARGETS
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import Format, resolve
from lotion_fx.numerics.scales import PowerOfTwoScale
from tests.harness.interpreter import INTERPRETING, counted_traffic
from tests.harness.versions import needs_scaled_products
from tests.kernels.packing import excess, packed, poisoned

__all__ = ["poisoned"]

names = pytest.mark.parametrize("name", ("nvfp4", "mxfp4", pytest.param("mxfp4/even", marks=pytest.mark.slow)))
dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))


@pytest.fixture
def generator() -> torch.Generator:
    seed = int(torch.randint(2**31, ()))
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def activations(rows: int, features: int, generator: torch.Generator) -> Tensor:
    """Rows of very different size, with a row and a block of zeros, an outlier, and ties."""
    x = torch.randn(rows, features, generator=generator) * 4.0 ** torch.randint(-6, 7, (rows, 1), generator=generator)
    x[0, :20], x[1], x[2, 3] = 0, 0, 1e4
    x[-1] = torch.arange(features) % 49 * 0.125 - 3  # in NVFP4 multiples of the scale's fourth, and many a tie
    return x


@names
@dtypes
@pytest.mark.parametrize("e2m1_cvt", (False, True), ids=("shifts", "conversion"))
def test_rows_are_rounded_one_by_one(
    name: str, dtype: torch.dtype, e2m1_cvt: bool, generator: torch.Generator, device: str, poisoned: None
) -> None:
    if e2m1_cvt and not INTERPRETING and not target_of(torch.device(device)).supports("e2m1"):
        pytest.skip("no conversion to E2M1 on this device")
    fmt = resolve(name)
    for rows, features in ((5, 33), (4, 1500)):
        x = activations(rows, features, generator).to(dtype)
        expected = quantize_rows(x, name)
        levels = unpack(Packed(expected[0], expected[1], expected[2][:, None]), fmt, features)
        assert torch.equal(levels, torch.stack([rounding.rtn(row.float(), fmt) for row in x]))
        for got, wanted in zip(launch_rows(x.to(device), fmt, e2m1_cvt=e2m1_cvt), expected, strict=True):
            assert torch.equal(got.cpu(), wanted)


def products(x: Tensor, w: Tensor, fmt: Format, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The product of the rounded operands in float64 and the sum of its terms' magnitudes."""
    x, w = (torch.stack([rounding.rtn(row.float(), fmt) for row in x]).double(), rounding.rtn(w, fmt).double())
    return x @ w.T + bias.double(), x.abs() @ w.abs().T + bias.double().abs()


@needs_scaled_products
@names
@dtypes
@pytest.mark.parametrize("native", (False, True), ids=("decoded", "block-scaled"))
def test_it_is_the_product_of_the_rounded_operands(
    name: str, dtype: torch.dtype, native: bool, generator: torch.Generator, device: str, poisoned: None
) -> None:
    if native and not INTERPRETING and not block_scaled(target_of(torch.device(device))):
        pytest.skip("no block-scaled products on this device")
    fmt = resolve(name)
    for rows, outputs, features in ((3, 37, 75), (70, 131, 301)):
        x, w = activations(rows, features, generator).to(dtype), torch.randn(outputs, features, generator=generator)
        bias = torch.randn(outputs, generator=generator).to(dtype)
        x_codes, x_scales, row_scales = (t.to(device) for t in quantize_rows(x, name))
        weight = [None if t is None else t.to(device) for t in (*packed(w, fmt), bias)]
        if native:
            y = launch_product(x_codes, x_scales, row_scales, *weight, fmt, dtype)
        else:
            y = launch(decoded_rows(x_codes, x_scales, fmt), *weight, fmt, row_scales=row_scales, dtype=dtype)
        assert y.dtype == dtype
        worst = (features + 1) * 2.0**-24  # of a sum of so many terms in float32, in whatever order (Higham 2002, 4.2)
        assert excess(y.cpu(), *products(x, w, fmt, bias)).max() <= worst


@names
def test_the_operators_on_the_cpu_are_the_reference(name: str, generator: torch.Generator) -> None:
    fmt = resolve(name)
    x, w = torch.randn(2, 3, 45, generator=generator), torch.randn(9, 45, generator=generator)
    weight = (*packed(w, fmt), torch.randn(9, generator=generator))
    y = scaled_linear(x, *weight, name)
    assert y.shape == (2, 3, 9)
    assert excess(y.flatten(0, 1), *products(x.flatten(0, 1), w, fmt, weight[-1])).max() <= 1e-6
    rows = quantize_rows(x[0], name)
    assert scaled_product(*rows, *weight, name, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.slow
def test_the_operators_are_well_formed(generator: torch.Generator) -> None:
    fmt, x = resolve("nvfp4"), torch.randn(3, 45, generator=generator)
    weight = (*packed(torch.randn(9, 45, generator=generator), fmt), torch.randn(9, generator=generator))
    rows = quantize_rows(x, "nvfp4")
    torch.library.opcheck(torch.ops.lotion_fx.quantize_rows.default, (x, "nvfp4"))
    torch.library.opcheck(torch.ops.lotion_fx.scaled_product.default, (*rows, *weight, "nvfp4", torch.bfloat16))


@needs_scaled_products
@pytest.mark.skipif(not INTERPRETING, reason="the interpreter counts bytes")
@pytest.mark.parametrize("name", ("nvfp4", "mxfp4"))
def test_the_bytes_that_are_predicted_are_the_bytes_that_move(name: str) -> None:
    fmt, target = resolve(name), TARGETS[120]
    x, weight = torch.randn(9, 1536).bfloat16(), packed(torch.randn(144, 1536), fmt)
    rounding_work = product_works.scaled_rows(fmt, 9, 1536, target)
    product = product_works.scaled_product(fmt, 9, 144, 1536, target)
    for config in rounding_work.configs:
        with counted_traffic() as traffic:
            rows = launch_rows(x, fmt, config=config)
        assert traffic.loaded + traffic.stored == rounding_work.bytes(config)
    for config in product.configs:
        with counted_traffic() as traffic:
            launch_product(*rows, *weight, None, fmt, torch.bfloat16, config=config)
        assert traffic.loaded + traffic.stored == product.bytes(config)
    one_tile = replace(product.configs[0], constants={"BM": 128, "BN": 256, "BK": 128})
    assert product.bytes(one_tile) == product.minimum_bytes
    one_piece = replace(rounding_work.configs[0], constants={"SIZE": 2048})
    assert rounding_work.bytes(one_piece) == rounding_work.minimum_bytes


@needs_scaled_products
@pytest.mark.parametrize("arch", (100, 120))
def test_every_candidate_tile_gives_the_same(arch: int, generator: torch.Generator, device: str) -> None:
    if not INTERPRETING and target_of(torch.device(device)).arch != arch:
        pytest.skip(f"not an sm_{arch}")
    fmt = resolve("nvfp4")
    x, w = activations(70, 301, generator).bfloat16(), torch.randn(270, 301, generator=generator)
    bias = torch.randn(270, generator=generator)
    arguments = [t.to(device) for t in (*quantize_rows(x, "nvfp4"), *packed(w, fmt), bias)]
    for config in candidates(TARGETS[arch]):
        y = launch_product(*arguments, fmt, torch.bfloat16, config=config).cpu()
        assert excess(y, *products(x, w, fmt, bias)).max() <= 1e-6, config


@pytest.mark.parametrize(
    "fmt",
    [
        resolve("int4"),
        resolve("mxfp8_e4m3"),
        replace(resolve("mxfp4"), name="blocks", block=16),
        replace(resolve("nvfp4"), name="powers", law=PowerOfTwoScale()),
    ],
    ids=lambda fmt: fmt.name,
)
def test_pairings_that_the_hardware_has_not_are_refused(fmt: Format) -> None:
    # Triton would take uint8 scales of blocks of 16 for scales of blocks of 32.
    with pytest.raises(NotImplementedError, match=f"fmt='{fmt.name}': expected E2M1 levels with"):
        supported(fmt)
    with pytest.raises(NotImplementedError, match=f"fmt='{fmt.name}'"):
        launch_product(*[torch.zeros(1, 8, dtype=torch.uint8)] * 5, None, None, fmt, torch.float32)
