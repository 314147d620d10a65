"""Searched scales against trying every share of every block out, in NumPy."""

import numpy as np
import pytest
import torch

from lotion_fx.numerics.adaptive import adaptive
from lotion_fx.numerics.formats import resolve
from lotion_fx.numerics.rounding import rtn
from lotion_fx.numerics.searched import SHARES, clipped, limited
from tests.numerics.test_adaptive import layer


def heavy(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Weights with outliers."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=draw) * torch.randn(rows, columns, generator=draw).abs()


@pytest.mark.parametrize("fmt", ["int3/8", "int2/channel", "mxfp4"])
def test_each_block_has_the_share_of_least_squares(fmt: str) -> None:
    form, w = resolve(fmt), heavy(5, 64, 1)
    size = {"int3/8": 8, "int2/channel": 64, "mxfp4": 32}[fmt]
    made = clipped(w, form, 1)
    for block, found in zip(w.reshape(-1, size), made.reshape(-1, size), strict=True):
        tried = [block.clamp(-share * block.abs().max(), share * block.abs().max()) for share in SHARES]
        errors = [float(((block - rtn(x[None], form)[0]).double() ** 2).sum()) for x in tried]
        assert torch.equal(found, tried[int(np.argmin(errors))])
    assert not torch.equal(made, w)


def test_a_tensor_is_one_block_and_dimensions_and_dtypes_stay() -> None:
    w = heavy(6, 40, 2)
    made = clipped(w, resolve("int4/tensor"), 1)
    share = made.abs().max() / w.abs().max()
    assert any(abs(float(share) - each) < 1e-6 for each in SHARES) and share < 1
    torch.testing.assert_close(made, w.clamp(-made.abs().max(), made.abs().max()))
    assert torch.equal(clipped(w.T.contiguous(), resolve("int3/8"), 0), clipped(w, resolve("int3/8"), 1).T)
    assert clipped(w.bfloat16(), resolve("int2"), 1).dtype == torch.bfloat16


def test_where_no_share_is_better_blocks_stay() -> None:
    """Weights that are levels, and zeros."""
    w = torch.tensor([[-7.0, 3, 5, 7], [0, 0, 0, 0]])
    assert torch.equal(clipped(w, resolve("int4/4"), 1), w)


@pytest.mark.parametrize("fmt, beyond", [("int4/tensor", 1.0), ("fp4/tensor", 2.0)])
def test_an_outlier_is_to_be_handed_on_up_to_a_level(fmt: str, beyond: float) -> None:
    form, w = resolve(fmt), heavy(6, 40, 2)
    scaled_as = w.clamp(-0.9, 0.9)
    found, bound = limited(w, scaled_as, form, 1), 0.9 + beyond * 0.9 / form.grid.max
    torch.testing.assert_close(found, w.clamp(-bound, bound))
    assert w.abs().max() > bound and torch.equal(limited(w, w, form, 1), w)


@pytest.mark.parametrize("fmt, most", [("int4/tensor", 0.7), ("int2", 0.9), ("mxfp4", 0.9)])
def test_searched_scales_cost_less_where_outliers_share_them(fmt: str, most: float) -> None:
    ratios = []
    for seed in range(5):
        w, curvature = heavy(32, 64, seed), layer(32, 64, seed)[1]
        form, shape = resolve(fmt), (1, 32, 64)
        made = adaptive(w, form, 1, shape, curvature, scaled_as=clipped(w, form, 1))
        ratios.append(made.cost / adaptive(w, form, 1, shape, curvature).cost)
    assert float(np.exp(np.mean(np.log(ratios)))) < most
