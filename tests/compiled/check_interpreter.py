"""The corrected interpreter against PyTorch, ml_dtypes and exact fractions; `test_interpreter` runs this file."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from tests.harness.inline_asm import run
from tests.harness.interpreter import counted_traffic
from tests.harness.versions import needs_scaled_products

SEED = np.random.SeedSequence().entropy
RANDOM = np.random.default_rng(SEED)


def floats(n: int = 1 << 14) -> torch.Tensor:
    """Random float32 of every exponent and sign, infinities and NaN among them, and many ties of narrower types."""
    bits = RANDOM.integers(0, 1 << 32, n, dtype=np.uint32)
    bits[: n // 2] &= 0xFFFF8000  # ties of bfloat16 and of all narrower ones
    moderate = np.ldexp(RANDOM.integers(-64, 65, n), RANDOM.integers(-12, 8, n)).astype(np.float32)
    return torch.from_numpy(np.concatenate([bits.view(np.float32), moderate]))


@triton.jit
def cast(x, y, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


def same(found: torch.Tensor, expected: np.ndarray) -> None:
    """Equal bit for bit, any NaN for NaN."""
    found, expected = found.float().numpy(), expected.astype(np.float32)
    np.testing.assert_array_equal(found, expected, err_msg=f"seed {SEED}")
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found)[number], np.signbit(expected)[number], err_msg=f"seed {SEED}")


def rounded(values: Any, dtype: Any, largest: float = np.inf) -> np.ndarray:
    """ml_dtypes' rounding, saturating."""
    with np.errstate(all="ignore"):
        return np.asarray(values).clip(-largest, largest).astype(dtype)


NARROW = {
    torch.bfloat16: (ml_dtypes.bfloat16, np.inf),
    torch.float8_e4m3fn: (ml_dtypes.float8_e4m3fn, 448.0),
    torch.float8_e5m2: (ml_dtypes.float8_e5m2, 57344.0),
}


