"""The one pass of AdamW and the term is AdamW after the term, on every format that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lotion_fx
from lotion_fx.kernels import adamw_smooth as kernel
from lotion_fx.kernels.adamw_smooth import Step, launch, reference
from lotion_fx.kernels.audit.weight_works import adamw_traffic
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.device_code import specialized
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import Format, codebook, register_format, resolve
from lotion_fx.numerics.noise import D, register_noise
from tests.harness.interpreter import INTERPRETING, counted_traffic
from tests.models import LM, ids, lm_loss

BETAS = (0.9, 0.999)
SHAPES = ((33, 128), (3, 5, 256), (1, 128))
LARGE = Config({"TILE": 8192, "TILES": 1}, num_warps=8)

SKEWED = codebook([-1.0, -0.3, 0.0, 0.1, 0.7], block=16, name="skewed")
NAMES = ("int2/1", "int4", "int4/128", "int8/2", "fp4", "fp8/64", "nf4", "nvfp4", "mxfp4", "mxfp4/floor", "mxfp4/even")
NAMES += ("nvfp4/pow2", "int4/bf16")
NAMES += ("mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", SKEWED.name)
THIRD = register_noise("test_three_levels", D, D * (1 - D) * (1 - 2 * D) ** 2 / 4)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """Operators know formats by name. Here, as other files' tests take every registered format."""
    register_format("skewed", SKEWED)


@pytest.fixture
def seed() -> int:
    return int(torch.seed() % 2**31)


def blocks_of_note(fmt: Format, g: torch.Generator) -> Tensor:
    """A row of blocks: of zeros, at levels, several absmax elements of both signs, tiny, subnormal, huge."""
    assert isinstance(fmt.block, int)
    levels = torch.tensor(fmt.grid.levels)
    at = levels[torch.randint(len(levels), (2, fmt.block), generator=g)] * 0.37
    drawn = torch.randn(8, fmt.block, generator=g)
    ties = drawn[0].clamp(-0.4, 0.4)
    rows = [torch.zeros(fmt.block), *at, ties, drawn[1] * 1e-30, drawn[2] * 1e-41, drawn[3] * 1e4, -drawn[4].abs()]
    return torch.stack(rows).flatten()


class Case:
    """Weights with gradients and moments, and factors that make gradient and term alike in size."""

    def __init__(
        self,
        fmt: Format,
        device: str,
        seed: int,
        *,
        dtype: torch.dtype = torch.float32,
        moment: torch.dtype | None = None,
        noise: str = "randomized",
        shapes: tuple[tuple[int, ...], ...] = SHAPES,
        offset: int = 0,
        first: bool = False,
    ) -> None:
        self.fmt, self.noise, self.seed = fmt, noise, seed
        g = torch.Generator().manual_seed(seed)
        self.guards: list[Tensor] = []

        def held(x: Tensor, dtype: torch.dtype) -> Tensor:
            """In the middle of memory that the kernel must not touch, ``offset`` elements past an aligned address."""
            room = torch.full((x.numel() + 64,), 171, dtype=dtype, device=device)
            self.guards += [room[: 32 + offset], room[32 + offset + x.numel() :]]
            return room[32 + offset :][: x.numel()].view(x.shape).copy_(x)

        weights = [torch.randn(shape, generator=g) for shape in shapes]
        weights.append(blocks_of_note(fmt, g)[None])
        like = [w.shape for w in weights]
        moment = moment or dtype
        v = [torch.rand(s, generator=g) * 1e-2 * (not first) for s in like]
        self.weights = [held(w, dtype) for w in weights]
        self.grads = [held(torch.randn(s, generator=g) * 0.1, dtype) for s in like]
        self.m = [held(torch.randn(s, generator=g) * 0.1 * (not first), moment) for s in like]
        self.v = [held(x, moment) for x in v]
        scale = 50 * torch.rand(len(like), generator=g) + 10
        columns = [scale * (not first), scale * first, *torch.rand(5, len(like), generator=g)]
        self.factors = torch.stack(columns, 1).to(device)
        self.factors[:, 5] *= 1e-6
        self.factors[:, 2] -= 0.5  # of both signs, as with maximize
        self.factors[0, 6] = 100.0  # of the others some terms are at their limit
        amax = [w.abs().amax().float() for w in self.weights]
        self.amax = torch.stack(amax) if fmt.law.two_level else torch.zeros(0, device=device)

    def arguments(self, dtype: torch.dtype | None = None, found_inf: Tensor | None = None) -> Step:
        """Of `launch`, as copies in a dtype if one is given."""
        lists = [self.weights, self.grads, self.m, self.v]
        if dtype is not None:
            lists = [[t.to(dtype, copy=True) for t in tensors] for tensors in lists]
        return Step(*lists, self.factors, self.amax, found_inf, self.fmt.name, self.noise, *BETAS)

    def states(self) -> list[Tensor]:
        return [*self.weights, *self.m, *self.v]

    def check_guards(self) -> None:
        assert all(bool((guard == 171).all()) for guard in self.guards), f"seed {self.seed}: written out of bounds"


