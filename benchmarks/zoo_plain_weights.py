"""Weights made before they meet data: adapters, ties, parametrizations, masks, products of parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from zoo_entry import Inputs, normal, whole


class LoRA(nn.Module):
    """A trained layer with a correction of low rank beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.b(self.a(x))


class FrozenLoRA(LoRA):
    def __init__(self) -> None:
        super().__init__()
        self.base.requires_grad_(False)


class MergedLoRA(LoRA):
    """The correction added to the weight before the product."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + 2 * self.b.weight @ self.a.weight, self.base.bias)


class DoRA(LoRA):
    """The merged weight, its rows to a learned length."""

    def __init__(self) -> None:
        super().__init__()
        self.length = nn.Parameter(torch.ones(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.b.weight @ self.a.weight
        return F.linear(x, self.length * weight / weight.norm(dim=1, keepdim=True).detach(), self.base.bias)


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.table(ids)).relu())


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's transpose: one weight, contracted along both dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(20, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encoder(x).tanh(), self.encoder.weight.T)


class TiedLayers(nn.Module):
    """One module at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class WeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.weight_norm(nn.Linear(20, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WeightNormConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.weight_norm(nn.Conv1d(16, 16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class SpectralNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.spectral_norm(nn.Linear(20, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class SpectralNormConv(nn.Module):
    """A discriminator's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            parametrizations.spectral_norm(nn.Conv2d(3, 16, 3)), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(256, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Orthogonal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.orthogonal(nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class _Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


class Symmetric(nn.Module):
    """A parametrization of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        parametrize.register_parametrization(self.layer, "weight", _Symmetric())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Pruned(nn.Module):
    """By torch's own: ``weight_orig`` times ``weight_mask``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = prune.l1_unstructured(nn.Linear(20, 16), "weight", 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Masked(nn.Module):
    """An autoregressive mask on the weight, as MADE's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(16, 16).tril())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight * self.mask, self.layer.bias)


class Standardized(nn.Conv2d):
    """Weight standardization, as BiT's."""

    def __init__(self) -> None:
        super().__init__(4, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        mean, deviation = w.mean((1, 2, 3), keepdim=True), w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (w - mean) / (deviation + 1e-5), self.bias)


class Modulated(nn.Module):
    """StyleGAN2's: the style scales the kernel, which is then normalized, one for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(8, 4, 3, 3) / 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        w = self.weight * self.style(style)[:, None, :, None, None]
        w = w * w.square().sum((2, 3, 4), keepdim=True).add(1e-6).rsqrt()
        b, _, h, width = x.shape
        return F.conv2d(x.reshape(1, -1, h, width), w.flatten(0, 1), groups=b).view(b, 8, h - 2, width - 2)


class Hypernetwork(nn.Module):
    """A net makes another's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.make = nn.Parameter(torch.randn(8)), nn.Linear(8, 16 * 20)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.make(self.code).view(16, 20))


class FilteredByData(nn.Module):
    """A net makes a weight for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(20, 20 * 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x[:, None], self.make(x).view(-1, 20, 4))[:, 0]


class FusedQKV(nn.Module):
    """Three weights beside each other, one product."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, torch.cat([self.q.weight, self.k.weight, self.v.weight])).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


class Averaged(nn.Module):
    """A soup: the weights of several members stacked, and averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.Linear(20, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.stack([each.weight for each in self.members]).mean(0))


class Kronecker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 4) / 2), nn.Parameter(torch.randn(5, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.kron(self.a, self.b).T


class TensorTrain(nn.Module):
    """A weight of 16 x 16 in two cores, contracted before data comes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 4, 3) / 2), nn.Parameter(torch.randn(3, 4, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.einsum("iar,rbj->iabj", self.a, self.b).permute(0, 2, 1, 3).reshape(16, 16)


class Exponential(nn.Module):
    """A rotation: the exponential of an antisymmetric matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.linalg.matrix_exp(self.weight.triu(1) - self.weight.triu(1).mT)


_ROWS, _SIXTEEN = normal((8, 20)), normal((8, 16))

MODELS: dict[type[nn.Module], Inputs] = {
    **dict.fromkeys((LoRA, FrozenLoRA, MergedLoRA, DoRA), normal((8, 32))),
    TiedHead: whole(40, (2, 6)),
    TiedAutoencoder: _ROWS,
    **dict.fromkeys((WeightNorm, SpectralNorm, Pruned, Hypernetwork, FilteredByData, Averaged), _ROWS),
    WeightNormConv: normal((2, 16, 9)),
    SpectralNormConv: normal((2, 3, 6, 6)),
    **dict.fromkeys((TiedLayers, Orthogonal, Symmetric, Masked, Exponential, Kronecker, TensorTrain), _SIXTEEN),
    Standardized: normal((2, 4, 6, 6)),
    Modulated: normal((2, 4, 6, 6), (2, 6)),
    FusedQKV: normal((2, 5, 16)),
}