@pytest.mark.parametrize("dtype", NARROW)
def test_cast_to_narrow_float(dtype: torch.dtype) -> None:
    x = floats()
    y = torch.full(x.shape, torch.nan).to(dtype)
    cast[(len(x) // 1024,)](x, y, 1024)
    same(y, rounded(x, *NARROW[dtype]))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("to", [torch.float32, torch.float16])
def test_cast_from_narrow_float(dtype: torch.dtype, to: torch.dtype) -> None:
    bits = np.arange(1 << 8 * dtype.itemsize).astype(f"uint{8 * dtype.itemsize}")
    x = torch.from_numpy(bits).view(dtype)
    y = torch.empty(x.shape, dtype=to)
    cast[(1,)](x, y, len(x))
    same(y, rounded(bits.view(NARROW[dtype][0]), np.float32 if to == torch.float32 else np.float16))


def test_cast_integer_to_bfloat16_and_back() -> None:
    x = torch.arange(-4096, 4096, dtype=torch.int32)
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    z = torch.empty_like(x)
    cast[(1,)](x, y, len(x))
    cast[(1,)](y, z, len(x))
    assert torch.equal(y, x.bfloat16())
    assert torch.equal(z, x.bfloat16().int())


@triton.jit
def arithmetic(x, y, out, n: tl.constexpr):
    at = tl.arange(0, n)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a + b)
    tl.store(out + n + at, a - b)
    tl.store(out + 2 * n + at, a * b)
    tl.store(out + 3 * n + at, -a)
    tl.store(out + 4 * n + at, tl.maximum(a, b))
    tl.store(out + 5 * n + at, tl.where(a < b, a, b))
    tl.store(out + 6 * n + at, tl.abs(a))
    tl.store(out + 7 * n + at, a * 0.3)
    tl.store(out + 8 * n + at, tl.clamp(a, -1.0, 0.5))
    tl.store(out + 9 * n + at, tl.clamp(a, -1.0, 0.5, propagate_nan=tl.PropagateNan.ALL))


def test_bfloat16_arithmetic() -> None:
    n = 4096
    x, y = (torch.from_numpy(RANDOM.normal(size=n)).bfloat16() for _ in range(2))
    out = torch.full((10, n), torch.nan, dtype=torch.bfloat16)
    arithmetic[(1,)](x, y, out, n)
    third = torch.tensor(0.3).bfloat16()
    limited = x.clamp(-1, 0.5)
    expected = [x + y, x - y, x * y, -x, x.maximum(y), x.minimum(y), x.abs(), x * third, limited, limited]
    for found, wanted in zip(out, expected, strict=True):
        assert torch.equal(found, wanted), f"seed {SEED}"


@triton.jit
def fused(x, y, z, out, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(out + at, tl.fma(tl.load(x + at), tl.load(y + at), tl.load(z + at)))


def nearest(value: Fraction, dtype: torch.dtype) -> float:
    """An exact value in a float type: of the neighbours of an approximation the nearest, ties to even."""
    kind = torch.int16 if dtype.itemsize == 2 else torch.int32
    start = torch.tensor(float(value), dtype=torch.float64).to(dtype)
    around = start.view(kind) + torch.arange(-2, 3, dtype=kind)
    candidates = [c for c in around.view(dtype) if c.isfinite()]
    return min(candidates, key=lambda c: (abs(Fraction(c.item()) - value), c.view(kind).item() & 1)).item()


def hard_products(dtype: torch.dtype, n: int) -> list[torch.Tensor]:
    """Operands whose sum lies near a tie: the product is half the addend's last place, give or take a bit."""
    precision = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}[dtype]
    x = 1 + torch.from_numpy(RANDOM.integers(0, 2, n)) * 2.0**-precision
    y = 1 - torch.from_numpy(RANDOM.integers(0, 2, n)) * 2.0**-precision
    z = (1 + torch.from_numpy(RANDOM.integers(0, 8, n)) * 2.0**-precision) * torch.from_numpy(RANDOM.choice([-1, 1], n))
    return [(x * 2.0 ** -(precision + 1)).to(dtype), y.to(dtype), z.to(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fma_rounds_once(dtype: torch.dtype) -> None:
    n = 1024
    ordinary = [torch.from_numpy(RANDOM.normal(size=n)).to(dtype) for _ in range(3)]
    # the product ends in a tie that only a tiny addend breaks, far below what float64 holds
    tie = [torch.full((n,), v).to(dtype) for v in (1 + 2.0**-4, 1 + 2.0**-4)] + [
        torch.from_numpy(RANDOM.choice([-1, 1], n) * (2.0**-60 if dtype != torch.float16 else 2.0**-24)).to(dtype)
    ]
    for operands in (ordinary, hard_products(dtype, n), tie):
        out = torch.full((n,), torch.nan, dtype=dtype)
        fused[(1,)](*operands, out, n)
        exact = [
            Fraction(a.item()) * Fraction(b.item()) + Fraction(c.item()) for a, b, c in zip(*operands, strict=True)
        ]
        assert out.tolist() == [nearest(value, dtype) for value in exact], f"seed {SEED}"


@triton.jit
def quotient(x, y, out, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(out + at, tl.div_rn(tl.load(x + at), tl.load(y + at)))


def test_div_rn_is_the_nearest() -> None:
    n = 2048
    x, y = (torch.from_numpy(RANDOM.normal(size=n)).float() for _ in range(2))
    out = torch.full((n,), torch.nan)
    quotient[(1,)](x, y, out, n)
    pairs = zip(x.tolist(), y.tolist(), strict=True)
    assert out.tolist() == [nearest(Fraction(a) / Fraction(b), torch.float32) for a, b in pairs], f"seed {SEED}"


@triton.jit
def product(x, y, out, m: tl.constexpr, k: tl.constexpr, n: tl.constexpr):
    rows, inner, columns = tl.arange(0, m), tl.arange(0, k), tl.arange(0, n)
    a = tl.load(x + rows[:, None] * k + inner[None, :])
    b = tl.load(y + inner[:, None] * n + columns[None, :])
    tl.store(out + rows[:, None] * n + columns[None, :], tl.dot(a, b))


@pytest.mark.parametrize("dtype", [torch.float16, *NARROW])
def test_dot(dtype: torch.dtype) -> None:
    x, y = (torch.from_numpy(RANDOM.normal(size=shape)).to(dtype) for shape in ((16, 32), (32, 64)))
    out = torch.full((16, 64), torch.nan)
    product[(1,)](x, y, out, 16, 32, 64)
    error = (out.double() - x.double() @ y.double()).abs()
    assert (error <= 1e-6 * (x.double().abs() @ y.double().abs())).all(), f"seed {SEED}"


def test_dot_keeps_nan() -> None:
    x, y = (torch.ones(shape).to(torch.float8_e4m3fn) for shape in ((16, 16), (16, 16)))
    x[3, 5] = torch.nan
    out = torch.zeros(16, 16)
    product[(1,)](x, y, out, 16, 16, 16)
    assert out[3].isnan().all()
    assert out.isnan().sum() == 16


@triton.jit
def scaled(x, xs, y, ys, out, kind: tl.constexpr, group: tl.constexpr, m: tl.constexpr, k: tl.constexpr,
           n: tl.constexpr, packed: tl.constexpr):  # fmt: skip
    rows, columns, groups = tl.arange(0, m), tl.arange(0, n), tl.arange(0, k // group)
    inner = tl.arange(0, k // packed)
    a = tl.load(x + rows[:, None] * (k // packed) + inner[None, :])
    b = tl.load(y + columns[None, :] * (k // packed) + inner[:, None])
    left = tl.load(xs + rows[:, None] * (k // group) + groups[None, :])
    right = tl.load(ys + columns[:, None] * (k // group) + groups[None, :])
    tl.store(out + rows[:, None] * n + columns[None, :], tl.dot_scaled(a, left, kind, b, right, kind))


@pytest.mark.parametrize(("kind", "group"), [("e2m1", 16), ("e2m1", 32), ("e4m3", 32), ("bf16", 32), ("fp16", 32)])
@needs_scaled_products
def test_dot_scaled(kind: str, group: int) -> None:
    m, k, n = 16, 64, 32
    sides = []
    for rows in (m, n):
        if kind == "e2m1":
            codes = RANDOM.integers(0, 256, (rows, k // 2), dtype=np.uint8)
            pairs = np.stack([codes & 15, codes >> 4], axis=-1).reshape(rows, k)
            stored, values = torch.from_numpy(codes), pairs.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        else:
            dtype = {"e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16}[kind]
            stored = torch.from_numpy(RANDOM.normal(size=(rows, k))).to(dtype)
            values = stored.double().numpy()
        if group == 16:
            scale = torch.from_numpy(RANDOM.uniform(0.1, 3, (rows, k // group))).to(torch.float8_e4m3fn)
            scales = scale.double().numpy()
        else:
            scale = torch.from_numpy(RANDOM.integers(120, 134, (rows, k // group), dtype=np.uint8))
            scales = scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
        sides.append((stored, scale, values * np.repeat(scales, group, axis=1)))
    (x, xs, left), (y, ys, right) = sides
    out = torch.full((m, n), torch.nan)
    scaled[(1,)](x, xs, y, ys, out, kind, group, m, k, n, 2 if kind == "e2m1" else 1)
    error = np.abs(out.numpy() - left @ right.T)
    assert (error <= 1e-6 * (np.abs(left) @ np.abs(right).T)).all(), f"seed {SEED}"


@needs_scaled_products
def test_e8m0_scales_at_their_ends() -> None:
    m, k, n = 16, 32, 16
    ones = torch.full((m, k // 2), 0x22, dtype=torch.uint8)
    xs, ys = torch.zeros(m, 1, dtype=torch.uint8), torch.full((n, 1), 254, dtype=torch.uint8)
    ys[2] = 255
    out = torch.zeros(m, n)
    scaled[(1,)](ones, xs, ones, ys, out, "e2m1", 32, m, k, n, 2)
    assert out[:, 2].isnan().all()
    assert (out[:, 0] == k).all()  # 2^-127 times 2^127


@triton.jit
def by_libdevice(x, y, out, n: tl.constexpr):
    at = tl.arange(0, n)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, libdevice.rint(a))
    tl.store(out + n + at, libdevice.round(a))
    tl.store(out + 2 * n + at, libdevice.floor(a))
    tl.store(out + 3 * n + at, libdevice.trunc(a))
    tl.store(out + 4 * n + at, libdevice.erf(a))
    tl.store(out + 5 * n + at, libdevice.tanh(a))
    tl.store(out + 6 * n + at, libdevice.pow(tl.abs(a), b))
    tl.store(out + 7 * n + at, libdevice.copysign(a, b))
    tl.store(out + 8 * n + at, libdevice.ldexp(a, libdevice.ilogb(b)))
    tl.store(out + 9 * n + at, libdevice.isnan(a).to(tl.float32))
    tl.store(out + 10 * n + at, libdevice.fma(a, b, a))
    tl.store(out + 11 * n + at, libdevice.div_rn(a, b))


def test_libdevice() -> None:
    n = 1024
    x = torch.from_numpy(RANDOM.integers(-8, 9, n) / 2).float()
    y = torch.from_numpy(RANDOM.normal(size=n)).float()
    out = torch.full((12, n), torch.nan)
    by_libdevice[(1,)](x, y, out, n)
    a, b = x.double(), y.double()
    whole = a.abs().floor()
    away = (whole + (a.abs() - whole >= 0.5)) * a.sign()
    exponents = b.abs().log2().floor()
    expected = [a.round(), away, a.floor(), a.trunc(), a.erf(), a.tanh(), a.abs() ** b, a.copysign(b)]
    expected += [a * 2**exponents, a.isnan(), a * b + a, a / b]
    for found, wanted in zip(out, expected, strict=True):
        torch.testing.assert_close(found, wanted.float(), rtol=1e-6, atol=1e-7)


E2M1 = """{
 .reg .b8 t<4>;  // one byte a pair
 cvt.rn.satfinite.e2m1x2.f32 t0, $5, $1; cvt.rn.satfinite.e2m1x2.f32 t1, $6, $2;
 cvt.rn.satfinite.e2m1x2.f32 t2, $7, $3; cvt.rn.satfinite.e2m1x2.f32 t3, $8, $4;
 mov.b32 $0, {t0, t1, t2, t3}; }"""


@triton.jit
def encode(x, y, asm: tl.constexpr, constraints: tl.constexpr, pack: tl.constexpr, n: tl.constexpr):
    low, high = tl.split(tl.reshape(tl.load(x + tl.arange(0, 2 * n)), (n, 2)))
    codes = tl.inline_asm_elementwise(asm, constraints, [low, high], y.dtype.element_ty, is_pure=True, pack=pack)
    tl.store(y + tl.arange(0, n), codes)


def test_inline_asm_e2m1() -> None:
    x = floats(1024)
    y = torch.full((1024,), 0xAA, dtype=torch.uint8)
    encode[(1,)](x, y, E2M1, "=r" + ",r" * 8, 4, 1024)
    values = rounded(np.where(x.isnan(), 6, x), ml_dtypes.float4_e2m1fn, 6).view(np.uint8) & 15
    np.testing.assert_array_equal(y.numpy(), values[::2] | values[1::2] << 4, err_msg=f"seed {SEED}")


def test_inline_asm_e4m3() -> None:
    x = floats(1024)
    y = torch.empty(1024, dtype=torch.uint16)
    encode[(1,)](x, y, "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,f,f", 1, 1024)
    codes = rounded(x, ml_dtypes.float8_e4m3fn, 448).view(np.uint8)
    codes = np.where(x.isnan(), 0x7F, codes).astype(np.uint16)
    np.testing.assert_array_equal(y.numpy(), codes[::2] | codes[1::2] << 8, err_msg=f"seed {SEED}")


@pytest.mark.parametrize(
    ("kind", "dtype", "asm"),
    [
        ("e2m1x2", ml_dtypes.float4_e2m1fn, "{ .reg .b8 t; cvt.u8.u16 t, $1; cvt.rn.f16x2.e2m1x2 $0, t; }"),
        ("e4m3x2", ml_dtypes.float8_e4m3fn, "cvt.rn.f16x2.e4m3x2 $0, $1;"),
    ],
)
def test_inline_asm_decodes(kind: str, dtype: Any, asm: str) -> None:
    bits = 4 if kind == "e2m1x2" else 8
    codes = np.arange(1 << (2 * bits), dtype=np.uint16)
    (found,) = run(asm, "=r,h", [codes], [np.dtype(np.uint32)], 1)
    halves = np.stack([codes & (1 << bits) - 1, codes >> bits], axis=-1).astype(np.uint8).view(dtype)
    np.testing.assert_array_equal(found.view(np.float16).reshape(-1, 2), halves.astype(np.float16))


def test_inline_asm_names_what_it_lacks() -> None:
    word = np.zeros(4, np.uint32)
    with pytest.raises(NotImplementedError, match="brev.b32"):
        run("brev.b32 $0, $1;", "=r,r", [word], [word.dtype], 1)
    with pytest.raises(ValueError, match="3 registers"):
        run("mov.b32 $0, $1;", "=r,r,r", [word], [word.dtype], 1)
    with pytest.raises(ValueError, match="'t'"):
        run("{ .reg .b32 t; mov.b32 $0, t; }", "=r,r", [word], [word.dtype], 1)
    with pytest.raises(NotImplementedError, match="'x'"):
        run("mov.b32 $0, $1;", "=r,x", [word], [word.dtype], 1)


@triton.jit
def through_addresses(addresses, out, n: tl.constexpr):
    at = tl.load(addresses + tl.arange(0, n)).to(tl.pointer_type(tl.float32))
    tl.store(out + tl.arange(0, n), tl.load(at))


def test_integers_are_cast_to_pointers() -> None:
    x = torch.from_numpy(RANDOM.normal(size=16)).float()
    addresses = torch.tensor([x.data_ptr() + 4 * i for i in reversed(range(16))])
    out = torch.full((16,), torch.nan)
    through_addresses[(1,)](addresses, out, 16)
    assert torch.equal(out, x.flip(0))


@triton.jit
def philox(out, seed, counter, n: tl.constexpr):
    c = tl.full((n,), 0, tl.uint32) + counter.to(tl.uint32)
    words = tl.philox(seed, c, c, c, c)
    for k in tl.static_range(4):
        tl.store(out + k * n + tl.arange(0, n), words[k])


@pytest.mark.parametrize(
    ("seed", "counter", "words"),
    [(0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"), (-1, -1, "408f276d 41c83b0e a20bc7c6 6d5451fd")],
)
def test_philox_known_answers(seed: int, counter: int, words: str) -> None:
    """Of Random123's ``kat_vectors``, philox4x32 with 10 rounds."""
    out = torch.zeros(4, 2, dtype=torch.int32)
    philox[(1,)](out, seed, counter, 2)
    assert [f"{word & 0xFFFFFFFF:08x}" for word in out[:, 0].tolist()] == words.split()


@triton.jit
def larger(a, i, b, j):
    right = b > a
    return tl.where(right, b, a), tl.where(right, j, i)


@triton.jit
def reductions(x, out, index, m: tl.constexpr, n: tl.constexpr):
    rows = tl.arange(0, m)
    values = tl.load(x + rows[:, None] * n + tl.arange(0, n)[None, :])
    tl.store(out + rows, tl.max(values, axis=1))
    best, at = tl.reduce((values, tl.arange(0, n)[None, :] + tl.zeros((m, n), tl.int32)), 1, larger)
    tl.store(out + m + rows, best)
    tl.store(index + rows, at)


def test_reductions(monkeypatch: pytest.MonkeyPatch) -> None:
    m, n, calls = 32, 64, []
    combine = larger.fn
    monkeypatch.setattr(larger, "fn", lambda *args: calls.append(0) or combine(*args))
    x = torch.from_numpy(RANDOM.permutation(m * n).reshape(m, n)).float()
    x[3] = torch.nan
    out, index = torch.zeros(2, m), torch.zeros(m, dtype=torch.int32)
    reductions[(1,)](x, out, index, m, n)
    best, at = x.max(dim=1)
    number = torch.arange(m) != 3
    assert out[0, 3].isnan()
    assert torch.equal(out[:, number], torch.stack([best, best])[:, number])
    assert torch.equal(index[number], at.int()[number])
    assert len(calls) == 6  # 64 by halves


@triton.jit
def moves(x, y, counter, n, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(y + at, tl.load(x + at, at < n) / tl.load(x), at < n - 1)
    tl.atomic_add(counter + at % 4, 1.0, at < 6)


def test_counted_traffic() -> None:
    n = 10
    x, y, counter = torch.zeros(n, dtype=torch.bfloat16), torch.zeros(n), torch.zeros(4)
    with counted_traffic() as traffic:
        moves[(2,)](x, y, counter, n, 8)
    assert traffic.loaded == 2 * n + 2 * 2 + 4 * 6
    assert traffic.stored == 4 * (n - 1) + 4 * 6
    assert counter.tolist() == [2, 2, 1, 1]
    before = traffic.loaded
    moves[(2,)](x, y, counter, n, 8)
    assert traffic.loaded == before


def test_packing_fills_an_incomplete_instance() -> None:
    for n, pack in itertools.product((3, 4, 5), (1, 2, 4)):
        bytes_ = RANDOM.integers(0, 256, n, dtype=np.uint8)
        (found,) = run("mov.b32 $0, $1;", "=r,r", [bytes_], [bytes_.dtype], pack)
        np.testing.assert_array_equal(found, bytes_)
