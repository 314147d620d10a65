"""Networks that people draw as boxes: perceptrons, convolutions, generators, graphs, fields."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_entry import Inputs, normal


class Perceptron(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(20, 33), nn.GELU(), nn.Dropout(0.1), nn.Linear(33, 33), nn.ReLU(), nn.Linear(33, 7))


class Residual(nn.Module):
    """Blocks in a ModuleList, the same class many times."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Highway(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.change, self.gate = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).sigmoid()
        return gate * F.relu(self.change(x)) + (1 - gate) * x


class SwiGLU(nn.Module):
    """Gate and value from one weight, halved by chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(16, 48, bias=False), nn.Linear(24, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class ConvNet(nn.Module):
    """Plain, grouped, depthwise, pointwise, dilated, transposed, transposed and grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16, bias=False)
        self.pointwise = nn.Conv2d(16, 20, 1, stride=2)
        self.up, self.grouped_up = nn.ConvTranspose2d(20, 12, 2, stride=2), nn.ConvTranspose2d(12, 8, 3, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(F.gelu(self.grouped(F.relu(self.norm(self.stem(x))))))
        x = self.grouped_up(F.gelu(self.up(F.gelu(self.pointwise(x)))))
        return self.head(x.mean((2, 3)))


class Conv1dNet(nn.Module):
    """Causal, dilated and pointwise convolutions over a signal, as WaveNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(16, 32, 2, dilation=2**i) for i in range(3))
        self.mix, self.inp = nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(3)), nn.Conv1d(1, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for i, (layer, mix) in enumerate(zip(self.layers, self.mix, strict=True)):
            a, b = layer(F.pad(x, (2**i, 0))).chunk(2, 1)
            x = x + mix(a.tanh() * b.sigmoid())
        return x


class PointwiseConv1d(nn.Module):
    """Queries and keys by grouped pointwise convolutions, then a view of them, as SqueezeBERT's."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Conv1d(32, 32, 1, groups=2), nn.Conv1d(32, 32, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (conv(x).view(2, 4, 8, 12) for conv in (self.q, self.k))
        return q.permute(0, 1, 3, 2) @ k


class Conv3dNet(nn.Sequential):
    def __init__(self) -> None:
        layers = nn.Conv3d(1, 8, 3), nn.ReLU(), nn.Conv3d(8, 8, 2, stride=2), nn.GroupNorm(2, 8)
        super().__init__(*layers, nn.Flatten(), nn.Linear(64, 4))


class UNet(nn.Module):
    """Down, up, and the skipped channels beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.down = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skipped = F.relu(self.inp(x))
        return self.out(torch.cat([skipped, F.relu(self.up(F.relu(self.down(skipped))))], 1))


class Generator(nn.Sequential):
    """Of a GAN: transposed convolutions from a vector."""

    def __init__(self) -> None:
        layers = nn.Linear(8, 64), nn.Unflatten(1, (16, 2, 2)), nn.ConvTranspose2d(16, 8, 4, 2, 1)
        super().__init__(*layers, nn.BatchNorm2d(8), nn.LeakyReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh())


class VariationalAutoencoder(nn.Module):
    """Draws its latent code, and returns three tensors in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(20, 32), nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 20))
        self.mean, self.log_variance = nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.encoder(x).relu()
        mean, log_variance = self.mean(h), self.log_variance(h)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return {"x": self.decoder(code), "mean": mean, "log_variance": log_variance}


class NormalizingFlow(nn.Module):
    """Affine couplings, with the Jacobian's logarithm beside the output."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_jacobian = x.new_zeros(len(x))
        a, b = x.chunk(2, 1)
        for net in self.nets:
            shift, scale = net(a).chunk(2, 1)
            a, b = b * scale.tanh().exp() + shift, a
            log_jacobian = log_jacobian + scale.tanh().sum(1)
        return torch.cat([a, b], 1), log_jacobian


class InvertibleMixing(nn.Module):
    """Glow's: a square weight that data is multiplied with, and its log-determinant."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(16, 16))[0].contiguous())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.weight, torch.linalg.slogdet(self.weight)[1]


class VectorQuantizer(nn.Module):
    """A codebook: nearest codes by distances, and a lookup."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.codes, self.decoder = nn.Linear(20, 8), nn.Parameter(torch.randn(16, 8)), nn.Linear(8, 20)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        code = self.codes[torch.cdist(z, self.codes).argmin(1)]
        return self.decoder(z + (code - z).detach()), (code - z.detach()).square().mean()


class DeepSets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.each, self.all = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.all(self.each(x).sum(1))


class DenseGraphConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        adjacency = adjacency.softmax(-1)
        return adjacency @ self.second((adjacency @ self.first(x)).relu())


class SparseGraphConvolution(nn.Module):
    """A constant sparse adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 4)
        edges = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
        self.edges: Tensor
        self.register_buffer("edges", edges)

    def forward(self, x: Tensor) -> Tensor:
        adjacency = torch.sparse_coo_tensor(self.edges, x.new_ones(6), (6, 6))
        return torch.sparse.mm(adjacency, self.second(torch.sparse.mm(adjacency, self.first(x)).relu()))


