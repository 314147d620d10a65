"""The LOTION paper's linear regression: 12,000 inputs with a power-law spectrum, INT4 weights, every method.

    y = w* . x,    x ~ N(0, diag(lambda)),    lambda_i = i ** -1.1,    w* ~ N(0, I)

The model is trained on its population loss, 1/2 sum_i lambda_i (w_i - w*_i)^2, the squared error of
``w * sqrt(lambda)``: a stack of products one by one, in which each weight meets its own input. On minibatches the last
inputs, whose variance is 30,000 times smaller than the first's, would drown in sampling noise, and with them what
rounding does.

Each weight stands alone in this loss, so at a given scale rounding to nearest is already the best one can do and a
rounded forward has nothing to add: STE is worse than PTQ here. What is left to learn is the scale, which the largest
weight sets.

Training starts from the target's own law, not from 0. From 0, Adam's learning rate bounds how far a weight can go, so
that the grid would hold one at which PTQ is stopped before its largest weights have grown: a clipping by luck, which
brings it close to LOTION.

    python examples/linear_regression.py                  # under 4 minutes on 2 cores
    python examples/linear_regression.py --quick          # a smoke run
    python examples/linear_regression.py --json > rows.json
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lotion_fx.examples import options, testbed


class LinearRegression(nn.Module):
    """A weight for each input, beside a target of as many standard normal ones; see `testbed.Testbed.build`."""

    def __init__(self, size: int = 12000) -> None:
        super().__init__()
        root = testbed.spectrum(size).sqrt().view(size, 1, 1)
        self.register_buffer("root", root)
        self.register_buffer("wanted", torch.randn(size, 1, 1) * root)
        self.weight = nn.Parameter(torch.randn(size, 1, 1))
        self.scale = size / 2
        self.root: Tensor
        self.wanted: Tensor

    def forward(self) -> tuple[Tensor, Tensor]:
        predicted = torch.bmm(self.root, self.weight)
        return F.mse_loss(predicted, self.wanted), predicted


main = testbed.command(
    testbed.Testbed(
        name="linear_regression",
        about="Linear regression with a power-law spectrum (d = 12000), INT4 weights.",
        build=LinearRegression,
        lrs=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
        steps=1000,
    )
)

if __name__ == "__main__":
    options.start(main)
