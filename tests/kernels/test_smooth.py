"""`smooth` in one pass against `lotion_fx.rounding`: bit for bit what is rounded, to 1e-6 what is real."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from lotion_fx.kernels import tuning
from lotion_fx.kernels.audit.weight_works import smooth_traffic
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.device import E2M1_GRID, required_arch
from lotion_fx.kernels.philox import philox
from lotion_fx.kernels.smooth import Curvature, Outputs, launch
from lotion_fx.kernels.view import ALONG, ELEMENTS, LINE, PIECES, View, amaxes, check, supports
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import Format, codebook, resolve
from lotion_fx.numerics.noise import ADAPTIVE, RANDOMIZED, D, NoiseLaw, gaussian, resolve_noise

BUILT_IN = "int2 int4 int4/tensor int4/channel int8 fp4 fp8 nf4 nvfp4 mxfp6_e2m3 mxfp8_e5m2"
RULES = "mxfp4/ceil mxfp4/floor mxfp4/even"
FORMATS = [
    *map(resolve, f"{BUILT_IN} {RULES}".split()),
    codebook((-1.5, -0.25, 0.0, 0.1, 0.75), block=24, name="lopsided"),
]
ODD = [((32, 128), -1), ((33, 100), -1), ((64, 48), 0), ((5, 37, 3, 3), 1), ((3, 40, 70), 1), ((1500,), 0), ((1, 1), 1)]
LONG = [((3, 1000), -1), ((2, 8192), -1), ((2, 20000), -1), ((8192, 3), 0), ((70, 2000), 0)]
HUMP = sympy.Piecewise((D**2 * (1 - 2 * D) ** 2, 2 * D < 1), ((1 - D) ** 2 * (2 * D - 1) ** 2, True))
WIDE = NoiseLaw("wide in kernels", D - HUMP, 2 * HUMP)  # with a third level
ARCHS = (80, 100)  # by the exponent's bits, and by Blackwell's conversion
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# What is made in float32 from a weight of any dtype.
float32_first = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["fp32", "bf16"]
)
LAWS = (RANDOMIZED, resolve_noise("smoothstep"), gaussian(), WIDE, ADAPTIVE)


def archs(fmt: Format, device: str) -> tuple[int, ...]:
    """Both ways to E2M1 in the interpreter; on a GPU its own."""
    if device != "cpu":
        return (required_arch(torch.device(device)),)
    return ARCHS if fmt.grid == E2M1_GRID else ARCHS[:1]


@pytest.fixture
def seed() -> int:
    return int(torch.seed() % 2**31)


@pytest.fixture
def g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(shape: tuple[int, ...], dtype: torch.dtype, fmt: Format, g: torch.Generator) -> Tensor:
    """Random, over many binades; levels, ties, zero blocks and tiny blocks among them."""
    w = torch.randn(shape, generator=g) * torch.exp2(
        torch.randint(-6, 3, (shape[0], *[1] * (len(shape) - 1)), generator=g)
    )
    flat = w.reshape(-1)
    n = flat.numel()
    if n > 400:
        flat[: n // 8] = (flat[: n // 8] * 8).round() / 8
        flat[n // 8 : n // 8 + 96] = 0.0
        flat[n // 4 : n // 4 + 64] *= 2.0**-90
        flat[n // 3] = -0.0
    return w.to(dtype)


def poisoned(w: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    return torch.full(w.shape, torch.nan, dtype=dtype, device=device)


def same_bits(a: Tensor, b: Tensor, message: str) -> None:
    integer = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}[a.dtype]
    assert torch.equal(a.cpu().view(integer), b.view(integer)), message


def close(a: Tensor, b: Tensor, message: str) -> None:
    """To 1e-6 of the largest number that enters an element: sums have terms of both signs."""
    torch.testing.assert_close(a.cpu().double(), b.double(), rtol=1e-6, atol=1e-6 * float(b.abs().max()), msg=message)


def any_of(choices: Sequence[Any], g: torch.Generator) -> Any:
    return choices[int(torch.randint(len(choices), (), generator=g))]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for every program, so that these are few and large."""
    monkeypatch.setattr(tuning, "ranked", lambda *args: (Config({"SIZE": 8192, "TILES": 1}),))