class GraphAttention(nn.Module):
    """Messages along edges, gathered by index and added up by scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.score = nn.Linear(16, 16, bias=False), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        source, target = torch.arange(6), torch.arange(6).roll(1)
        v = self.value(x)
        score = self.score(torch.cat([v[source], v[target]], 1)).sigmoid()
        return torch.zeros_like(v).index_add(0, target, score * v[source])


class FourierOperator(nn.Module):
    """FNO: complex weights as pairs of reals, contracted with the lowest frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.project = nn.Linear(1, 8), nn.Linear(8, 1)
        self.weight = nn.Parameter(torch.randn(8, 8, 4, 2) / 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x).transpose(1, 2)
        modes = torch.fft.rfft(h)[..., :4]
        mixed = torch.einsum("bim,iom->bom", modes, torch.view_as_complex(self.weight))
        return self.project((h + torch.fft.irfft(mixed, n=h.shape[-1])).transpose(1, 2))


class RadianceField(nn.Module):
    """NeRF: frequencies of positions, a skip into the middle, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 32), nn.Linear(56, 32)
        self.density, self.color = nn.Linear(32, 1), nn.Sequential(nn.Linear(35, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, position: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position[..., None] * 2.0 ** torch.arange(4)).flatten(1)
        encoded = torch.cat([angles.sin(), angles.cos()], 1)
        h = self.second(torch.cat([self.first(encoded).relu(), encoded], 1)).relu()
        return self.density(h), self.color(torch.cat([h, direction], 1)).sigmoid()


class Siren(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.out = nn.ModuleList([nn.Linear(2, 32), nn.Linear(32, 32)]), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(30 * layer(x))
        return self.out(x)


class MLPMixer(nn.Module):
    """Patches by a strided convolution; mixes tokens through a transposed linear layer, then channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.tokens, self.channels = nn.Conv2d(3, 32, 4, 4), nn.Linear(16, 16), nn.Linear(32, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = h + F.gelu(self.tokens(h.transpose(1, 2))).transpose(1, 2)
        return self.head((h + F.gelu(self.channels(h))).mean(1))


class Siamese(nn.Module):
    """One encoder called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cosine_similarity(self.encoder(x), self.encoder(y))


class EarlyExits(nn.Module):
    """A list of outputs from several depths."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(16, 4) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        outs = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x).relu()
            outs.append(head(x))
        return outs


class WideAndDeep(nn.Module):
    """Bags of embeddings beside dense features."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.deep, self.head = nn.EmbeddingBag(40, 16), nn.Linear(8, 16), nn.Linear(32, 2)

    def forward(self, features: Tensor) -> Tensor:
        ids = (features.abs() * 10).long().clamp(max=39)
        return self.head(torch.cat([self.bag(ids), self.deep(features).relu()], 1))


MODELS: dict[type[nn.Module], Inputs] = {
    Perceptron: normal((8, 20)),
    Residual: normal((8, 16)),
    Highway: normal((8, 16)),
    SwiGLU: normal((2, 5, 16)),
    ConvNet: normal((2, 3, 8, 8)),
    Conv1dNet: normal((2, 1, 20)),
    PointwiseConv1d: normal((2, 32, 12)),
    Conv3dNet: normal((2, 1, 6, 6, 6)),
    UNet: normal((2, 1, 8, 8)),
    Generator: normal((4, 8)),
    VariationalAutoencoder: normal((8, 20)),
    NormalizingFlow: normal((8, 16)),
    InvertibleMixing: normal((8, 16)),
    VectorQuantizer: normal((8, 20)),
    DeepSets: normal((4, 5, 8)),
    DenseGraphConvolution: normal((6, 16), (6, 6)),
    SparseGraphConvolution: normal((6, 16)),
    GraphAttention: normal((6, 16)),
    FourierOperator: normal((2, 16, 1)),
    RadianceField: normal((8, 3), (8, 3)),
    Siren: normal((16, 2)),
    MLPMixer: normal((2, 3, 16, 16)),
    Siamese: normal((4, 20), (4, 20)),
    EarlyExits: normal((8, 16)),
    WideAndDeep: normal((8, 8)),
}
