"""`kernels.variance_linear` against `lotion_fx.rounding.variance` and float64 products, and against enumeration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lotion_fx.kernels import variance_linear as kernels
from lotion_fx.kernels.audit import product_works
from lotion_fx.kernels.audit.aot import describe
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.variance_linear import (
    CONFIGS,
    FEW,
    in_registers,
    launch,
    launch_given,
    variance_linear,
    variance_linear_given,
)
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import Format, codebook, formats, resolve
from lotion_fx.numerics.noise import RANDOMIZED, D, NoiseLaw, resolve_noise

# What a float32 value loses as an operand: none, or half a unit in the last place of x's dtype.
UNIT = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = pytest.mark.parametrize("dtype", UNIT, ids=lambda dtype: str(dtype).removeprefix("torch."))
NAMES = sorted(set(formats()) - {"int3", "int5", "int6", "int7"})  # which differ from int4 by a number
MADE = [fmt for fmt in map(resolve, NAMES) if in_registers(fmt, 1, torch.bfloat16)]
MADE += [resolve(name) for name in ("int4/tensor", "int4/channel", "fp8/16", "mxfp4/floor", "mxfp6_e3m2/even")]
MADE += [codebook([-2.0, -0.5, 0.0, 0.75, 3.0], block=8)]
THIRD = NoiseLaw("third", D - D * (1 - D) * (1 - 2 * D) ** 2 / 8, D * (1 - D) * (1 - 2 * D) ** 2 / 8)


class Case:
    """A layer's operands, fresh random, some weights at levels, a column of zeros and widely differing rows."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        positions: int,
        outputs: int,
        inputs: int,
        fmt: Format | None = None,
        weight: torch.dtype | None = None,
    ) -> None:
        self.seed = int(torch.randint(2**31, ()))
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.x = draw(positions, inputs).to(dtype).to(device)
        self.u = (draw(positions, inputs).square() / 4).to(dtype).to(device)
        w = draw(outputs, inputs) * draw(outputs, 1).clamp(max=2).exp()  # v within float16's range
        w[:, 0] = 0
        if fmt is not None:
            at_level = torch.rand(w.shape, generator=generator) < 0.1
            w = torch.where(at_level, rounding.rtn(w, fmt), w)
        self.w = w.to(weight or dtype).to(device)
        self.bias = draw(outputs).to(dtype).to(device)
        self.y, self.v = (torch.full((positions, outputs), torch.nan, dtype=dtype, device=device) for _ in range(2))

    def check(self, variances: Tensor, bias: bool, random: bool) -> None:
        """y and v in float64, with the losses that the module states: of operands, of float32 sums, of the outputs."""
        x, w, u = self.x.double(), self.w.to(self.x.dtype).double(), self.u.double() * random
        variances, message = variances.double(), f"seed {self.seed}"
        y, v = x @ w.t() + self.bias.double() * bias, (x.square() + u) @ variances.t() + u @ w.square().t()
        rounding_off = torch.finfo(self.x.dtype).eps / 2
        size = x.abs() @ w.abs().t() + self.bias.double().abs() * bias
        assert ((self.y.double() - y).abs() <= rounding_off * y.abs() + 1e-6 * size).all(), message
        # Two operands in a product, each off by a unit; float16's own range ends at 2^-24.
        lost = 2 * UNIT[self.x.dtype] + 1e-6
        smallest = 2.0**-24 if self.x.dtype == torch.float16 else 0.0
        assert ((self.v.double() - v).abs() <= (lost + rounding_off) * v + smallest).all(), message


def variance_of(case: Case, fmt: Format, law: NoiseLaw) -> Tensor:
    return rounding.variance(case.w.float().cpu(), fmt, law=law).to(case.w.device)


def run(
    case: Case,
    fmt: Format,
    noise: str | NoiseLaw = "randomized",
    bias: bool = False,
    random: bool = False,
    config: Config | None = None,
) -> None:
    law = resolve_noise(noise) if isinstance(noise, str) else noise
    b, u = case.bias if bias else None, case.u if random else None
    config = config or CONFIGS["registers"]["few"][0]
    launch(case.x, case.w, case.y, case.v, fmt, law, b, u, arch=80, config=config)
    case.check(variance_of(case, fmt, law), bias, random)


