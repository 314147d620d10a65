"""The linear layer on packed weights against float64, and its decoding on every code and every scale."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lotion_fx.kernels.audit import product_works
from lotion_fx.kernels.packed import FEW, Packed, unpack
from lotion_fx.kernels.packed_linear import candidates, chunks_of, constants, launch, packed_linear, place
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import Format, codebook, resolve
from lotion_fx.numerics.grids import Minifloat
from lotion_fx.numerics.scales import Float32Scale, PowerOfTwoScale
from tests.harness.interpreter import INTERPRETING, counted_traffic
from tests.kernels.packing import excess, packed, poisoned

__all__ = ["poisoned"]

NAMES = (
    *(
        "nvfp4",
        "mxfp4",
        "mxfp4/floor",
        "fp4",
        "int4",
        "int4/128",
        "int4/channel",
        "int4/tensor",
        "nvfp4/pow2",
        "int4/bf16",
        "int3",
        "int6/64",
    ),
    *("int8", "int8/64", "fp8", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


# Where a dtype decides what takes the scale, `test_every_code...` has them all.
bfloat16_first = pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float32), slow(torch.float16)], ids=str)


@pytest.fixture
def generator() -> torch.Generator:
    seed = int(torch.randint(2**31, ()))
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The product in float64 and the sum of its terms' magnitudes."""
    b = torch.zeros(()) if bias is None else bias.double()
    x, weight = x.double(), weight.double()
    return x @ weight.T + b, x.abs() @ weight.abs().T + b.abs()


@pytest.mark.parametrize("name", NAMES)
@bfloat16_first
def test_it_is_the_product_with_the_rounded_weight(
    name: str, dtype: torch.dtype, generator: torch.Generator, device: str, poisoned: None
) -> None:
    fmt = resolve(name)
    for rows, outputs, features in ((3, 37, 300), (70, 131, 123)):
        w = torch.randn(outputs, features, generator=generator) * 2 ** torch.randn(outputs, 1, generator=generator)
        x = torch.randn(rows, features, generator=generator).to(dtype)
        bias = torch.randn(outputs, generator=generator).to(dtype) if rows > 16 else None
        codes, scales, tensor_scale = packed(w, fmt)
        assert torch.equal(unpack(Packed(codes, scales, tensor_scale), fmt, features), rounding.rtn(w, fmt))
        arguments = [None if t is None else t.to(device) for t in (x, codes, scales, tensor_scale, bias)]
        y = launch(*arguments, fmt).cpu()
        assert y.dtype == dtype
        assert excess(y, *exact(x, rounding.rtn(w, fmt), bias)).max() <= 1e-6


def every_code(fmt: Format) -> tuple[Tensor, Tensor]:
    """Codes [scales, block] and stored scales [scales, 1]: every code of the grid at every scale of the type.

    float32 scales, of which there are too many, are powers of two here, and so are the tensor's: products are exact.
    """
    codes = fmt.grid.encode(torch.tensor(fmt.grid.levels))
    block = fmt.block if isinstance(fmt.block, int) else len(codes)
    codes = codes.repeat(-(-block // len(codes)))[: max(block, len(codes))]
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % block), value=int(codes[0]))
    stored = getattr(fmt.law, "type", None)
    if isinstance(stored, Minifloat):
        scales = stored.encode(torch.tensor([s for s in stored.levels if s > 0]))
    elif stored is not None:
        scales = torch.arange(255, dtype=torch.uint8)
    else:
        scales = 2.0 ** torch.arange(-20, 5)
    blocks = len(codes) // block if isinstance(fmt.block, int) else 1
    rows = codes.expand(len(scales), -1)
    if fmt.grid.bits <= 4:
        rows = rows[:, ::2] | rows[:, 1::2] << 4
    return rows.contiguous(), scales[:, None].expand(-1, blocks).contiguous()


@pytest.mark.parametrize("name", ("nvfp4", "mxfp4", "fp4", "int4", "int8", "fp8", "mxfp8_e5m2", "mxfp6_e3m2"))
@dtypes
def test_every_code_at_every_scale_is_decoded_exactly(name: str, dtype: torch.dtype, device: str) -> None:
    fmt = resolve(name)
    codes, scales = every_code(fmt)
    features = codes.shape[1] * (2 if fmt.grid.bits <= 4 else 1)
    tensor_scale = torch.tensor(0.25) if fmt.law.two_level else None
    weight = unpack(Packed(codes, scales, tensor_scale), fmt, features)
    x = torch.eye(features, dtype=dtype)  # of each sum, one term is not 0
    arguments = [None if t is None else t.to(device) for t in (x, codes, scales, tensor_scale)]
    y = launch(*arguments, None, fmt, dtype=torch.float32).cpu().T
    # An infinite or NaN weight, which no finite one has, would meet zeros in its row.
    inside = weight.isfinite().all(1) & (weight.abs().amax(1) <= torch.finfo(torch.bfloat16).max)
    # Devices may flush what is subnormal in float32.
    expected = torch.where(weight.abs() < 2.0**-126, 0.0, weight)
    assert inside.sum() >= 25
    assert torch.equal(torch.where(y.abs() < 2.0**-126, 0.0, y)[inside], expected[inside])


