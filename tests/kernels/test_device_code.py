"""Formats printed as Triton device functions give what the methods they were printed from give, bit for bit."""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from lotion_fx.kernels import device_code
from lotion_fx.kernels.device_code import (
    Template,
    block_scale,
    decode_scale,
    encode_scale,
    neighbours,
    printed,
    reference,
    specialized,
    template,
)
from lotion_fx.numerics.formats import Format, formats, resolve
from tests.harness.versions import NEGATES_ZERO

FORMATS = [
    resolve(name)
    for name in (
        "int2",
        "int4",
        "int8",
        "fp4",
        "fp8",
        "nf4",
        "nvfp4",
        "mxfp6_e2m3",
        "mxfp6_e3m2",
        "mxfp8_e4m3",
        "mxfp8_e5m2",
    )
]
FORMATS += [resolve(f"mxfp4/{rule}") for rule in ("ceil", "floor", "even")]
FORMATS += map(resolve, ("nvfp4/pow2", "int4/bf16", "int4/fp16"))
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)


def unary(name: str) -> Template:
    """A kernel that applies one device function of one argument to each element."""
    text = f"def apply_{name}(x, y, n, SIZE: tl.constexpr):\n" + (
        "    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)\n"
        f"    tl.store(y + i, {name}(tl.load(x + i, mask=i < n, other=0)), mask=i < n)\n"
    )
    scope = {"tl": tl, name: getattr(device_code, name)}
    return template(device_code.define(f"apply_{name}", text, scope))


@template
def neighbours_kernel(x, lo, hi, n, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    below, above = neighbours(tl.load(x + i, mask=i < n, other=0.0))
    tl.store(lo + i, below, mask=i < n)
    tl.store(hi + i, above, mask=i < n)


@template
def scale_kernel(amax, ts, scale, code, back, n, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    s = block_scale(tl.load(amax + i, mask=i < n, other=1.0), tl.load(ts))
    tl.store(scale + i, s, mask=i < n)
    c = encode_scale(s)
    tl.store(code + i, c, mask=i < n)
    tl.store(back + i, decode_scale(c), mask=i < n)


def grid_values(fmt: Format, seed: int) -> Tensor:
    """Every level, every midpoint with its float neighbours, beyond the grid, zeros of both signs, and random ones."""
    levels = torch.tensor(fmt.grid.levels)
    middle = (levels[1:] + levels[:-1]) / 2
    near = [torch.nextafter(v, torch.full_like(v, to)) for v in (levels, middle) for to in (-1e9, 1e9)]
    drawn = torch.randn(4000, generator=torch.Generator().manual_seed(seed)) * fmt.grid.max / 2
    tiny = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-3, -1e-3])
    return torch.cat([levels, middle, *near, drawn, tiny, drawn * 1e-3, drawn * 10])


def run(name: str, fmt: Format, x: Tensor, out: torch.dtype, device: str) -> Tensor:
    y = torch.full(x.shape, 170, dtype=out, device=device)
    kernel = specialized(unary(name), fmt)
    kernel[(triton.cdiv(x.numel(), 4096),)](x.to(device), y, x.numel(), SIZE=4096)
    return y.cpu()


def same(a: Tensor, b: Tensor, seed: int) -> None:
    assert a.dtype == b.dtype
    bits = {torch.float32: torch.int32}.get(a.dtype, a.dtype)
    assert torch.equal(a.view(bits), b.view(bits)), f"seed {seed}"


@pytest.fixture
def seed() -> int:
    return int(torch.seed() % 2**31)


@each_format
@pytest.mark.parametrize("name", ["clamp", "nearest", "below", "above"])
def test_grid(name: str, fmt: Format, device: str, seed: int) -> None:
    x = grid_values(fmt, seed)
    if name in ("below", "above"):
        x = fmt.grid.nearest(x)
    same(run(name, fmt, x, torch.float32, device), reference(name, fmt)(x), seed)


@each_format
def test_codes(fmt: Format, device: str, seed: int) -> None:
    level = fmt.grid.nearest(grid_values(fmt, seed))
    codes = run("encode", fmt, level, torch.uint8, device)
    same(codes, fmt.grid.encode(level), seed)
    every = torch.arange(2**fmt.grid.bits, dtype=torch.uint8)[: len(fmt.grid.levels)]
    decoded = fmt.grid.decode(every)
    same(run("decode", fmt, every, torch.float32, device), decoded if NEGATES_ZERO else decoded + 0.0, seed)


@each_format
def test_neighbours(fmt: Format, device: str, seed: int) -> None:
    x = grid_values(fmt, seed)
    lo, hi = torch.full_like(x, torch.nan, device=device), torch.full_like(x, torch.nan, device=device)
    specialized(neighbours_kernel, fmt)[(triton.cdiv(x.numel(), 4096),)](x.to(device), lo, hi, x.numel(), SIZE=4096)
    for found, wanted in zip((lo, hi), fmt.grid.neighbours(x), strict=True):
        same(found.cpu() + 0.0, wanted + 0.0, seed)


@each_format
def test_scales(fmt: Format, device: str, seed: int) -> None:
    """Powers of two and their neighbours, tiny and subnormal absmaxes and zero among them."""
    g = torch.Generator().manual_seed(seed)
    powers = 2.0 ** torch.arange(-126, 100, dtype=torch.float32) * 6
    drawn = torch.rand(4000, generator=g)
    amax = torch.cat([powers, powers * (1 + 2.0**-23), powers * (1 - 2.0**-24), drawn, torch.zeros(3)])
    largest = drawn.max() if fmt.law.two_level else amax.max()
    amax = amax[amax <= largest]
    ts = fmt.law.tensor_scale(largest, fmt.grid) if fmt.law.two_level else torch.tensor(1.0)
    wanted = fmt.law.block_scale(amax, fmt.grid, ts)
    stored = torch.uint8 if hasattr(fmt.law, "type") else torch.float32
    scale, back = (torch.full_like(amax, torch.nan, device=device) for _ in range(2))
    code = torch.full(amax.shape, 170, dtype=stored, device=device)
    kernel = specialized(scale_kernel, fmt)
    kernel[(triton.cdiv(amax.numel(), 4096),)](
        amax.to(device), ts.to(device), scale, code, back, amax.numel(), SIZE=4096
    )
    same(scale.cpu(), wanted, seed)
    same(back.cpu(), wanted, seed)
    if stored is torch.uint8:
        same(code.cpu(), fmt.law.type.encode(wanted), seed)


def test_every_built_in_format_is_printed() -> None:
    for name in formats():
        for function in ("nearest", "neighbours", "encode", "decode", "block_scale", "encode_scale", "decode_scale"):
            assert callable(device_code.device_function(function, resolve(name)))


def unknown() -> Callable[[Tensor], Tensor]:
    return lambda x: torch.special.gammaln(x)


def test_an_operation_that_cannot_be_printed_is_named() -> None:
    with pytest.raises(NotImplementedError, match="lgamma"):
        printed("f", unknown(), (torch.float32,))


def test_a_template_is_no_kernel() -> None:
    with pytest.raises(TypeError, match="specialized"):
        scale_kernel()
