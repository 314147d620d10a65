"""Recurrences: layers that Dynamo skips, cells in loops, one weight at every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from zoo_entry import Inputs, normal, whole


class Recurrent(nn.Module):
    """A recurrent layer and a head on its last state."""

    layer: nn.RNNBase

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class LSTM(Recurrent):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(16, 24, batch_first=True)


class BidirectionalLSTM(Recurrent):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(16, 12, num_layers=2, bidirectional=True, batch_first=True)


class ProjectedLSTM(Recurrent):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(16, 32, proj_size=24, batch_first=True)


class GRU(Recurrent):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(16, 24, batch_first=True)


class ElmanRNN(Recurrent):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.RNN(16, 24, nonlinearity="relu", batch_first=True)


class PackedLSTM(nn.Module):
    """Sequences of different lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(30, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.table(ids), torch.tensor([6, 5, 3]), batch_first=True)
        return self.head(pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0])


class LSTMCellLoop(nn.Module):
    """A cell called in a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 16)
        for step in x.unbind(1):
            h, c = self.cell(step, (h, c))
        return self.head(h)


class OwnGRU(nn.Module):
    """A recurrence written with matrices of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Parameter(torch.randn(16, 48) / 4), nn.Parameter(torch.randn(16, 48) / 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 16)
        for step in x.unbind(1):
            a, b = step @ self.w, h @ self.u
            z, r = ((a + b)[:, i * 16 : i * 16 + 16].sigmoid() for i in range(2))
            h = (1 - z) * h + z * (a[:, 32:] + r * b[:, 32:]).tanh()
        return h


class DeepEquilibrium(nn.Module):
    """One weight used at every iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.inject = nn.Linear(16, 16, bias=False), nn.Linear(20, 16)

    def forward(self, x: Tensor) -> Tensor:
        z, injected = x.new_zeros(len(x), 16), self.inject(x)
        for _ in range(4):
            z = torch.tanh(self.mix(z) + injected)
        return z


class NeuralODE(nn.Module):
    """Runge-Kutta steps of a small field."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + 0.1 * self.field(x + 0.05 * self.field(x))
        return x


MODELS: dict[type[nn.Module], Inputs] = {
    **dict.fromkeys((LSTM, BidirectionalLSTM, ProjectedLSTM, GRU, ElmanRNN, LSTMCellLoop, OwnGRU), normal((3, 6, 16))),
    PackedLSTM: whole(30, (3, 6)),
    DeepEquilibrium: normal((8, 20)),
    NeuralODE: normal((8, 8)),
}
