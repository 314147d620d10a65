"""What the names in the documents' blocks stand for: ``<!-- setup: NAME -->`` above a block calls a function here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx

Names = dict[str, Any]


def next_token(output: Any, tokens: Tensor) -> Tensor:
    """The cross entropy of each next token, of a Hugging Face model's output."""
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def llama() -> Names:
    """A language model of one layer as transformers has them, a loader of sixteen batches and an optimizer."""
    from lotion_fx.examples import tiny

    model, rows = tiny.llama(), tiny.rows(4)
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), 1e-2),
        "loader": [SimpleNamespace(x=rows, y=rows)] * 16,
        "n": 16,
        "batches": [(rows, rows)],
        "loss_fn": next_token,
        "x": rows,
        "y": rows,
        "batch": {"input_ids": rows, "labels": rows},
    }


def trained_llama() -> Names:
    """The same under INT4 with bfloat16 scales, after a step."""
    names = llama()
    model = lotion_fx.transform(names["model"], "int4/bf16")
    model(**names["batch"]).loss.backward()
    names["optimizer"].step()
    return {**names, "batch": {"input_ids": names["x"]}}


def perceptron() -> Names:
    """Two linear layers, a classifier of 8 classes, and its batches."""
    torch.manual_seed(0)
    batches = [(torch.randn(256, 32), torch.randint(8, (256,))) for _ in range(2)]
    inputs, targets = batches[0]
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    return {
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters(), 1e-2),
        "loss_fn": F.cross_entropy,
        "batches": batches,
        "batch": (inputs, targets),
        "inputs": inputs,
        "targets": targets,
        "n": 10,
    }


def transformed_perceptron() -> Names:
    """The same under NVFP4."""
    names = perceptron()
    lotion_fx.transform(names["model"], "nvfp4")
    return names


class DecoderLayer(nn.Module):
    """An attention's worth of weights, an MLP and a router, by the names that language models give them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.router = nn.Linear(width, width), nn.Linear(width, 2)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.router(x).softmax(-1)[..., :1] * self.mlp(x)


class Decoder(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(DecoderLayer(width), DecoderLayer(width))
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def decoder() -> Names:
    """Two layers with routers, and a batch for them."""
    return {**perceptron(), "model": Decoder(), "DecoderLayer": DecoderLayer}


def formats() -> Names:
    from lotion_fx.numerics.formats import Format, codebook, register_format
    from lotion_fx.numerics.grids import Minifloat

    return {"Format": Format, "codebook": codebook, "register_format": register_format, "Minifloat": Minifloat}


def op_rows() -> Names:
    """All that rows of ops are written with."""
    from lotion_fx.passes import ops

    return dict(vars(ops))
