"""Callables that `lotion-fx` commands are given by name."""

import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx


def alone():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


def classifier():
    model = alone()
    return model, (torch.randn(8, 32), torch.randint(4, (8,))), F.cross_entropy


def of_another_width():
    return alone(), (torch.randn(8, 31), torch.randint(4, (8,))), F.cross_entropy


def of_unknown_labels():
    return alone(), (torch.randn(8, 32), torch.full((8,), 9)), F.cross_entropy


def of_no_number():
    return alone(), (torch.full((8, 32), torch.nan), torch.zeros(8, dtype=torch.long)), F.cross_entropy


def frozen():
    model, batch, loss_fn = classifier()
    return model.requires_grad_(False), batch, loss_fn


def with_a_zero_weight():
    model, batch, loss_fn = classifier()
    torch.nn.init.zeros_(model[0].weight)
    return model, batch, loss_fn


def by_name():
    return alone(), (torch.randn(8, 32), torch.zeros(8, dtype=torch.long)), "cross_entropy"


def raising():
    assert 1 + 1 == 3, "never so"


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 4)

    def forward(self, x, y):
        return F.mse_loss(self.layer(x), y)


def with_its_loss():
    return WithLoss(), {"x": torch.randn(8, 32), "y": torch.randn(8, 4)}


def transformed():
    return lotion_fx.transform(alone(), "int4", inner="aot_eager")


def transformed_classifier():
    model, batch, loss_fn = classifier()
    return lotion_fx.transform(model, "int4", inner="aot_eager"), batch, loss_fn


def number():
    return 3


text = "no callable"
