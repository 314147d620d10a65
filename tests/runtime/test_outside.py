"""What no graph sees: T counted at the model's output, and weights that run in Python."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx
from lotion_fx.numerics import rounding
from tests.models import LM, MLP, ids

LABELS = torch.tensor([1, -100, 3, 0, 2, -100, 6, 4, 5])


def terms_of(model: nn.Module, loss: Tensor) -> float:
    """T of one step."""
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    return lotion_fx.state_dict(model)["phases"][0]["terms"].item()


class Scores(nn.Module):
    """One number a sample, [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).squeeze(-1)


class MakesItsLoss(LM):
    """The loss, a number without rows, beside the logits."""

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        logits = super().forward(ids)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()), "logits": logits}


@pytest.mark.filterwarnings("ignore:no compiled graph contains")
def test_the_output_s_rows_are_the_loss_terms():
    """Rows, not their elements; those with a gradient, where the output has one."""
    model = lotion_fx.transform(MLP(), "int4", inner="eager")
    assert terms_of(model, F.cross_entropy(model(torch.randn(9, 20)), LABELS)) == 7
    assert terms_of(model, F.cross_entropy(model(torch.randn(3, 3, 20)).flatten(0, 1), LABELS)) == 7
    scores = lotion_fx.transform(Scores(), "int4", inner="eager")
    assert terms_of(scores, (scores(torch.randn(9, 20)) * (LABELS >= 0)).sum()) == 7
    model = lotion_fx.transform(MakesItsLoss(), "int4", inner="eager")
    assert terms_of(model, model(ids(8, 5))["loss"]) == 40


class Recurrent(nn.Module):
    """A layer that Dynamo skips, with the frame that calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def test_a_weight_outside_of_every_graph_is_rounded_while_finishing():
    model, x = Recurrent(), torch.randn(4, 6, 16)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for weight in (plain.lstm.weight_ih_l0, plain.lstm.weight_hh_l0):
            weight.copy_(rounding.rtn(weight, lotion_fx.resolve("int4"), 1))
    lotion_fx.transform(model, "int4", only={"head.weight": None}, inner="aot_eager")
    lotion_fx.finish(model)
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model.eval()(x), plain(x))
