"""One rank of tests/runtime/test_distributed.py, and the single process that it is compared with."""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lotion_fx
from lotion_fx.compiling import compiles
from lotion_fx.passes.attach.part import Part
from lotion_fx.passes.attach.probe import Layout
from lotion_fx.state import Weight, weights_of
from lotion_fx.update import dense
from tests.models import counted

VOCAB, WIDTH, STEPS, BATCH, LENGTH = 48, 32, 3, 8, 6
FIRST_BUCKET = dist._DEFAULT_FIRST_BUCKET_BYTES


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 80), nn.Linear(80, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class OddBlock(nn.Module):
    """Rows that two ranks cannot share evenly, one row that only the first rank holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 33), nn.Linear(33, WIDTH)
        self.gate = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x))) * self.gate(x).sigmoid()


class FlippedBlock(nn.Module):
    """Weights [in, out], whose blocks run along the dimension that is sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(WIDTH, 40) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(40, WIDTH) / 40**0.5)  # 20 rows a rank: no multiple of a block

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(x @ self.up) @ self.down


KINDS = {"even": Block, "odd": OddBlock, "flipped": FlippedBlock}


class LM(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(KINDS[kind]() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make(kind: str = "even") -> LM:
    torch.manual_seed(0)
    model = LM(kind)
    with torch.no_grad():  # the largest weight lies in the last rank's rows, so that a local absmax would show
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[-1].mul_(5)
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    made = torch.randint(0, VOCAB, (2, BATCH, LENGTH), generator=torch.Generator().manual_seed(step))
    return made[0], made[1]


def train(model: nn.Module, rank: int = 0, world: int = 1, accumulate: int = 1, loss: str = "mean") -> None:
    """Momentum steps on this rank's part of the global batches.

    Args:
        accumulate: micro-batches a step.
        loss: the ``"mean"`` over the global batch; or with ragged labels, ignored ones most on the last ranks, the mean
            over the ``"global count"`` of labels, or the ``"mean of means"`` over each micro-batch's own.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    share = BATCH // world // accumulate
    for step in range(STEPS):
        ids, labels = batch(step)
        if loss != "mean":
            labels = torch.where(torch.arange(BATCH)[:, None] + torch.arange(LENGTH) < 9, labels, -100)
        count = (labels != -100).sum()
        optimizer.zero_grad()
        for micro in range(accumulate):
            start = (rank * accumulate + micro) * share
            part, last = slice(start, start + share), micro == accumulate - 1
            with contextlib.nullcontext() if last or world == 1 else no_sync(model):
                logits, wanted = model(ids[part]).flatten(0, 1), labels[part].flatten()
                if loss == "global count":
                    (F.cross_entropy(logits, wanted, reduction="sum") * world / count).backward()
                else:
                    (F.cross_entropy(logits, wanted) / accumulate).backward()
        optimizer.step()


@contextlib.contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Gradients stay on their rank until the last micro-batch."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def result(model: nn.Module) -> dict[str, Any]:
    """Parameters, curvature and evaluation, with the names of the plain model."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    weights = {weight.name.removeprefix("module."): weight for weight in weights_of(inner)}
    learned = {name: weight for name, weight in weights.items() if weight.curvature.ema is not None}
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    found = {
        "parameters": {name: whole(p) for name, p in inner.named_parameters()},
        "state": {name: weight.curvature.ema.clone() for name, weight in learned.items()},
        "estimator": {row.name: row.estimator for row in lotion_fx.report(inner).rows if row.format},
    }
    if not (sharded and any(weight.smoothing.settings.curvature == "fisher" for weight in learned.values())):
        found["curvature"] = {n: dense(w.curvature.ema, Part.whole(_layout(w))).clone() for n, w in learned.items()}
    model.eval()
    with torch.no_grad():
        found["logits"] = model(batch(0)[0]).clone()
    return found


def _layout(weight: Weight) -> Layout:
    fisher = weight.smoothing.settings.curvature == "fisher"
    return Layout("full", weight.shape, 1, weight.shape[0]) if fisher else weight.layout


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def regions_of(model: LM, how: str | None) -> list[nn.Module] | str | None:
    blocks = [*model.blocks]
    return {None: None, "blocks": blocks, "blocks and head": [*blocks, model.head], "found": "blocks"}[how]


def single(
    kind: str = "even",
    regions: str | None = None,
    fmt: str = "nvfp4",
    loss: str = "mean",
    parts: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """One process, the global batch at once, or in parts."""
    model = make(kind)
    counted(model, fmt, regions=regions_of(model, regions), **options)
    train(model, accumulate=parts, loss=loss)
    return result(model)


def ddp(
    rank: int,
    world: int,
    outside: bool,
    bucket: float,
    accumulate: int,
    kind: str,
    fmt: str,
    loss: str,
    **options: Any,
) -> dict[str, Any]:
    """DistributedDataParallel; ``outside`` transforms what it returns, ``bucket`` is its size in MiB."""
    model: nn.Module = make(kind)
    # DDP's graph splitter wants the first bucket to be the smallest.
    dist._DEFAULT_FIRST_BUCKET_BYTES = min(int(bucket * 2**20), FIRST_BUCKET)
    if not outside:
        counted(model, fmt, **options)
    model = DistributedDataParallel(model, bucket_cap_mb=bucket)
    if outside:
        counted(model, fmt, **options)
    before = compiles[options["inner"]]
    train(model, rank, world, accumulate, loss)
    return {"graphs": compiles[options["inner"]] - before} | result(model)


def by_hand(rank: int, world: int, fmt: str, told: bool, after: str = "mean", **options: Any) -> dict[str, Any]:
    """A loop that averages gradients itself.

    Args:
        told: whether `transform` is given the group.
        after: what is done to gradients between backward and step, ``"mean"`` over ranks, ``"scaled"`` or nothing.
    """
    model = make()
    counted(model, fmt, process_group=dist.group.WORLD if told else None, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    share = BATCH // world
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            ids, labels = (part[rank * share : (rank + 1) * share] for part in batch(step))
            optimizer.zero_grad()
            F.cross_entropy(model(ids).flatten(0, 1), labels.flatten()).backward()
            for parameter in model.parameters():
                if after == "mean":
                    dist.all_reduce(parameter.grad)
                parameter.grad.div_(1 if after == "none" else world)
            optimizer.step()
    return result(model) | {"warned": [str(w.message) for w in caught if "process_group=" in str(w.message)]}


def fsdp(
    rank: int,
    world: int,
    before: bool,
    accumulate: int,
    kind: str,
    fmt: str,
    regions: str | None,
    loss: str,
    **options: Any,
) -> dict[str, Any]:
    """FSDP2, each block and the root sharded; ``before`` transforms the model first."""
    model = make(kind)
    if before:
        counted(model, fmt, regions=regions_of(model, regions), **options)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    if not before:
        counted(model, fmt, regions=regions_of(model, regions), **options)
    train(model, rank, world, accumulate, loss)
    return result(model)


def resumed(rank: int, world: int, folder: str, load: bool, curvature: str, momentum: bool) -> dict[str, Any]:
    """Two steps and a checkpoint by torch.distributed.checkpoint; or two more from there, on any number of ranks."""
    model = make()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    regions = regions_of(model, "blocks and head")
    counted(model, "nvfp4", regions=regions, inner="aot_eager", curvature=curvature)
    kind = torch.optim.SGD if momentum else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=0.1 if momentum else 3e-3, **({"momentum": 0.9} if momentum else {}))
    share = BATCH // world
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights, moments = get_state_dict(model, optimizer)
        if load:
            dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
            lotion_fx.load_state_dict(model, torch.load(f"{folder}/lotion_fx.pt"))
        for step in range(2 * load, 2 + 2 * load):
            ids, labels = (part[rank * share : (rank + 1) * share] for part in batch(step))
            optimizer.zero_grad()
            F.cross_entropy(model(ids).flatten(0, 1), labels.flatten()).backward()
            optimizer.step()
    if not load:
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
        if rank == 0:
            torch.save(lotion_fx.state_dict(model), f"{folder}/lotion_fx.pt")
    ours = [str(warning.message) for warning in caught if "term" in str(warning.message)]
    return {"parameters": {name: whole(p) for name, p in model.named_parameters()}, "warned": ours}


class WithLoss(nn.Module):
    """A model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(ids).flatten(0, 1), labels.flatten())


def expected(rank: int, world: int, fmt: str, inner: str) -> dict[str, Any]:
    """The loss in the graph, its head in a moment stream; one process where ``world`` is 1."""
    inside = counted(WithLoss(), fmt, loss_fn="model", inner=inner)
    model = DistributedDataParallel(inside) if world > 1 else inside
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(*(part[rank::world] for part in batch(step))).backward()
        optimizer.step()
    return {
        "parameters": {name: whole(p) for name, p in inside.named_parameters()},
        "estimator": {row.name: row.estimator for row in lotion_fx.report(inside).rows if row.format},
    }


def main() -> None:
    """``distributed_worker FOLDER RANK WORLD``: runs FOLDER/jobs.pt and leaves FOLDER/NAME.RANK.pt for each job."""
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for name, (wrapper, options) in torch.load(folder / "jobs.pt").items():
        torch._dynamo.reset()
        try:
            module, _, function = wrapper.rpartition(".")
            here = sys.modules[__name__]
            found = getattr(importlib.import_module(module) if module else here, function)(rank, world, **options)
        except Exception:
            found = {"error": traceback.format_exc()}
        torch.save(found, folder / f"{name}.{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