@pytest.mark.parametrize("fmt", MADE, ids=lambda fmt: f"{fmt.name}/{fmt.block}")
def test_every_format(device: str, fmt: Format) -> None:
    """Float32, in which nothing hides: 50 inputs, so that the last block is short and so is the last tile."""
    run(Case(device, torch.float32, 33, 70, 50, fmt), fmt)


@DTYPES
@pytest.mark.parametrize("fmt", ["nvfp4", "int4", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("bias", "random"), [(True, False), (False, True)], ids=["bias", "random input"])
def test_dtypes(device: str, dtype: torch.dtype, fmt: str, bias: bool, random: bool) -> None:
    run(Case(device, dtype, 130, 65, 80, resolve(fmt)), resolve(fmt), bias=bias, random=random)


@pytest.mark.parametrize("noise", ["smoothstep", "gaussian", THIRD], ids=["smoothstep", "gaussian", "third level"])
def test_noise_laws(device: str, noise: str | NoiseLaw) -> None:
    run(Case(device, torch.float32, 20, 40, 64), resolve("int4"), noise)


def test_weight_may_be_wider_than_the_input(device: str) -> None:
    """Autocast's master weights: the mean takes the rounded weight, the variance is that of the weight itself."""
    fmt = resolve("nvfp4")
    run(Case(device, torch.bfloat16, 40, 70, 96, fmt, weight=torch.float32), fmt)


def test_rows_may_stand_apart(device: str) -> None:
    case = Case(device, torch.float32, 40, 70, 96)
    case.x, case.u, case.w = case.x[:, :64], case.u[:, 32:], case.w[:, 16:80]
    run(case, resolve("mxfp4"), random=True)


def each_configuration() -> list[Any]:
    """Of both kernels, each once: the first of each class fast."""
    found = {}
    for which, classes in CONFIGS.items():
        for config in (config for configs in classes.values() for config in configs):
            marks = () if any(config == configs[0] for configs in classes.values()) else pytest.mark.slow
            found.setdefault(f"{which} {describe(config)}", pytest.param(which, config, marks=marks))
    return list(found.values())


@pytest.mark.parametrize(("which", "config"), each_configuration())
def test_every_configuration(device: str, which: str, config: Config) -> None:
    fmt = resolve("nvfp4")
    case = Case(device, torch.bfloat16, 130, 66, 70, fmt)
    if which == "registers":
        run(case, fmt, bias=True, random=True, config=config)
    else:
        variances = variance_of(case, fmt, resolve_noise("randomized")).bfloat16()
        launch_given(case.x, case.w, variances, case.y, case.v, case.bias, case.u, arch=80, config=config)
        case.check(variances, bias=True, random=True)


@DTYPES
@pytest.mark.parametrize("random", [False, True], ids=["fixed input", "random input"])
def test_given_variances(device: str, dtype: torch.dtype, random: bool) -> None:
    case = Case(device, dtype, 100, 70, 50)
    variances = case.w.float().square() / 9
    launch_given(case.x, case.w, variances, case.y, case.v, None, case.u if random else None, arch=80)
    case.check(variances, bias=False, random=random)


def test_is_the_variance_over_every_rounding(device: str) -> None:
    """Enumeration: one output of eight weights, each at its lower or its upper level, all 2^8 of them."""
    fmt = resolve("int4")
    case = Case(device, torch.float32, 5, 1, 8)
    run(case, fmt)
    values, odds = (t.double().cpu() for t in rounding.outcomes(case.w.cpu(), fmt))
    chosen = torch.cartesian_prod(*[torch.arange(2)] * 8)
    at = torch.arange(8)
    weights, probabilities = values[chosen, 0, at], odds[chosen, 0, at].prod(1)
    outputs = case.x.double().cpu() @ weights.t()
    mean = outputs @ probabilities
    variance = (outputs - mean[:, None]).square() @ probabilities
    torch.testing.assert_close(case.y[:, 0].double().cpu(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(case.v[:, 0].double().cpu(), variance, rtol=1e-5, atol=0)


def test_absmax_of_a_shard(device: str) -> None:
    """The tensor's scale comes from the whole weight, of which this is a part without the largest element."""
    for name in ("nvfp4", "int4/tensor"):
        fmt = resolve(name)
        case = Case(device, torch.float32, 20, 40, 64)
        amax = case.w.abs().amax() * 3
        launch(case.x, case.w, case.y, case.v, fmt, amax=amax, arch=80)
        case.check(rounding.variance(case.w.cpu(), fmt, amax_tensor=amax.cpu()).to(device), bias=False, random=False)


@pytest.mark.parametrize("fmt", ["nvfp4", "int8", "mxfp4", None])
@pytest.mark.parametrize("random", [False, True], ids=["fixed input", "random input"])
def test_moves_the_bytes_it_says(device: str, fmt: str | None, random: bool) -> None:
    if device != "cpu":
        pytest.skip("counted in the interpreter")
    from tests.harness.interpreter import counted_traffic

    case = Case(device, torch.bfloat16, 140, 150, 70)
    work = product_works.variance_linear(80, (140, 150, 70), fmt, random=random, bias=True)
    config, u = work.configs[0], case.u if random else None
    with counted_traffic() as traffic:
        if fmt is None:
            variances = case.w.square()
            launch_given(case.x, case.w, variances, case.y, case.v, case.bias, u, arch=80, config=config)
        else:
            form = resolve(fmt)
            launch(case.x, case.w, case.y, case.v, form, RANDOMIZED, case.bias, u, arch=80, config=config)
    assert traffic.loaded + traffic.stored == work.bytes(config) > work.minimum_bytes


@DTYPES
@pytest.mark.parametrize("fmt", ["nvfp4", "int4/128"])
def test_op(device: str, dtype: torch.dtype, fmt: str) -> None:
    if device != "cpu":
        pytest.skip("opcheck runs on the CPU path")
    case = Case(device, dtype, 20, 30, 140)
    variances = variance_of(case, resolve(fmt), resolve_noise("randomized"))
    for bias, u in ((None, None), (case.bias, case.u)):
        case.y, case.v = variance_linear(case.x, case.w, fmt, "randomized", bias, u)
        assert case.y.dtype == case.v.dtype == dtype
        case.check(variances, bias is not None, u is not None)


def test_op_is_well_formed(device: str) -> None:
    if device != "cpu":
        pytest.skip("opcheck runs on the CPU path")
    case = Case(device, torch.bfloat16, 20, 30, 140)
    torch.library.opcheck(variance_linear, (case.x, case.w, "int4/128", "randomized", case.bias))
    torch.library.opcheck(variance_linear_given, (case.x, case.w, case.w.square(), None, case.u))


def test_refuses() -> None:
    x, w = torch.zeros(4, 3), torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"x is \(4, 3\) and weight \(5, 2\): expected \[N, I\] and \[O, I\]"):
        variance_linear(x, w[:, :2], "nvfp4")
    with pytest.raises(ValueError, match=r"variances is \(5, 2\): expected the weight's shape, \(5, 3\)"):
        variance_linear_given(x, w, w[:, :2])
    with pytest.raises(ValueError, match=r"bias is \(3,\): expected \[O\], \(5,\)"):
        variance_linear(x, w, "nvfp4", bias=w[0])
    with pytest.raises(ValueError, match=r"u is torch.float16 \(4, 3\): expected that of x"):
        variance_linear(x, w, "nvfp4", u=x.half())
    with pytest.raises(ValueError, match="unknown format"):
        variance_linear(x, w, "nvfp5")


def test_where_variances_are_made() -> None:
    assert in_registers(resolve("nvfp4"), FEW, torch.bfloat16) and not in_registers(
        resolve("nvfp4"), FEW + 1, torch.bfloat16
    )
    assert not in_registers(resolve("int4/128"), 1, torch.bfloat16), "no tile holds its blocks"
    assert not in_registers(resolve("nvfp4"), 1, torch.float32), "without tensor cores its product takes all registers"
    assert kernels.shape_class(FEW, torch.bfloat16, False) == "few"
    assert kernels.shape_class(FEW + 1, torch.float16, False) == "many"
    assert kernels.shape_class(1, torch.float16, True) == "random"
    assert kernels.shape_class(1, torch.float32, True) == "float32"
