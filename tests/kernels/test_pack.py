"""Packed codes and scales are the formats' own, bit for bit, and unpack to what training rounded to."""

import pytest
import torch
from torch import Tensor

from lotion_fx.kernels import tuning
from lotion_fx.kernels.audit import weight_works
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.device import E2M1_GRID, required_arch
from lotion_fx.kernels.pack import launch, pack, reference
from lotion_fx.kernels.packed import unpack
from lotion_fx.kernels.view import amaxes
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import Format, codebook, register_format, resolve

NAMES = (
    "int2 int3 int4 int4/tensor int4/channel int6 int8 fp4 fp8 nf4 nvfp4 mxfp4/ceil mxfp4/floor mxfp4/even mxfp6_e3m2 "
    "nvfp4/pow2 int4/bf16 int8/fp16 int4/tensor/fp16"
)
LOPSIDED = codebook((-1.5, -0.25, 0.0, 0.1, 0.75), block=24, name="lopsided24")
FORMATS = [*map(resolve, NAMES.split()), LOPSIDED]
SHAPES = [(32, 128), (33, 100), (7, 75), (3, 5, 48), (1, 1)]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture
def seed() -> int:
    return int(torch.seed() % 2**31)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """Operators know formats by name. Here, as other files' tests take every registered format."""
    register_format("lopsided24", LOPSIDED)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for every program, so that these are few and large."""
    monkeypatch.setattr(tuning, "ranked", lambda *args: (Config({"SIZE": 8192, "TILES": 1}),))


def weight(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Ties, negative numbers that round to zero, zero blocks and tiny blocks among random ones."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    flat = w.reshape(-1)
    n = flat.numel()
    flat[: n // 4] = (flat[: n // 4] * 4).round() / 8
    flat[n // 2 : n // 2 + 40] *= 2.0**-100
    flat[n // 3 : n // 3 + 40] = -0.0
    return w.to(dtype)


@formats
@dtypes
def test_codes_and_scales(
    fmt: Format, dtype: torch.dtype, device: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kw: real(*args, **kw).fill_(0xAA))  # poison
    for shape in (SHAPES[seed % len(SHAPES)], SHAPES[(seed + 1) % len(SHAPES)]):
        w = weight(shape, dtype, seed)
        amax = amaxes(w, fmt, -1)
        codes, scales = reference(w, fmt, amax)
        own = () if device == "cpu" else (required_arch(torch.device(device)),)
        for arch in own or ((80, 100) if fmt.grid == E2M1_GRID else (80,)):
            found = launch(w.to(device), fmt, None if amax is None else amax.to(device), arch=arch)
            assert torch.equal(found[0].cpu(), codes), f"codes of {shape}, sm_{arch}, seed {seed}"
            assert torch.equal(found[1].cpu(), scales), f"scales of {shape}, sm_{arch}, seed {seed}"


@formats
@dtypes
def test_what_is_packed_is_what_training_rounded_to(fmt: Format, dtype: torch.dtype, device: str, seed: int) -> None:
    for shape in SHAPES:
        w = weight(shape, dtype, seed)
        back = unpack(pack(w.to(device), fmt), fmt, shape[-1])
        rounded = rounding.rtn(w.float(), fmt)
        assert torch.equal(back.cpu().view(torch.int32), rounded.view(torch.int32)), f"{shape}, seed {seed}"


def test_the_even_element_is_the_low_half(device: str) -> None:
    """[1, 6, -0.5, 0, ...] at scale 1 in E2M1: 1.0 is code 2, 6.0 code 7, -0.5 code 9."""
    w = torch.tensor([[1.0, 6.0, -0.5, 0.0] * 8])
    codes = launch(w.to(device), resolve("mxfp4"), None, arch=80)[0].cpu()
    assert codes.tolist() == [[0x72, 0x09] * 8]


def test_traffic_is_what_is_claimed(device: str) -> None:
    if device != "cpu":
        pytest.skip("the interpreter counts")
    from tests.harness.interpreter import counted_traffic

    for name in ("nvfp4", "mxfp4", "int4", "int8"):
        fmt, shape = resolve(name), (16, 256)
        w = torch.randn(shape).bfloat16()
        amax = amaxes(w, fmt, -1)
        with counted_traffic() as traffic:
            launch(w, fmt, amax, arch=80)
        claimed = weight_works.pack(80, shape, name)
        assert traffic.loaded + traffic.stored == claimed.minimum_bytes == claimed.bytes(claimed.configs[0])


def test_what_cannot_be_packed_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="two blocks of 25; use an even block"):
        pack(torch.ones(2, 50), "int4/25")
    with pytest.raises(ValueError, match="int4.*another format has this name; register_format"):
        pack(torch.ones(2, 50), codebook((-1.0, 0.0, 1.0), name="int4"))
