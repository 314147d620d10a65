"""The model and the jobs of tests/runtime/test_tensor_parallel.py, for one rank or for one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import lotion_fx
from tests.models import counted
from tests.runtime.distributed_worker import BATCH, STEPS, VOCAB, batch, regions_of, result

WIDTH, HEADS, HIDDEN = 64, 4, 128


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(WIDTH), Attention()
        self.norm2, self.mlp = nn.RMSNorm(WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Llama(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make(depth: int = 1) -> Llama:
    torch.manual_seed(0)
    model = Llama(depth)
    with torch.no_grad():  # the largest weight lies in one rank's rows, so that a local absmax would show
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[-1].mul_(3)
    return model


def train(model: nn.Module, optimizer: str, rank: int = 0, world: int = 1) -> None:
    """Steps on the ``rank``-th of ``world`` parts of the global batches."""
    made = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, lr=3e-3)}
    steps, share = made[optimizer](model.parameters()), BATCH // world
    for step in range(STEPS):
        ids, labels = batch(step)
        part = slice(rank * share, (rank + 1) * share)
        steps.zero_grad()
        F.cross_entropy(model(ids[part]).flatten(0, 1), labels[part].flatten()).backward()
        steps.step()


def single(fmt: str, optimizer: str, how: str | None = None, **options: Any) -> dict[str, Any]:
    model = make(1 if how is None else 2)
    counted(model, fmt, regions=regions_of(model, how), **options)
    torch.manual_seed(1)  # of the roundings
    train(model, optimizer)
    return result(model)


def plan_of(model: Llama, sequence: bool, head: bool) -> dict[str, Any]:
    """Each block's attention and MLP by columns then rows, as `parallelize_module` takes it."""
    whole, cut = Replicate(), Shard(1)
    plan: dict[str, Any] = {}
    for block in (f"blocks.{i}" for i in range(len(model.blocks))):
        columns = ColwiseParallel(input_layouts=whole)
        rows = RowwiseParallel(output_layouts=cut if sequence else whole)
        for name in ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up"):
            plan[f"{block}.{name}"] = columns
        plan |= {f"{block}.attention.o": rows, f"{block}.mlp.down": rows}
        if sequence:
            plan |= {f"{block}.norm1": SequenceParallel(), f"{block}.norm2": SequenceParallel()}
            gathered = PrepareModuleInput(input_layouts=cut, desired_input_layouts=whole)
            plan |= {f"{block}.attention": gathered, f"{block}.mlp": gathered}
    if sequence:
        plan["token"] = RowwiseParallel(input_layouts=whole, output_layouts=cut)
        plan["norm"] = SequenceParallel()
    if head or sequence:
        plan["head"] = ColwiseParallel(input_layouts=cut if sequence else whole, output_layouts=whole)
    return plan


def tensor_parallel(
    rank: int,
    world: int,
    fmt: str,
    optimizer: str,
    sequence: bool = False,
    head: bool = False,
    before: bool = False,
    data: str | None = None,
    how: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`parallelize_module` over all ranks, or over pairs of them and FSDP2 (``data="fsdp"``) over these."""
    model = make(1 if how is None else 2)
    shape, names = ((world,), ("tp",)) if data is None else ((world // 2, 2), ("dp", "tp"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if before:
        counted(model, fmt, regions=regions_of(model, how), **options)
    parallelize_module(model, mesh["tp"], plan_of(model, sequence, head))
    if data == "fsdp":
        for block in model.blocks:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    if not before:
        counted(model, fmt, regions=regions_of(model, how), **options)
    torch.manual_seed(1)
    train(model, optimizer, *((rank // 2, world // 2) if data else (0, 1)))
    return result(model)


def divided_rows(rank: int, world: int) -> dict[str, float]:
    """A model on every rank, and a batch that is one DTensor over them."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("rows",))

    def cut(x: Tensor) -> Tensor:
        return distribute_tensor(x, mesh, [Shard(0)])

    ways = {"graph": ("aot_eager", 1), "graph, two passes": ("aot_eager", 2), "Python": ("eager", 1)}
    return {way: divided(distribute_module(MLP(), mesh), cut, *how) for way, how in ways.items()}


def divided(model: nn.Module, of: Callable[[Tensor], Tensor], inner: str = "aot_eager", passes: int = 1) -> float:
    """T of a step of regression on 8 x 5 rows, in so many backward passes through one output."""
    torch._dynamo.reset()
    counted(model, "int4", inner=inner)
    x = torch.randn(8, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    out = model(of(x))
    loss = F.mse_loss(out.full_tensor() if isinstance(out, DTensor) else out, x) / passes
    for _ in range(passes):
        loss.backward(retain_graph=passes > 1)
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    return float(lotion_fx.state_dict(model)["phases"][0]["terms"])
