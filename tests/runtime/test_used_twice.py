"""A weight that one graph uses several times: its factored curvature is the sum of its uses', not their product.

Broken once and seen red: plain sums of squares added over uses.
"""

import pytest
import torch
from torch import nn

import lotion_fx
from lotion_fx.state import weights_of
from lotion_fx.update import total_of
from tests.runtime.steps import one_step


class Tied(nn.Module):
    """The decoder is the encoder's transpose."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 16) / 4)

    def forward(self, x):
        return torch.tanh(x @ self.w.T) @ self.w


class Three(Tied):
    """A third use, of the first one's orientation."""

    def forward(self, x):
        h = super().forward(x)
        return torch.tanh(0.1 * h @ self.w.T)


class Loop(Tied):
    """A contracting loop: gradients shrink as inputs grow, from use to use."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16) / 8)

    def forward(self, x):
        for _ in range(6):
            x = torch.tanh(x @ self.w.T)
        return x


class Convolutions(nn.Module):
    """A transposed convolution with the first one's kernel."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4, 3, 3) / 6)

    def forward(self, x):
        h = torch.tanh(nn.functional.conv2d(x.view(-1, 4, 2, 2), self.w, padding=1))
        return nn.functional.conv_transpose2d(h, self.w, padding=1).flatten(1)


@pytest.mark.parametrize("make", [Tied, Three, Loop, Convolutions])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_sum_is_that_of_the_full_curvature(make, scale):
    """To some tenths, as a product of sums over positions is one of products; it was 1e2 to 1e5 times that."""
    totals = {}
    for curvature in ("full", "factored"):
        torch.manual_seed(0)
        model = lotion_fx.transform(make(), "int4", inner="aot_eager", curvature=curvature, calibrate=False)
        optimizer, x = torch.optim.SGD(model.parameters(), 0.0), torch.randn(256, 16)
        one_step(model, optimizer, lambda m, x=x: scale * (m(x) - 1).square().mean())
        (weight,) = weights_of(model)
        assert lotion_fx.report(model).rows[0].estimator == "analytic"
        totals[curvature] = float(total_of(weight, weight.master))
    assert totals["factored"] == pytest.approx(totals["full"], rel=0.4)


def test_micro_batches_add_up():
    totals = []
    for cut in (1, 4):
        torch.manual_seed(0)
        model = lotion_fx.transform(Tied(), "int4", inner="aot_eager", calibrate=False)
        optimizer, x = torch.optim.SGD(model.parameters(), 0.0), torch.randn(512, 16)
        for part in x.chunk(cut):
            ((model(part) - 1).square().mean() / cut).backward()
        optimizer.step()
        (weight,) = weights_of(model)
        totals.append(float(total_of(weight, weight.master)))
    assert totals[0] == pytest.approx(totals[1], rel=0.1)
