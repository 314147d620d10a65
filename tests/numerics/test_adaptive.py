"""Adaptive rounding against its recursion written out, element by element, in NumPy."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from lotion_fx.deploy.weights import QuantizedWeight
from lotion_fx.numerics.adaptive import METHODS, TILE, Curvature, adaptive, fixed_point, stepped, stiffness
from lotion_fx.numerics.formats import Format, codebook, resolve
from lotion_fx.numerics.rounding import rtn, scale
from lotion_fx.numerics.searched import clipped

FORMATS = ("nvfp4", "nvfp4/pow2", "mxfp4", "mxfp6", "mxfp8", "int2", "int3", "int4", "int4/tensor", "int4/bf16", "int8")
FORMATS += ("int8/fp16", "fp4", "fp8", "nf4")


def layer(rows: int, columns: int, seed: int, groups: int = 1) -> tuple[Tensor, Curvature]:
    """A weight [G, R, C] and the curvature of correlated inputs and gradients."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(n: int) -> Tensor:
        mixed = torch.randn(groups, n, n, generator=generator, dtype=torch.float64) / n**0.5 + torch.eye(n)
        spread = torch.randn(groups, 1, n, generator=generator, dtype=torch.float64).exp()
        x = torch.randn(groups, 2 * n, n, generator=generator, dtype=torch.float64) * spread @ mixed
        return x.mT @ x

    w = torch.randn(groups, rows, columns, generator=generator)
    return w, Curvature(matrix(rows), matrix(columns))


def cost(w: Tensor, q: Tensor, curvature: Curvature) -> float:
    e = (w.double() - q.double()).reshape(-1, *curvature.rows.shape[1:2], *curvature.columns.shape[1:2])  # type: ignore
    return float(torch.einsum("gij,grs,gri,gsj->", curvature.columns, curvature.rows, e, e))


def scales(w: Tensor, fmt: Format) -> np.ndarray:
    """Each element's, [R, C]."""
    s = scale(w, fmt)
    block = {"tensor": w.numel(), "channel": w.shape[1]}.get(fmt.block, fmt.block)  # type: ignore[arg-type]
    if fmt.block == "tensor":
        return np.full(w.shape, float(s))
    return np.repeat(s[..., 0].double().numpy(), block, axis=1)[:, : w.shape[1]]


def recursion(
    w: Tensor,
    curvature: Curvature,
    fmt: Format,
    damping: tuple[float, float] = (0.05, 0.01),
    scaled_as: Tensor | None = None,
) -> np.ndarray:
    """Rows from the last, columns from the last, in ascending order of the diagonals; a block's largest weight stays
    on a level that keeps its scale."""
    matrices = [m[0].numpy() for m in curvature if m is not None]
    order, unit = [], []
    for matrix, share in zip(matrices, damping, strict=True):
        at = np.argsort(np.diag(matrix), kind="stable")
        order.append(at)
        matrix = matrix[np.ix_(at, at)] + share * np.diag(matrix).mean() * np.eye(len(matrix))
        lower = np.linalg.cholesky(matrix)
        unit.append(lower / np.diag(lower))
    at = np.ix_(*order)
    latent, s = w.double().numpy(), scales(w if scaled_as is None else scaled_as, fmt)
    keeps = [v for v in fmt.grid.levels if v > 0 and _own_scale(v, fmt)]
    size = w.numel() if fmt.block == "tensor" else w.shape[1] if fmt.block == "channel" else fmt.block
    blocks = [w.abs()] if fmt.block == "tensor" else list(w.abs().split(size, 1))  # type: ignore[arg-type]
    largest = np.concatenate(
        [(b == (b.max() if fmt.block == "tensor" else b.amax(1, True))).numpy() for b in blocks], 1
    )
    latent, s, largest = latent[at], s[at], largest[at]
    levels = np.array(fmt.grid.levels)
    q, (by_row, by_column) = np.zeros_like(latent), unit
    for i in reversed(range(len(q))):
        for j in reversed(range(q.shape[1])):
            e = (latent - q) * ((np.arange(len(q)) > i)[:, None] | (np.arange(q.shape[1]) > j))
            e[:i], e[:, :j] = 0, 0
            x = latent[i, j] + by_row[:, i] @ e @ by_column[:, j]
            allowed = levels
            if largest[i, j]:
                allowed = levels[np.sign(latent[i, j]) * levels >= min(keeps)]
            q[i, j] = allowed[np.argmin(np.abs(x / s[i, j] - allowed))] * s[i, j]
    out = np.zeros_like(q)
    out[at] = q
    return out


