"""Positions without a gradient change no curvature: padded to twice the length, a batch has that of its tokens."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lotion_fx.passes.attach.probe import Layout
from tests.passes.curvature.running import TABLES, close, randn, run, wave


class Layer(NamedTuple):
    """A layer, and two inputs that give the same outputs at the positions ``kept`` of the longer one's."""

    forward: Callable[..., Tensor]
    shape: tuple[int, ...]
    groups: int
    rows: int
    short: Tensor
    long: Tensor
    kept: tuple[slice, ...]


def padded(x: Tensor, *dims: int) -> Tensor:
    """Twice as long in some dimensions, by values of another size: what padding holds is no concern of ours."""
    for dim in dims:
        x = torch.cat([x, 3 + randn(*x.shape)], dim)
    return x


ALL = slice(None)
LAYERS = {
    "linear": Layer(F.linear, (5, 7), 1, 5, randn(13, 7), padded(randn(13, 7), 0), (slice(13),)),
    "linear, a batch": Layer(F.linear, (5, 7), 1, 5, randn(3, 5, 7), padded(randn(3, 5, 7), 1), (ALL, slice(5))),
    "experts": Layer(
        lambda x, w: x @ w, (3, 7, 5), 3, 7, randn(3, 11, 7), padded(randn(3, 11, 7), 1), (ALL, slice(11))
    ),
    "conv1d": Layer(F.conv1d, (6, 4, 3), 1, 6, randn(2, 4, 9), padded(randn(2, 4, 9), 2), (ALL, ALL, slice(7))),
    "conv1d, groups": Layer(
        lambda x, w: F.conv1d(x, w, groups=2), (6, 2, 3), 2, 3, randn(2, 4, 9), padded(randn(2, 4, 9), 2),
        (ALL, ALL, slice(7)),
    ),
    "conv2d": Layer(
        F.conv2d, (6, 4, 3, 3), 1, 6, randn(2, 4, 9, 8), padded(randn(2, 4, 9, 8), 2, 3), (ALL, ALL, slice(7), slice(6))
    ),
    "conv2d, 1x1": Layer(
        F.conv2d, (6, 4, 1, 1), 1, 6, randn(2, 4, 5, 3), padded(randn(2, 4, 5, 3), 0, 2), (slice(2), ALL, slice(5))
    ),
    "conv2d, depthwise": Layer(
        lambda x, w: F.conv2d(x, w, groups=4), (4, 1, 3, 3), 4, 1, randn(2, 4, 9, 8), padded(randn(2, 4, 9, 8), 2),
        (ALL, ALL, slice(7)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", LAYERS)
def test_padding_changes_no_curvature(name: str, table: str) -> None:
    forward, shape, groups, rows, short, long, kept = LAYERS[name]
    layout = Layout("factored", shape, groups, rows)

    def vector(x: Tensor, kept: tuple[slice, ...]) -> Tensor:
        def loss(w: Tensor, x: Tensor) -> Tensor:
            y = forward(x, w)[kept]
            return (torch.tanh(y) * wave(y.shape)).sum()

        return run(loss, [randn(*shape) / 2], [layout], (x,), table).probes[0][: layout.payload]

    close(vector(long, kept), vector(short, (ALL,)))