@formats
@dtypes
def test_round_to_nearest(fmt: Format, dtype: torch.dtype, device: str, g: torch.Generator, seed: int) -> None:
    for arch in archs(fmt, device):
        shape, axis = any_of(ODD, g)
        w = weight(shape, dtype, fmt, g)
        out = poisoned(w, dtype, device)
        launch(w.to(device), fmt, axis, Outputs(rtn=out), arch=arch)
        same_bits(out, rounding.rtn(w, fmt, axis), f"{shape}, sm_{arch}, seed {seed}")


def every_shape() -> list[Any]:
    """Long ones fast where a block is a channel, which they make longer than a tile."""
    return [
        pytest.param(name, *shape, marks=() if shape in ODD or name == "int4/channel" else pytest.mark.slow)
        for name in ("nvfp4", "int4/channel", "int4/tensor")
        for shape in ODD + LONG
    ]


@pytest.mark.parametrize(("name", "shape", "axis"), every_shape(), ids=str)
def test_every_shape(
    name: str,
    shape: tuple[int, ...],
    axis: int,
    device: str,
    g: torch.Generator,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the tile that the table has."""
    monkeypatch.undo()
    fmt = resolve(name)
    w = weight(shape, torch.float32, fmt, g)
    out = poisoned(w, torch.float32, device)
    launch(w.to(device), fmt, axis, Outputs(rtn=out), arch=80)
    same_bits(out, rounding.rtn(w, fmt, axis), f"seed {seed}")


@formats
@float32_first
def test_random_rounding(fmt: Format, dtype: torch.dtype, device: str, g: torch.Generator, seed: int) -> None:
    """Given its uniform numbers a random rounding is determined; 0 has no sign here."""
    law, (shape, axis) = any_of((RANDOMIZED, WIDE), g), any_of(ODD, g)
    w = weight(shape, dtype, fmt, g)
    out, key = poisoned(w, dtype, device), torch.tensor(seed + 2**40)
    launch(w.to(device), fmt, axis, Outputs(rr=out), law=law, seed=key.to(device), arch=80)
    uniform = philox(key, w.numel()).reshape(shape)
    wanted = rounding.rr(w, fmt, axis, law=law, uniform=uniform)
    same_bits(out + 0.0, wanted + 0.0, f"{shape} {law.name}, seed {seed}")


@pytest.mark.parametrize("name", ["nvfp4", pytest.param("int4/tensor", marks=pytest.mark.slow)])
def test_random_rounding_has_the_law_s_mean_and_variance(name: str, device: str, g: torch.Generator, seed: int) -> None:
    """A million draws of one weight; five standard errors."""
    fmt, n = resolve(name), 2**20
    w = torch.full((n // 16, 16), 0.3137)
    w[:, 0] = 1.0  # the absmax
    out = poisoned(w, torch.float32, device)
    launch(w.to(device), fmt, -1, Outputs(rr=out), seed=torch.tensor(seed, device=device), arch=80)
    drawn, law = out.cpu()[:, 1:].double(), float(rounding.variance(w, fmt)[0, 1])
    assert len(drawn.unique()) == 2
    assert abs(drawn.mean() - 0.3137) < 5 * math.sqrt(law / drawn.numel()), f"seed {seed}"
    fourth = ((drawn - 0.3137) ** 4).mean() - law**2
    assert abs(((drawn - 0.3137) ** 2).mean() - law) < 5 * math.sqrt(fourth / drawn.numel()), f"seed {seed}"


@formats
@float32_first
def test_variance(fmt: Format, dtype: torch.dtype, device: str, g: torch.Generator, seed: int) -> None:
    law, (shape, axis) = any_of(LAWS, g), any_of(ODD, g)
    w = weight(shape, dtype, fmt, g)
    out = poisoned(w, torch.float32, device)
    launch(w.to(device), fmt, axis, Outputs(variance=out), law=law, arch=100)
    close(out, rounding.variance(w, fmt, axis, law=law), f"{shape} {law.name}, seed {seed}")


@formats
@float32_first
def test_term(fmt: Format, dtype: torch.dtype, device: str, g: torch.Generator, seed: int) -> None:
    law, (shape, axis) = any_of(LAWS, g), any_of(ODD, g)
    w, h, grad = weight(shape, dtype, fmt, g), torch.rand(shape, generator=g), torch.randn(shape, generator=g)
    wanted = grad + 0.7 * rounding.variance_vjp(w, h, fmt, axis, law=law)
    out, factor = grad.to(device), torch.tensor(0.7, device=device)
    curvature = Curvature(h.to(device), None, 1, factor)
    launch(w.to(device), fmt, axis, Outputs(grad=out), law=law, curvature=curvature, arch=80)
    close(out, wanted, f"{shape} {law.name}, seed {seed}")


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# Shape, axis, groups and rows of a factored curvature, and how its factors lie in a tile.
FACTORED = [
    ("nvfp4", (64, 128), -1, 1, 64, PIECES),  # rows too short for a tile each
    ("nvfp4", (9, 1296), -1, 1, 9, LINE),  # the second tile of a row is short
    ("int4", (3, 4, 700), -1, 3, 4, LINE),  # its last block too
    ("nvfp4", (9, 20, 64), -1, 1, 9, ELEMENTS),  # a row of several
    ("nvfp4", (96, 40), 0, 1, 96, ALONG),
    slow("nvfp4", (3, 50, 1100), 1, 3, 50, ALONG),  # several tiles across, and the rows' end in a block
    ("nvfp4", (5, 32, 9), 1, 1, 5, ELEMENTS),  # a convolution
    ("int8", (64, 128), -1, 1, 64, PIECES),
    ("int8", (7, 1000), -1, 1, 7, PIECES),  # a tile for a row
    slow("int8", (2, 3, 10000), -1, 2, 3, PIECES),  # longer than a tile
    slow("int8", (200, 300), 0, 1, 200, ALONG),
    ("int4/tensor", (6, 520), -1, 2, 3, PIECES),
    ("int4/tensor", (3, 5000), 0, 1, 3, PIECES),
    ("int4/tensor", (64, 128), -1, 1, 64, ELEMENTS),
]


@pytest.mark.parametrize(("name", "shape", "axis", "groups", "rows", "how"), FACTORED, ids=str)
def test_factored_term(
    name: str,
    shape: tuple[int, ...],
    axis: int,
    groups: int,
    rows: int,
    how: Any,
    device: str,
    g: torch.Generator,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One group, and one for each expert; blocks along either axis; programs of several small tiles."""
    monkeypatch.setattr(tuning, "ranked", lambda kernel, shape_class, arch, configs: configs[1:2])
    fmt = resolve(name)
    w, grad = weight(shape, torch.float32, fmt, g), torch.randn(shape, generator=g)
    by_row = torch.rand((groups, rows), generator=g)
    by_col = torch.rand((groups, w.numel() // (groups * rows)), generator=g)
    assert View.of(shape, fmt, axis, rows, by_col.shape[1]).factored == how.value
    h = (by_row[:, :, None] * by_col[:, None, :]).reshape(shape)
    wanted = grad + 0.3 * rounding.variance_vjp(w, h, fmt, axis)
    out = grad.to(device)
    factor = torch.tensor(0.3, device=device)
    curvature = Curvature(by_row.flatten().to(device), by_col.flatten().to(device), rows, factor)
    launch(w.to(device), fmt, axis, Outputs(grad=out), curvature=curvature, arch=80)
    close(out, wanted, f"{shape}, seed {seed}")


def test_all_results_in_one_pass(device: str, g: torch.Generator, seed: int) -> None:
    fmt = resolve("nvfp4")
    w, h, grad = (torch.randn((32, 64), generator=g) for _ in range(3))
    rtn, rr, variance = (poisoned(w, torch.float32, device) for _ in range(3))
    out, key, one = grad.clone().to(device), torch.tensor(seed), torch.tensor(1.0, device=device)
    launch(
        w.to(device),
        fmt,
        -1,
        Outputs(rtn, rr, variance, out),
        seed=key.to(device),
        curvature=Curvature(h.to(device), None, 1, one),
        arch=80,
    )
    same_bits(rtn, rounding.rtn(w, fmt), f"seed {seed}")
    wanted = rounding.rr(w, fmt, uniform=philox(key, w.numel()).reshape(w.shape))
    same_bits(rr + 0.0, wanted + 0.0, f"seed {seed}")
    close(variance, rounding.variance(w, fmt), f"seed {seed}")
    close(out, grad + rounding.variance_vjp(w, h, fmt), f"seed {seed}")


@pytest.mark.parametrize("name", ["nvfp4", "int4/tensor"])
def test_a_known_absmax_is_taken(name: str, device: str, g: torch.Generator, seed: int) -> None:
    """A shard's scale is the whole tensor's."""
    fmt, w = resolve(name), torch.randn((16, 64), generator=g)
    whole = w.abs().max() * 3
    out = poisoned(w, torch.float32, device)
    launch(w.to(device), fmt, -1, Outputs(rtn=out), amax=whole.to(device), arch=80)
    same_bits(out, rounding.rtn(w, fmt, amax_tensor=whole), f"seed {seed}")


@pytest.mark.parametrize("name", ["nvfp4", "int8"])
@pytest.mark.parametrize(("result", "dtype"), [("rtn", "bf16"), ("rr", "bf16"), ("term", "fp32")])
def test_traffic_is_what_is_claimed(result: str, dtype: str, name: str, device: str) -> None:
    """Each weight read once and each result written once: counted as the kernel runs, in one program."""
    if device != "cpu":
        pytest.skip("the interpreter counts")
    from tests.harness.interpreter import counted_traffic

    shape, fmt, torch_dtype = (32, 256), resolve(name), {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    w, term = torch.randn(shape).to(torch_dtype), result == "term"
    out = Outputs(**{"grad" if term else result: torch.zeros(shape, dtype=torch_dtype)})
    curvature = Curvature(torch.rand(shape), None, 1, torch.tensor(1.0)) if term else None
    amax = amaxes(w, fmt, -1)
    with counted_traffic() as traffic:
        launch(w, fmt, -1, out, amax=amax, seed=torch.tensor(1), curvature=curvature, arch=80)
    claimed = smooth_traffic(View.of(shape, fmt, -1), fmt, result, dtype)
    assert traffic.loaded + traffic.stored == claimed


def test_the_operators_agree_with_the_reference(g: torch.Generator, device: str, seed: int) -> None:
    """As a user's graph calls them; their CPU path in the interpreter, the kernel on a GPU."""
    for fmt, axis in (("nvfp4", -1), ("int4/tensor", 0), ("int8", 0)):
        w, h, key = torch.randn((48, 64), generator=g), torch.rand((48, 64), generator=g), torch.tensor(seed)
        on = w.to(device)
        rtn, rr, variance = torch.ops.lotion_fx.smooth(on, fmt, axis, "randomized", True, True, True, key.to(device))
        format, uniform = resolve(fmt), philox(key, w.numel()).reshape(w.shape)
        same_bits(rtn, rounding.rtn(w, format, axis), f"seed {seed}")
        same_bits(rr + 0.0, rounding.rr(w, format, axis, uniform=uniform) + 0.0, f"seed {seed}")
        close(variance, rounding.variance(w, format, axis), f"seed {seed}")
        grad, half = torch.zeros_like(on), torch.tensor(0.5, device=device)
        torch.ops.lotion_fx.add_term(grad, on, h.to(device), None, 1, half, fmt, axis, "randomized")
        close(grad, 0.5 * rounding.variance_vjp(w, h, format, axis), f"seed {seed}")


def test_what_is_not_supported() -> None:
    two_level = replace(resolve("nvfp4"), block="channel")
    assert not supports(torch.ones(4, 4), two_level)
    huge = torch.empty(2**31, dtype=torch.bfloat16, device="meta")
    assert not supports(huge, resolve("int4"))
    with pytest.raises(ValueError, match="not for the kernel; expected"):
        check(huge, resolve("int4"))
    assert supports(torch.ones(4, 4), resolve("nvfp4"))
    assert not supports(torch.ones(4, 4, dtype=torch.float64), resolve("nvfp4"))
    assert not supports(torch.ones(0, 4), resolve("nvfp4"))
    assert not supports(torch.ones(2, 4096), resolve("int4/2048"))


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@formats
def test_what_is_not_finite_is_not_hidden(fmt: Format, bad: float, device: str, g: torch.Generator, seed: int) -> None:
    """All of a block with a NaN or an infinity in it, as in the reference, whichever instruction rounds."""
    w = weight((8, 96), torch.float32, fmt, g)
    w[2, 50] = bad
    wanted = rounding.rtn(w, fmt)
    for arch in archs(fmt, device):
        out = poisoned(w, torch.float32, device)
        launch(w.to(device), fmt, -1, Outputs(rtn=out), arch=arch)
        finite = out.cpu().isfinite()
        assert torch.equal(finite, wanted.isfinite()) and not finite[2, 50], f"sm_{arch}, seed {seed}"
        same_bits(out.cpu()[finite], wanted[finite], f"sm_{arch}, seed {seed}")
