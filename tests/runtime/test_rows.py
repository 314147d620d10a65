"""T counted at the model's output, where no joint graph counts it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx
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
