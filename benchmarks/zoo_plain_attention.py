"""Attention and other mixing of sequences: transformers, positions, caches, state spaces, experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_entry import Inputs, named, normal, whole

D, HEADS = 16, 2


def heads(x: Tensor) -> Tensor:
    """``[batch, length, width]`` as ``[batch, heads, length, width / heads]``."""
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention; subclasses say how scores are made of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT / 8**0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        return self.out(joined(self.scores(q, k).softmax(-1) @ v))


class FusedAttention(Attention):
    """By torch's own function, causal."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        return self.out(joined(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class RelativeTable(Attention):
    """Swin's: a table of biases, looked up by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(19, HEADS) / 10)
        self.distances: Tensor
        self.register_buffer("distances", torch.arange(10)[:, None] - torch.arange(10) + 9)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) + self.table[self.distances].permute(2, 0, 1)


class RelativeMask(RelativeTable):
    """The same table, passed by keyword as an attention mask."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        bias = self.table[self.distances].permute(2, 0, 1)[None]
        return self.out(joined(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


class RelativeKeys(Attention):
    """Shaw's: embeddings of distances that queries are multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(19, D // HEADS) / 4)
        self.distances: Tensor
        self.register_buffer("distances", torch.arange(10)[:, None] - torch.arange(10) + 9)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) + torch.einsum("bhld,lrd->bhlr", q, self.positions[self.distances])


class Alibi(Attention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        return super().scores(q, k) - (at[:, None] - at).abs() * torch.tensor([0.5, 0.25])[:, None, None]


class Rotary(Attention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        angle = torch.arange(q.shape[2])[:, None] * 10.0 ** -torch.arange(4)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        q, k = (x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin for x in (q, k))
        return super().scores(q, k)


class LinearAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        q, k = F.relu(q) + 0.1, F.relu(k) + 0.1
        return self.out((q @ (k.mT @ v) / (q @ k.sum(2)[..., None])).transpose(1, 2).reshape(x.shape))


class GroupedQueries(nn.Module):
    """Fewer keys than queries; keys and values repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, D // 2), nn.Linear(D, D // 2)

    def forward(self, x: Tensor) -> Tensor:
        k, v = (layer(x).view(*x.shape[:2], 1, 8).transpose(1, 2).expand(-1, 2, -1, -1) for layer in (self.k, self.v))
        return joined(F.scaled_dot_product_attention(heads(self.q(x)), k, v))


class LatentAttention(nn.Module):
    """DeepSeek's: keys and values through a narrow code, and the query's weight folded into the code's."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.code, self.up = nn.Linear(D, D), nn.Linear(D, 8), nn.Parameter(torch.randn(HEADS, 8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        code, q = self.code(x), heads(self.q(x))
        folded = torch.einsum("bhld,hcd->bhlc", q, self.up)
        weights = torch.einsum("bhlc,bmc->bhlm", folded, code).softmax(-1)
        return joined(torch.einsum("bhlm,bmc,hcd->bhld", weights, code, self.up))


class KVCache(nn.Module):
    """Two calls in one, the second with the first's keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(D, D), nn.Linear(D, 2 * D)

    def attend(self, x: Tensor, cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        k, v = (heads(part) for part in self.kv(x).chunk(2, -1))
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        return joined(F.scaled_dot_product_attention(heads(self.q(x)), k, v)), (k, v)

    def forward(self, x: Tensor) -> Tensor:
        first, cache = self.attend(x[:, :5], None)
        return torch.cat([first, self.attend(x[:, 5:], cache)[0]], 1)


class Multihead(nn.Module):
    """torch's own module: queries, keys and values from one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(D, HEADS, batch_first=True), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


class MultiheadOthers(nn.Module):
    """The same with keys and values of other widths, and weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, HEADS, kdim=24, vdim=20, add_bias_kv=True, batch_first=True)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, weights = self.attention(x, key, value)
        return out, weights


class EncoderLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, HEADS, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class WholeTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(D, HEADS, 1, 1, 32, dropout=0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.transformer(source, target, tgt_mask=nn.Transformer.generate_square_subsequent_mask(6))


class Perceiver(nn.Module):
    """Latent queries that are parameters, attending to data."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.q, self.kv = nn.Parameter(torch.randn(4, D)), nn.Linear(D, D), nn.Linear(D, 2 * D)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, -1)
        return (self.q(self.latents) @ k.mT / 4).softmax(-1) @ v


class Hopfield(nn.Module):
    """Stored patterns that are retrieved by softmax: one parameter, met twice."""

    def __init__(self) -> None:
        super().__init__()
        self.patterns = nn.Parameter(torch.randn(12, D))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = (x @ self.patterns.T / 4).softmax(-1) @ self.patterns
        return x


class ClassToken(nn.Module):
    """A vision transformer in small: patches, a class token, a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.block, self.head = nn.Conv2d(3, D, 4, 4), Attention(), nn.Linear(D, 5)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, D)), nn.Parameter(torch.randn(1, 17, D) / 50)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.positions
        return self.head((h + self.block(h))[:, 0])


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor
    loss: Tensor | None = None


class LanguageModel(nn.Module):
    """Keywords only in, a dataclass out; the head is tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.block, self.norm = nn.Embedding(40, D), FusedAttention(), nn.LayerNorm(D)
        self.head = nn.Linear(D, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, *, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        h = self.table(input_ids)
        h = self.norm(h + self.block(h))
        logits = self.head(h)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Output(logits, h, loss)


class SelectiveScan(nn.Module):
    """Mamba's in small: a depthwise convolution, input-dependent steps, a scan in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(D, 2 * D, bias=False), nn.Linear(D, D, bias=False)
        self.conv, self.parameters_of, self.step = nn.Conv1d(D, D, 3, groups=D), nn.Linear(D, 10), nn.Linear(2, D)
        self.A_log, self.D = nn.Parameter(torch.arange(1.0, 5).log().repeat(D, 1)), nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.inp(x).chunk(2, -1)
        x = F.silu(self.conv(F.pad(x.transpose(1, 2), (2, 0)))).transpose(1, 2)
        low, b, c = self.parameters_of(x).split([2, 4, 4], -1)
        step, state, outs = F.softplus(self.step(low)), x.new_zeros(len(x), D, 4), []
        for t in range(x.shape[1]):
            decay = torch.exp(-step[:, t, :, None] * self.A_log.exp())
            state = decay * state + (step[:, t] * x[:, t])[..., None] * b[:, t, None]
            outs.append((state * c[:, t, None]).sum(-1))
        return self.out((torch.stack(outs, 1) + x * self.D) * F.silu(gate))


class GatedRecurrence(nn.Module):
    """RWKV's shifted mixing, with vectors between the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.rand(1, 1, D))
        self.key, self.value, self.gate = (nn.Linear(D, D, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        shifted = F.pad(x, (0, 0, 1, -1))
        mixed = x * self.mix + shifted * (1 - self.mix)
        return self.gate(x).sigmoid() * self.value(self.key(mixed).relu().square())


class LoopedExperts(nn.Module):
    """Each expert a module, run on the tokens that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 3, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 24), nn.SiLU(), nn.Linear(24, D)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        chosen, out = weights.argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            at = (chosen == i)[:, None]
            out = out + torch.where(at, expert(x) * weights[:, i, None], 0.0)
        return out


