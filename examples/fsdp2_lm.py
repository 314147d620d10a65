"""Trains a decoder-only language model with LOTION under FSDP2, on any number of GPUs, or CPUs with `--tiny`.

    torchrun --nproc-per-node 8 examples/fsdp2_lm.py --size 300M --fmt int4 --steps 20000
    torchrun --nproc-per-node 2 examples/fsdp2_lm.py --tiny --steps 10

The LOTION paper (arXiv 2510.08757) trains models of 150M and 300M parameters; the shapes here are a choice of ours at
these sizes: width 768 or 1024, 12 or 16 layers, heads of 64, SwiGLU of 4 widths, RoPE, RMSNorm.
The text is the Python standard library's source, byte by byte, so most of the vocabulary's parameters are missing: 114M
and 269M are left. Each rank reads its own windows. The same command again resumes from `--folder`.
"""

from __future__ import annotations

import argparse
import math
import os
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import lotion_fx


@dataclass(frozen=True)
class Size:
    """A model's width, depth, window and vocabulary, and each rank's batch."""

    width: int
    depth: int
    length: int = 1024
    batch: int = 16
    vocab: int = 256


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Args:
        steps: of the optimizer.
        lr: the highest; warmed up to over a twentieth of the steps, then down a cosine to a tenth.
        folder: of checkpoints; None keeps none.
        every: steps from one checkpoint to the next.
        accumulate: batches of each rank in a step.
        seed: of the windows' order.
    """

    steps: int
    lr: float
    folder: Path | None = None
    every: int = 1000
    accumulate: int = 1
    seed: int = 0


SIZES = {"150M": Size(768, 12), "300M": Size(1024, 16), "tiny": Size(64, 2, 32, 4)}
HEAD = 64


def rotated(x: Tensor) -> Tensor:
    """RoPE on [batch, heads, length, HEAD]."""
    place = torch.arange(x.shape[-2], device=x.device)[:, None]
    angle = place * 10_000 ** -(torch.arange(0, HEAD, 2, device=x.device) / HEAD)
    a, b, cos, sin = *x.chunk(2, -1), angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    def __init__(self, width: int, recompute: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gated, self.down = nn.Linear(width, 8 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.recompute = recompute

    def inside(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        gate, up = self.gated(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inside, x, use_reentrant=False) if self.recompute else self.inside(x)


class LM(nn.Module):
    def __init__(self, size: Size, recompute: bool) -> None:
        super().__init__()
        self.token = nn.Embedding(size.vocab, size.width)
        self.blocks = nn.ModuleList(Block(size.width, recompute) for _ in range(size.depth))
        self.norm, self.head = nn.RMSNorm(size.width), nn.Linear(size.width, size.vocab, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def sharded(model: LM, on_gpu: bool) -> LM:
    """Under FSDP2: each block, the head and what is left. On a GPU products are in bf16, sums of gradients in fp32."""
    dtypes = MixedPrecisionPolicy(torch.bfloat16 if on_gpu else None, torch.float32)
    for module in (*model.blocks, model.head, model):
        fully_shard(module, mp_policy=dtypes)
    return model


def text(files: int | None) -> Tensor:
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    paths = [path for path in paths if "site-packages" not in path.parts][:files]
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in paths)), dtype=torch.uint8)


def windows(data: Tensor, size: Size, seed: int, device: torch.device) -> Tensor:
    """Token ids [batch, length + 1], int64, at places drawn by this seed."""
    starts = torch.randint(len(data) - size.length - 1, (size.batch,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([data[start : start + size.length + 1].long() for start in starts]).to(device)


def loss_of(model: nn.Module, data: Tensor, size: Size, seed: int, device: torch.device) -> Tensor:
    """Nats per byte on windows drawn by this seed."""
    ids = windows(data, size, seed, device)
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["150M", "300M"], default="150M")
    parser.add_argument("--tiny", action="store_true", help="a model for a smoke test")
    parser.add_argument("--fmt", default="int4", help="a format of lotion_fx")
    parser.add_argument("--method", default="lotion", help="lotion, ste, ste_scale, rr or ptq")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument(
        "--lr", type=float, default=1e-3, help="the highest; warmed up to, then down a cosine to a tenth"
    )
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing of each block")
    parser.add_argument("--folder", type=Path, help="of checkpoints, one each --every steps and at the end")
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--inner", default="inductor", help="inductor or aot_eager")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    on_gpu = torch.cuda.is_available() and not options.tiny
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.manual_seed(0)
    size, data = SIZES["tiny" if options.tiny else options.size], text(20 if options.tiny else None)
    model = sharded(LM(size, options.recompute).to(device), on_gpu)
    lotion_fx.transform(
        model,
        options.fmt,
        method=options.method,
        only=lotion_fx.preset("lm"),  # embeddings and the head stay in full precision
        regions=[*model.blocks, model.head],
        inner=options.inner,
    )
    held_out, training = data.split([len(data) // 20, len(data) - len(data) // 20])
    how = Training(options.steps, options.lr, options.folder, options.every)

    def say(done: int, loss: Tensor) -> None:
        if dist.get_rank() == 0 and (done - 1) % max(1, how.steps // 100) == 0:
            print(f"step {done - 1}: {loss.item():.4f} nats per byte", flush=True)

    train(model, training, size, device, how, say)
    loss = evaluate(model, held_out, size, device)
    if dist.get_rank() == 0:
        print(f"held out, at weights rounded to {options.fmt}: {loss:.4f} nats per byte", flush=True)
    dist.destroy_process_group()


def train(
    model: nn.Module,
    data: Tensor,
    size: Size,
    device: torch.device,
    how: Training,
    after_step: Callable[[int, Tensor], None],
) -> None:
    """Trains a model in place, from its folder's latest checkpoint on.

    Args:
        after_step: called with how many steps are done, and the loss of the last batch.
    """
    rank, world, most = dist.get_rank(), dist.get_world_size(), how.steps
    optimizer = torch.optim.AdamW(model.parameters(), how.lr, betas=(0.9, 0.95), weight_decay=0.1)

    def rate(step: int) -> float:
        return min(1, (step + 1) / max(1, most // 20)) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / most)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(load(how.folder, model, optimizer, schedule) if how.folder else 0, most):
        optimizer.zero_grad()
        for part in range(step * how.accumulate, (step + 1) * how.accumulate):
            loss = loss_of(model, data, size, (how.seed << 40) + part * world + rank, device)
            (loss / how.accumulate).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # the expected-loss term enters here
        schedule.step()
        after_step(step + 1, loss.detach())
        if how.folder and ((step + 1) % how.every == 0 or step + 1 == most):
            save(how.folder, step + 1, model, optimizer, schedule)


def evaluate(model: nn.Module, data: Tensor, size: Size, device: torch.device, count: int = 8) -> float:
    """The mean loss over so many batches a rank, at the rounded weights."""
    seeds = range(dist.get_rank(), count * dist.get_world_size(), dist.get_world_size())
    loss = mean_loss(model, data, size, device, seeds)
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


@torch.no_grad()
def mean_loss(model: nn.Module, data: Tensor, size: Size, device: torch.device, seeds: Iterable[int]) -> Tensor:
    """The mean over the batches of these seeds, in ``eval()``; the model is left as it was."""
    training = model.training
    model.eval()
    loss = torch.stack([loss_of(model, data, size, seed, device) for seed in seeds]).mean()
    model.train(training)
    return loss


def save(folder: Path, step: int, model: nn.Module, optimizer: Any, schedule: Any) -> None:
    weights, moments = get_state_dict(model, optimizer)
    smoothing = {"step": step, "schedule": schedule.state_dict(), "lotion_fx": lotion_fx.state_dict(model)}
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / f"step-{step}")
    if dist.get_rank() == 0:  # the same on all ranks
        torch.save(smoothing, folder / f"step-{step}" / "rest.pt")
        (folder / "latest").write_text(f"step-{step}")
    dist.barrier()


def load(folder: Path, model: nn.Module, optimizer: Any, schedule: Any) -> int:
    """Restores the latest checkpoint, saved by any number of ranks; the step to go on with."""
    if not (folder / "latest").exists():
        return 0
    path = folder / (folder / "latest").read_text()
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    rest = torch.load(path / "rest.pt", map_location=next(model.parameters()).device)
    lotion_fx.load_state_dict(model, rest["lotion_fx"])
    schedule.load_state_dict(rest["schedule"])
    return int(rest["step"])


def load_weights(folder: Path, model: nn.Module) -> None:
    """The model of the latest checkpoint, and nothing of its training."""
    weights = get_model_state_dict(model)
    dcp.load({"model": weights}, checkpoint_id=folder / (folder / "latest").read_text())
    set_model_state_dict(model, weights)


if __name__ == "__main__":
    main()
