"""The LOTION paper's two-layer linear network, both layers INT4, by every method.

    f(x) = W2 W1 x,    y = W* x,    x ~ N(0, diag(lambda)),    lambda_i = i ** -1.1

with 256 inputs, 64 hidden units, 16 outputs and a standard normal W*. The model is trained on its population loss
1/2 E|f(x) - y|^2, which depends on x through its covariance only. So it is the mean over any finite batch with that
very covariance, and the smallest one is x_i = sqrt(d lambda_i) e_i, i = 1 .. d: the forward is two `F.linear` on it,
like any network's.

Many pairs of layers have the same product. This freedom is what PTQ leaves unused: of all networks that are right
before rounding, a method has to find one that is right after it.

    python examples/two_layer.py                  # under 4 minutes on 2 cores
    python examples/two_layer.py --quick          # a smoke run
    python examples/two_layer.py --json > rows.json
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lotion_fx.examples import options, testbed


class TwoLayer(nn.Module):
    """Two linear layers and the batch that stands for all inputs; see `testbed.Testbed.build`."""

    def __init__(self, size: int = 256, hidden: int = 64, outputs: int = 16) -> None:
        super().__init__()
        x = torch.diag((size * testbed.spectrum(size)).sqrt())  # [samples, inputs]
        self.register_buffer("x", x)
        self.register_buffer("y", F.linear(x, torch.randn(outputs, size)))
        self.first = nn.Linear(size, hidden, bias=False)
        self.second = nn.Linear(hidden, outputs, bias=False)
        self.scale = outputs / 2
        self.x: Tensor
        self.y: Tensor

    def forward(self) -> tuple[Tensor, Tensor]:
        predicted = self.second(self.first(self.x))
        return F.mse_loss(predicted, self.y), predicted


main = testbed.command(
    testbed.Testbed(
        name="two_layer",
        about="A two-layer linear network (256 - 64 - 16), both layers INT4.",
        build=TwoLayer,
        lrs=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
        steps=600,
    )
)

if __name__ == "__main__":
    options.start(main)