@pytest.mark.parametrize("name", ("nvfp4", "int4"))
@bfloat16_first
def test_every_pair_of_codes_is_decoded_exactly(name: str, dtype: torch.dtype, device: str) -> None:
    """Every byte that holds two codes of the grid, at scale 1: both are decoded at once, in one register."""
    fmt = resolve(name)
    single = fmt.grid.encode(torch.tensor(fmt.grid.levels))
    codes = (single[:, None] | single[None, :] << 4).reshape(1, -1)
    short = -codes.shape[1] % (fmt.block // 2)
    codes = torch.nn.functional.pad(codes, (0, short), value=int(codes[0, 0]))
    features = 2 * codes.shape[1]
    stored = getattr(fmt.law, "type", None)
    one = torch.ones(1, features // fmt.block)
    scales = one if stored is None else stored.encode(one)
    tensor_scale = torch.tensor(1.0) if fmt.law.two_level else None
    weight = unpack(Packed(codes, scales, tensor_scale), fmt, features)
    arguments = [None if t is None else t.to(device) for t in (torch.eye(features, dtype=dtype), codes, scales)]
    y = launch(*arguments, None if tensor_scale is None else tensor_scale.to(device), None, fmt, dtype=torch.float32)
    assert torch.equal(y.cpu().T, weight)


@pytest.mark.parametrize("rows", (7, 70))
@pytest.mark.parametrize(("name", "arch"), [("nvfp4", 90), ("int4", 80), slow("nvfp4", 80), slow("int4", 90)])
def test_every_candidate_tile_gives_the_same(
    name: str, arch: int, rows: int, generator: torch.Generator, device: str, poisoned: None
) -> None:
    fmt = resolve(name)
    w, x = torch.randn(270, 150, generator=generator), torch.randn(rows, 150, generator=generator).bfloat16()
    arguments = [None if t is None else t.to(device) for t in (x, *packed(w, fmt), None)]
    for config in candidates(constants(fmt, x.dtype), rows, arch):
        y = launch(*arguments, fmt, config=config).cpu()
        assert excess(y, *exact(x, rounding.rtn(w, fmt))).max() <= 1e-6, config


@pytest.mark.parametrize("name", ("nvfp4", "int4/128", "int8"))
def test_a_long_sum_of_few_rows_is_split(name: str, generator: torch.Generator, device: str, poisoned: None) -> None:
    fmt, features = resolve(name), 2500
    assert chunks_of(3, 45, features) == 1  # of 1024, and the last of 452
    assert chunks_of(17, 45, features) == 3
    w, x = torch.randn(45, features, generator=generator), torch.randn(3, features, generator=generator).bfloat16()
    bias = torch.randn(45, generator=generator).bfloat16()
    y = launch(*[None if t is None else t.to(device) for t in (x, *packed(w, fmt), bias)], fmt).cpu()
    assert y.dtype == torch.bfloat16
    assert excess(y, *exact(x, rounding.rtn(w, fmt), bias)).max() <= 1e-6


def test_rows_are_scaled_before_the_bias(generator: torch.Generator, device: str) -> None:
    fmt = resolve("nvfp4")
    w, x = torch.randn(20, 48, generator=generator), torch.randn(5, 48, generator=generator).bfloat16()
    r, bias = torch.rand(5, generator=generator), torch.randn(20, generator=generator)
    y = launch(*[t.to(device) for t in (x, *packed(w, fmt), bias)], fmt, row_scales=r.to(device), dtype=torch.float32)
    assert excess(y.cpu(), *exact(x * r[:, None].double(), rounding.rtn(w, fmt), bias)).max() <= 1e-6


@pytest.mark.skipif(not INTERPRETING, reason="the interpreter counts bytes")
@pytest.mark.parametrize(
    ("name", "dtype", "rows"),
    [
        *(("nvfp4", torch.bfloat16, 1), ("nvfp4", torch.bfloat16, 20), ("mxfp4", torch.float16, 20)),
        *(("int4/128", torch.bfloat16, 20), ("int8", torch.bfloat16, 20)),
        *(slow("mxfp4", torch.float16, 1), slow("int4/128", torch.bfloat16, 1), slow("int8", torch.bfloat16, 1)),
    ],
)
def test_the_bytes_that_are_predicted_are_the_bytes_that_move(name: str, dtype: torch.dtype, rows: int) -> None:
    fmt = resolve(name)
    features = 2048 if rows == 1 else 256  # split in two parts, or not at all
    described = product_works.packed_linear(fmt, dtype, rows, 272, features, 80)
    arguments = (torch.randn(rows, features).to(dtype), *packed(torch.randn(272, features), fmt), None)
    for config in described.configs:
        with counted_traffic() as traffic:
            launch(*arguments, fmt, config=config)
        assert traffic.loaded + traffic.stored == described.bytes(config)
    one_tile = replace(described.configs[0], constants={"BM": 32, "BN": 512, "BK": described.constants["BLOCK"] or 256})
    more = 0
    if rows == 1:  # two results of float32 for one of 2 bytes, and what multiplies the sum is read twice
        again = 4 * fmt.law.two_level + (272 * 4 if described.constants["PLACE"] == "sum" else 0)
        more = 272 * (4 * 2 - 2) + again
    assert described.bytes(one_tile) == described.minimum_bytes + more


def test_what_takes_the_scale() -> None:
    taken = {(name, dtype): place(resolve(name), dtype) for name in NAMES for dtype in DTYPES}
    assert {taken["nvfp4", dtype] for dtype in DTYPES} == {"weight"}
    assert taken["mxfp4", torch.bfloat16] == "weight"
    assert taken["mxfp4", torch.float16] == "block"  # float16 has not its exponents
    assert taken["int4", torch.bfloat16] == "block"  # a level times a float32 scale is in no 16 bits
    assert taken["int8", torch.bfloat16] == taken["int4/tensor", torch.float16] == "sum"
    # E4M3 by E4M3 has 8 significant bits, bfloat16's; its range is past float16's.
    squared = Format("squared", resolve("fp8").grid, 16, resolve("nvfp4").law)
    assert place(squared, torch.bfloat16) == "weight"
    assert place(squared, torch.float16) == "block"


@pytest.mark.parametrize("block", (64, 256))
def test_a_format_of_ones_own(block: int, generator: torch.Generator, device: str) -> None:
    fmt = Format("own", Minifloat(3, 0, 16.0), block, PowerOfTwoScale())
    w, x = torch.randn(40, 600, generator=generator), torch.randn(9, 600, generator=generator).bfloat16()
    y = launch(*[None if t is None else t.to(device) for t in (x, *packed(w, fmt), None)], fmt).cpu()
    assert excess(y, *exact(x, rounding.rtn(w, fmt))).max() <= 1e-6


@pytest.mark.parametrize(
    ("fmt", "message"),
    [
        (codebook([-1.0, 0.0, 1.0], 32), "expected integer or minifloat levels"),
        (Format("odd", resolve("int4").grid, 24, Float32Scale()), "blocks of 16, 32, 64, ... weights, got 24"),
    ],
    ids=("codebook", "block"),
)
def test_what_the_kernel_cannot_take_is_refused(fmt: Format, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        constants(fmt, torch.bfloat16)


@pytest.mark.parametrize("name", ("nvfp4", "int4", "nf4", "int8"))
def test_the_operator_on_the_cpu_is_the_reference(name: str, generator: torch.Generator) -> None:
    fmt = resolve(name)
    w, x = torch.randn(9, 45, generator=generator), torch.randn(2, 3, 45, generator=generator).bfloat16()
    bias = torch.randn(9, generator=generator).bfloat16()
    y = packed_linear(x, *packed(w, fmt), bias, name)
    assert y.shape == (2, 3, 9)
    assert excess(y, *exact(x, rounding.rtn(w, fmt), bias)).max() <= 1e-6


@pytest.mark.slow
def test_the_operator_is_well_formed(generator: torch.Generator) -> None:
    w, x = torch.randn(9, 45, generator=generator), torch.randn(2, 3, 45, generator=generator).bfloat16()
    weight = (*packed(w, resolve("nvfp4")), torch.randn(9, generator=generator).bfloat16())
    torch.library.opcheck(torch.ops.lotion_fx.packed_linear.default, (x, *weight, "nvfp4"))


def test_an_empty_batch(device: str) -> None:
    fmt = resolve("nvfp4")
    codes, scales, tensor_scale = packed(torch.randn(8, 32), fmt)
    arguments = [t.to(device) for t in (torch.zeros(0, 32), codes, scales, tensor_scale)]
    assert launch(*arguments, None, fmt).shape == (0, 8)


def test_bad_arguments_are_named() -> None:
    x, (codes, scales, tensor_scale) = torch.randn(2, 32), packed(torch.randn(8, 32), resolve("nvfp4"))
    for arguments, message in (
        ((x[:, :30], codes, scales, tensor_scale, None), r"codes: got torch.uint8 \[8, 16\], expected .*, 15\] for 30"),
        ((x, codes, scales.float(), tensor_scale, None), "scales: got torch.float32"),
        ((x, codes, scales, None, None), "tensor_scale=None: nvfp4 has one"),
        ((x, codes, scales, tensor_scale, x[0]), r"bias: got \[32\], expected \[8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            packed_linear(*arguments, "nvfp4")


def test_the_kernels_constants_are_numbers() -> None:
    # What Inductor writes into its source: nothing that needs an import.
    for name in NAMES:
        assert {type(value) for value in constants(resolve(name), torch.bfloat16).values()} <= {int, str}
    assert FEW == 16