def _own_scale(level: float, fmt: Format) -> bool:
    """Whether a block whose largest weight is this level, at scale one, gets scale one."""
    one = torch.ones(())
    return float(fmt.law.block_scale(one * level, fmt.grid, one if fmt.law.two_level else None)) == 1


SMALL, TILED = (5, 7), (TILE + 3, 2 * TILE + 5)


@pytest.mark.parametrize(
    "fmt, size", [*((fmt, SMALL) for fmt in FORMATS), *((fmt, TILED) for fmt in ("nvfp4", "int3", "int4/tensor"))]
)
def test_is_the_recursion(fmt: str, size: tuple[int, int]) -> None:
    w, curvature = layer(*size, seed=4)  # one in which no format finds GPTQ cheaper
    made = adaptive(w[0], resolve(fmt), 1, (1, *size), curvature)
    expected = torch.from_numpy(recursion(w[0], curvature, resolve(fmt))).float()
    assert made.method == "two_sided"
    torch.testing.assert_close(made.values, expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4", "int2", "int3", "int4/tensor", "nf4"])
def test_at_searched_scales_it_is_the_recursion_too(fmt: str) -> None:
    w, curvature = layer(*TILED, seed=4)
    form, w = resolve(fmt), w[0] * torch.randn(TILED, generator=torch.Generator().manual_seed(1)).abs()
    scaled_as = clipped(w, form, 1)
    made = adaptive(w, form, 1, (1, *TILED), curvature, scaled_as=scaled_as)
    expected = torch.from_numpy(recursion(w, curvature, form, scaled_as=scaled_as)).float()
    assert made.method == "two_sided" and not torch.equal(scaled_as, w)
    torch.testing.assert_close(made.values, expected, rtol=3e-7, atol=0)
    assert torch.equal(rtn(made.values, form), made.values)
    torch.testing.assert_close(scale(made.values, form), scale(scaled_as, form))


@pytest.mark.parametrize("fmt", FORMATS)
def test_each_method_costs_no_more_than_the_next(fmt: str) -> None:
    for seed in range(14):  # with 15 formats, 210 layers
        w, curvature = layer(3 + seed, 29 - seed, seed, groups=1 + seed % 2)
        made = [adaptive(w, resolve(fmt), -1, tuple(w.shape), curvature, method) for method in METHODS]  # type: ignore
        costs = [cost(w, each.values, curvature) for each in made]
        assert all(a <= b * (1 + 1e-9) for a, b in pairwise(costs))
        assert costs[-1] == pytest.approx(cost(w, rtn(w, resolve(fmt)), curvature), rel=1e-4)
        for each, found in zip(made, costs, strict=True):
            assert each.cost == pytest.approx(found, rel=1e-6) and each.nearest == pytest.approx(costs[-1], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_rounded_stays_as_it_is(fmt: str, dtype: torch.dtype) -> None:
    """Under rounding to nearest and through codes, whatever the scales, the largest weights and zeros."""
    w, curvature = layer(9, 70, 5)
    w = (w * torch.logspace(-3, 1, 9)[:, None]).to(dtype)
    w[0, 2] = w[0, 2:3] * 0
    for method in METHODS:
        made = adaptive(w[0], resolve(fmt), 1, (1, 9, 70), curvature, method).values  # type: ignore[arg-type]
        assert made.dtype == dtype and torch.equal(rtn(made, resolve(fmt)), made)
        assert torch.equal(QuantizedWeight.of(made, resolve(fmt), 1).dequantize(), made)
        if fmt != "int4/tensor":
            assert made[2].eq(0).all()


@pytest.mark.parametrize("method", ["descent", "two_sided", "gptq"])
def test_blocks_along_the_rows_are_the_transposed_weight(method: str) -> None:
    w, curvature = layer(20, 33, 1)
    fmt = resolve("int4/8")
    down = adaptive(w[0], fmt, 0, (1, 20, 33), curvature, method)  # type: ignore[arg-type]
    along = adaptive(w[0].T.contiguous(), fmt, 1, (1, 33, 20), Curvature(*reversed(curvature)), method)  # type: ignore
    assert method == "gptq" or down.method == method
    assert torch.equal(down.values, along.values.T)


@pytest.mark.parametrize("method", ["descent", "two_sided"])
def test_groups_are_apart(method: str) -> None:
    w, curvature = layer(6, 16, 2, groups=3)
    made = adaptive(w, resolve("int3/8"), -1, (3, 6, 16), curvature, method).values
    for g in range(3):
        own = Curvature(*(m[g : g + 1] for m in curvature))  # type: ignore[index]
        assert torch.equal(made[g], adaptive(w[g], resolve("int3/8"), -1, (1, 6, 16), own, method).values)


def test_a_group_that_no_data_reached_is_rounded_to_nearest() -> None:
    w, curvature = layer(6, 16, 2, groups=2)
    curvature.rows[1], curvature.columns[1] = 0, 0  # type: ignore[index]
    made = adaptive(w, resolve("int3/8"), -1, (2, 6, 16), curvature).values
    assert torch.equal(made[1], rtn(w[1], resolve("int3/8"))) and not torch.equal(made[0], rtn(w[0], resolve("int3/8")))


@pytest.mark.parametrize("method", ["descent", "two_sided", "gptq"])
@pytest.mark.parametrize("fmt", ["int2", "int4/tensor", "nvfp4", "nf4"])
def test_zeros_of_a_sparse_weight_stay(fmt: str, method: str) -> None:
    w, curvature = layer(24, 32, 1)
    kept = torch.zeros(24, 8, 4).scatter(-1, w[0].view(24, 8, 4).abs().topk(2, -1).indices, 1.0).view(24, 32)
    made = adaptive(w[0] * kept, resolve(fmt), 1, (1, 24, 32), curvature, method)  # type: ignore[arg-type]
    assert made.method == method and made.values[kept == 0].eq(0).all()
    gradient = torch.randn(24, 32, generator=torch.Generator().manual_seed(2))
    rows = (w[0] * kept, made.values, resolve(fmt), 1, (1, 24, 32), curvature, gradient, 1e-7)
    moved = stepped(*rows)  # type: ignore[arg-type]
    assert moved[kept == 0].eq(0).all() and not torch.equal(moved, made.values)


@pytest.mark.parametrize("method", ["descent", "two_sided", "gptq"])
def test_curvature_that_underflowed_is_no_error(method: str) -> None:
    """As hundreds of layers without residuals leave it, in whose products few bits are left."""
    w, curvature = layer(24, 32, 1)
    shrunk = [(m * (3e-45 / m.diagonal(dim1=-2, dim2=-1).mean())).float() for m in curvature]  # type: ignore[union-attr]
    assert all(torch.linalg.eigvalsh(m.double()).min() < -1e-45 for m in shrunk)
    made = adaptive(w[0], resolve("int4"), 1, (1, 24, 32), Curvature(*shrunk), method)  # type: ignore[arg-type]
    assert made.method == method and 0 < made.cost < made.nearest
    assert torch.equal(rtn(made.values, resolve("int4")), made.values)


def test_a_format_that_keeps_nothing_is_refused() -> None:
    fmt = codebook([-2.0, 0.0, 1.0], block=4, name="lopsided")
    with pytest.raises(ValueError, match=r"fmt='lopsided'.*changes when it is rounded again.*symmetric levels"):
        fixed_point(torch.tensor([[1.0, 0.9, 0.8, 0.1]]), fmt, -1)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_step_by_the_curvature_s_own_gradient_is_descent(axis: int) -> None:
    """Where the loss is the curvature's cost, the gradient at the rounded weights tells nothing new."""
    w, (rows, columns) = layer(24, 40, 6)
    assert rows is not None and columns is not None
    rows += 0.05 * rows.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(24)  # so much is added to the sides once more,
    columns += 0.01 * columns.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(40)  # which moves the outcome a little
    fmt, shape, curvature = resolve("int3/8"), (1, 24, 40), Curvature(rows, columns)
    values = adaptive(w[0], fmt, axis, shape, curvature).values
    error = (w[0] - values).double()
    unit = 1e-3
    gradient = -unit * rows[0] @ error @ columns[0]
    assert stiffness(error[None], curvature, gradient[None]) == pytest.approx(unit, rel=1e-6)
    made = stepped(w[0], values, fmt, axis, shape, curvature, gradient, unit)
    assert torch.equal(rtn(made, fmt, axis), made)
    costs = [cost(w, each, curvature) for each in (values, made)]
    assert costs[1] < 0.97 * costs[0]
    still = stepped(w[0], values, fmt, axis, shape, curvature, torch.zeros_like(gradient), unit)
    assert torch.equal(still, values)  # no gradient, no change
