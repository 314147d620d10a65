"""One rank of tests/test_distributed.py, and the single process that it is compared with."""

from __future__ import annotations

import contextlib
import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lotion_fx
from lotion_fx import backend
from lotion_fx.objective import term_of
from lotion_fx.state import weights_of

VOCAB, WIDTH, STEPS, BATCH, LENGTH = 48, 32, 3, 8, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 80), nn.Linear(80, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class LM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make() -> LM:
    torch.manual_seed(0)
    model = LM()
    with torch.no_grad():  # the largest weight lies in the last rank's rows, so a local absmax would show
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[-1].mul_(5)
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    made = torch.randint(0, VOCAB, (2, BATCH, LENGTH), generator=torch.Generator().manual_seed(step))
    return made[0], made[1]


def train(model: nn.Module, rank: int = 0, world: int = 1, accumulate: int = 1) -> None:
    """Adam steps on this rank's part of the global batches; the loss is the mean over the global batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    share = BATCH // world // accumulate
    for step in range(STEPS):
        ids, labels = batch(step)
        optimizer.zero_grad()
        for micro in range(accumulate):
            start = (rank * accumulate + micro) * share
            part, last = slice(start, start + share), micro == accumulate - 1
            with contextlib.nullcontext() if last or world == 1 else _no_sync(model):
                loss = F.cross_entropy(model(ids[part]).flatten(0, 1), labels[part].flatten()) / accumulate
                loss.backward()
        optimizer.step()


@contextlib.contextmanager
def _no_sync(model: nn.Module) -> Any:
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def result(model: nn.Module) -> dict[str, Any]:
    """Parameters, curvature state and how it was made, with plain names."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    parameters = {name: whole(p) for name, p in inner.named_parameters()}
    rows = lotion_fx.report(inner).rows
    return {
        "parameters": {name.replace("_orig_mod.", ""): value for name, value in parameters.items()},
        "state": {w.name.removeprefix("module."): w.ema.clone() for w in weights_of(inner) if w.ema is not None},
        "estimator": {row.name: row.estimator for row in rows if row.format},
        "term": {row.name: row.term for row in rows if row.term is not None},
    }


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def single(fmt: str = "nvfp4", accumulate: int = 1, regions: bool = False, **options: Any) -> dict[str, Any]:
    """One process, the global batch."""
    model = make()
    lotion_fx.transform(model, fmt, regions=list(model.blocks) if regions else None, **options)
    train(model, accumulate=accumulate)
    return result(model)


def ddp(
    rank: int, world: int, fmt: str, inner: str, accumulate: int, outside: bool, bucket: float, curvature: str
) -> dict[str, Any]:
    model: nn.Module = make()
    if bucket < 1:
        dist._DEFAULT_FIRST_BUCKET_BYTES = int(bucket * 2**20)  # DDP's graph splitter wants the first the smallest
    options = {"inner": inner, "curvature": curvature}
    if not outside:
        lotion_fx.transform(model, fmt, **options)
    model = DistributedDataParallel(model, bucket_cap_mb=bucket)
    if outside:
        lotion_fx.transform(model, fmt, **options)
    before = backend.compiles[inner]
    train(model, rank, world, accumulate)
    return result(model) | {"graphs": backend.compiles[inner] - before}


def fsdp(rank: int, world: int, fmt: str, inner: str, accumulate: int, before: bool, curvature: str) -> dict[str, Any]:
    model = make()

    def transform() -> None:
        lotion_fx.transform(model, fmt, inner=inner, curvature=curvature, regions=list(model.blocks))

    if before:
        transform()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    if not before:
        transform()
    train(model, rank, world, accumulate)
    return result(model)


def main() -> None:
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for index, (kind, options) in enumerate(torch.load(folder / "jobs.pt")):
        torch._dynamo.reset()
        found = {"ddp": ddp, "fsdp": fsdp}[kind](rank, world, **copy.deepcopy(options))
        torch.save(found, folder / f"{index}.{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