class IndexedExperts(LoopedExperts):
    """The same on gathered rows, whose number no shape tells."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = torch.where(weights.argmax(-1) == i)[0]
            out = out.index_add(0, rows, expert(x[rows]) * weights[rows, i, None])
        return out


class StackedExperts(nn.Module):
    """All experts in one parameter, every token through each, by bmm."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.up = nn.Linear(D, 3, bias=False), nn.Parameter(torch.randn(3, D, 24) / 4)
        self.down = nn.Parameter(torch.randn(3, 24, D) / 5)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.bmm(torch.bmm(x.expand(3, -1, -1), self.up).relu(), self.down)
        return torch.einsum("te,etd->td", self.router(x).softmax(-1), out)


class GatheredExperts(StackedExperts):
    """The chosen expert's matrices gathered for each token."""

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        h = torch.bmm(x[:, None], self.up[chosen]).relu()
        return torch.bmm(h, self.down[chosen])[:, 0] * weight[:, None]


class GroupedExperts(StackedExperts):
    """Tokens sorted by expert, then one grouped product."""

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        ends = torch.bincount(chosen, minlength=3).cumsum(0).to(torch.int32)
        h = torch._grouped_mm(x[order].bfloat16(), self.up.bfloat16(), offs=ends).relu()
        h = torch._grouped_mm(h, self.down.bfloat16(), offs=ends).float()
        return h[order.argsort()] * weight[:, None]


_SEQUENCE = normal((2, 10, D))
_TOKENS = normal((16, D))

MODELS: dict[type[nn.Module], Inputs] = {
    **dict.fromkeys((Attention, FusedAttention, RelativeTable, RelativeMask, RelativeKeys, Alibi, Rotary), _SEQUENCE),
    **dict.fromkeys((LinearAttention, GroupedQueries, LatentAttention, KVCache, Multihead), _SEQUENCE),
    MultiheadOthers: normal((2, 5, D), (2, 7, 24), (2, 7, 20)),
    EncoderLayers: _SEQUENCE,
    WholeTransformer: normal((2, 8, D), (2, 6, D)),
    Perceiver: _SEQUENCE,
    Hopfield: _TOKENS,
    ClassToken: normal((2, 3, 16, 16)),
    LanguageModel: named(input_ids=whole(40, (2, 8)), labels=whole(40, (2, 8))),
    SelectiveScan: normal((2, 5, D)),
    GatedRecurrence: _SEQUENCE,
    **dict.fromkeys((LoopedExperts, IndexedExperts, StackedExperts, GatheredExperts, GroupedExperts), _TOKENS),
}