def slope_scale(case: Case) -> list[Tensor]:
    """How large the numbers of each block are that cancel in ``g + h (s (lo + hi) - 2 w)`` and in the scale's part."""
    scales = []
    for i, (w, grad, v) in enumerate(zip(case.weights, case.grads, case.v, strict=True)):
        h = case.factors[i, 0] * v.float() + case.factors[i, 1] * grad.float().square()
        each = rounding.to_blocks(grad.float().abs() + 2 * h * w.float().abs(), case.fmt)
        each = each.amax(-1, keepdim=True).expand(each.shape)
        scales.append(case.factors[i, 2].abs() * rounding.from_blocks(each, case.fmt, -1, w.shape))
    return scales


def check(case: Case, config: Config = LARGE) -> None:
    """The moments against ATen in float32, whose levels are the same; the weights against float64, from the moments."""
    wanted, given, scales = case.arguments(torch.float32), case.arguments(torch.float64), slope_scale(case)
    reference(wanted)
    amax = launch(case.arguments(), config)
    seed = f"seed {case.seed}"
    for i, (w, m, v) in enumerate(zip(case.weights, case.m, case.v, strict=True)):
        _, _, _, keep, step, eps, _ = case.factors[i].double()
        near, scale = 1e-6 * scales[i], scales[i].double()
        assert ((m - wanted[2][i]).abs() <= 1e-6 * m.abs() + (1 - BETAS[0]) * near).all(), seed
        assert ((v - wanted[3][i]).abs() <= 1e-6 * v.abs() + (1 - BETAS[1]) * 2 * near * scale).all(), seed
        down = step * m.double() / (v.double().sqrt() + eps)
        assert ((w - (keep * given[0][i] - down)).abs() <= 1e-6 * (given[0][i].abs() + down.abs())).all(), seed
    assert all(map(torch.equal, [g.double() for g in case.grads], given[1])), "the gradient stays"
    check_amax(case, amax)
    case.check_guards()


def check_amax(case: Case, amax: Tensor) -> None:
    if case.fmt.law.two_level:
        assert torch.equal(amax, torch.stack([w.abs().amax().float() for w in case.weights])), f"seed {case.seed}"
    else:
        assert amax.numel() == 0


def each(*names: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", names)


# Of one grid or scale law the others here are representatives, and `test_device_code` has each function of each.
LIKE_ANOTHER = ("int8/2", "int4/128", "mxfp4/floor", "mxfp4/even", "mxfp6_e3m2", "mxfp8_e5m2", "mxfp8_e4m3")


@each(*(pytest.param(name, marks=pytest.mark.slow) if name in LIKE_ANOTHER else name for name in NAMES))
def test_every_format(name: str, device: str, seed: int) -> None:
    check(Case(resolve(name), device, seed))
    check(Case(resolve(name), device, seed + 1, shapes=((7, 128),), first=True))


@pytest.mark.parametrize("noise", ["smoothstep", "gaussian", THIRD.name])
def test_every_law(noise: str, device: str, seed: int) -> None:
    check(Case(resolve("fp4/16"), device, seed, noise=noise))


@pytest.mark.parametrize(("tile", "tiles"), [(128, 1), (128, 3), (2048, 2)])
def test_tiles_of_any_size_and_number(tile: int, tiles: int, device: str, seed: int) -> None:
    """Among the weights are some of less than a tile, of whole tiles, and of less and of more than a program's."""
    case = Case(resolve("nvfp4"), device, seed, shapes=((5, 80), (1, 16), (11, 48), (2, 128), (3, 256)))
    check(case, Config({"TILE": tile, "TILES": tiles}))


@pytest.mark.parametrize(("offset", "bytes"), [(0, 16), (1, 2), (2, 4), (4, 8)])
def test_alignment(offset: int, bytes: int, device: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is told what all addresses are multiples of: more would fault on a GPU, less would load narrowly."""
    told = []

    class Spy:
        def __init__(self, *args: Any) -> None:
            self.kernel = specialized(*args)

        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            return lambda *args, **options: [told.append(options["ALIGNMENT"]), self.kernel[grid](*args, **options)]

    monkeypatch.setattr(kernel, "specialized", Spy)
    case = Case(resolve("int4/8"), device, seed, offset=offset, moment=torch.bfloat16)
    launch(case.arguments(), LARGE)
    case.check_guards()
    assert told == [bytes]


MIXED = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize(("dtype", "moment"), MIXED, ids=["bf16", "fp16", "fp32 with bf16"])
def test_half_precision(dtype: torch.dtype, moment: torch.dtype, device: str, seed: int) -> None:
    """What ATen computes in float32 from the same numbers, rounded once; errors of m reach weights over sqrt(v)."""
    case = Case(resolve("nvfp4"), device, seed, dtype=dtype, moment=moment)
    wanted, scales = case.arguments(torch.float32), slope_scale(case)
    reference(wanted)
    amax = launch(case.arguments(), LARGE)
    for i, tensors in enumerate(zip(case.weights, case.m, case.v, strict=True)):
        _, _, _, _, step, tiny, _ = case.factors[i]
        near, root = 1e-6 * scales[i], wanted[3][i].sqrt() + tiny
        slacks = 1e-6 + step * near / root, near, near * scales[i]
        for mine, true, slack in zip(tensors, (wanted[j][i] for j in (0, 2, 3)), slacks, strict=True):
            eps = torch.finfo(mine.dtype)
            unit = eps.eps * true.abs() + eps.tiny * eps.eps + slack
            assert ((mine.float() - true).abs() <= unit).all(), f"seed {seed}"
    check_amax(case, amax)
    case.check_guards()


@each("nvfp4", "int4")
def test_an_overflow_leaves_everything_as_it_is(name: str, device: str, seed: int) -> None:
    case = Case(resolve(name), device, seed)
    before = case.arguments(torch.float32)
    found = launch(case.arguments(found_inf=torch.ones((), device=device)), LARGE)
    for mine, old in zip(case.arguments()[:4], before[:4], strict=True):
        assert all(map(torch.equal, mine, old))
    assert torch.equal(found, case.amax)
    check_amax(case, launch(case.arguments(found_inf=torch.zeros((), device=device)), LARGE))
    assert not torch.equal(case.weights[0], before[0][0])


@pytest.mark.skipif(not INTERPRETING, reason="the interpreter counts bytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each("nvfp4", "int4")
def test_bytes(name: str, dtype: torch.dtype, seed: int) -> None:
    """Those of `torch._fused_adamw_`, which reads w, g, m and v and writes w, m and v, and a few in each program."""
    case = Case(resolve(name), "cpu", seed, dtype=dtype)
    elements = sum(w.numel() for w in case.weights)
    programs = sum(-(-w.numel() // 2048) for w in case.weights)
    with counted_traffic() as counted:
        launch(case.arguments(), Config({"TILE": 1024, "TILES": 2}))
    size = dtype.itemsize
    assert counted.loaded + counted.stored == adamw_traffic(elements, programs, size, size, case.fmt)
    assert adamw_traffic(elements, 0, size, size, case.fmt) == elements * 7 * size
    assert 0 < adamw_traffic(0, 1, size, size, case.fmt) < 100


def test_the_operator(device: str, seed: int) -> None:
    """It runs the kernel on a GPU and ATen elsewhere, and tells autograd which tensors changed."""
    case = Case(resolve("nvfp4"), device, seed)
    wanted = case.arguments(torch.float32)
    versions = [t._version for t in case.states()]
    amax = kernel.adamw_smooth(*case.arguments())
    reference(wanted)
    for mine, theirs in zip(case.weights, wanted[0], strict=True):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()
    assert all(t._version > version for t, version in zip(case.states(), versions, strict=True))
    check_amax(case, amax)


def test_the_optimizer(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps of `lotion_fx.optim.AdamW` by the kernel are those of torch's with the hook."""
    if INTERPRETING:
        monkeypatch.setattr(lotion_fx.optim.AdamW, "devices", ("cpu",))
        monkeypatch.setattr(kernel, "adamw_smooth", lambda *args: launch(Step(*args), LARGE))
    launched, original = [], kernel.adamw_smooth
    monkeypatch.setattr(
        kernel, "adamw_smooth", lambda params, *args: launched.append(params) or original(params, *args)
    )
    models = []
    for cls in (torch.optim.AdamW, lotion_fx.optim.AdamW):
        torch.manual_seed(0)
        model = lotion_fx.transform(LM().to(device), "nvfp4", curvature="fisher", inner="eager", strength=3.0)
        optimizer = cls(model.parameters(), lr=1e-2, weight_decay=0.1)
        for step in range(3):
            optimizer.zero_grad()
            lm_loss(model, ids(seed=step).to(device)).backward()
            optimizer.step()
        models.append(model)
    assert len(launched) == 3
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert (p - q).norm() <= 1e-6 * p.norm()
