"""The sizes that want a GPU, by torchrun and FSDP2: in bf16, with checkpoints that a killed run goes on from."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm import tqdm

import lotion_fx
from lotion_fx.examples import fsdp2_lm
from lotion_fx.examples.reproduce.recipes import Recipe
from lotion_fx.examples.reproduce.runs import Curve, Job, Result
from lotion_fx.examples.reproduce.sizes import BYTES, Scale

CALIBRATION = 8  # batches that `lotion_fx.round_` sees
PATIENCE = timedelta(hours=6)  # of ranks that wait while the first one rounds a model alone


def tokens_of(path: Path, vocab: int) -> Tensor:
    """A file of token numbers, two bytes each, little-endian, mapped into memory: uint16, as long as it is.

    Raises:
        ValueError: a token among the first million is no word of the vocabulary.
    """
    found = torch.from_file(str(path), shared=False, size=path.stat().st_size // 2, dtype=torch.uint16)
    largest = int(found[:1_000_000].int().max())
    if largest >= vocab:
        raise ValueError(f"{path} has token {largest}; the model knows those below {vocab}: raise --vocab")
    return found


class Sharded:
    """Trains models of one size on all ranks of a torchrun. Plain training happens once a seed: PTQ at a second format
    takes the first one's weights, and its curve is one point.

    Args:
        scale: what is trained.
        text: a file of tokens, see `tokens_of`; None takes the Python library's own source, byte by byte.
        folder: of checkpoints, one folder a run; it must be one for all ranks.
        inner: what compiles the training graphs.
        recompute: activation checkpointing of each block.

    Raises:
        RuntimeError: no torchrun started this process.
        ValueError: the text is bytes, and the vocabulary is not; a step cannot be shared out among the ranks.
    """

    def __init__(self, scale: Scale, text: Path | None, folder: Path, inner: str, recompute: bool = False) -> None:
        if "RANK" not in os.environ:
            raise RuntimeError(
                f"size {scale.name} runs under torchrun: torchrun --nproc-per-node N -m "
                f"lotion_fx.examples.reproduce.lotion --size {scale.name}"
            )
        if text is None and scale.model.vocab != BYTES:
            raise ValueError(
                f"size {scale.name} has a vocabulary of {scale.model.vocab}, and the text at hand is bytes: give "
                f"--text FILE, token numbers of two bytes each, or --vocab {BYTES}"
            )
        self.on_gpu = torch.cuda.is_available()
        self._device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if self.on_gpu else torch.device("cpu")
        if self.on_gpu:
            torch.cuda.set_device(self._device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if self.on_gpu else "gloo", timeout=PATIENCE)
        self.world = dist.get_world_size()
        self.accumulate = scale.accumulate(self.world)
        self.scale, self.folder, self.inner, self.recompute = scale, folder, inner, recompute
        self.size, self.steps, self.step_tokens = scale.name, scale.steps, scale.step_tokens
        self.device = f"{self.world} x {torch.cuda.get_device_name() if self.on_gpu else 'cpu'}"
        self.writes = dist.get_rank() == 0
        data = fsdp2_lm.text(None) if text is None else tokens_of(text, scale.model.vocab)
        self._held_out, self._training = data.split([len(data) // 20, len(data) - len(data) // 20])
        self._text = str(text and text.name), len(data)

    def conditions(self, recipe: Recipe) -> str:
        """See `Bench`; the number of ranks is one, for each draws windows of its own."""
        return recipe.fingerprint(scale=repr(self.scale), world=self.world, text=self._text)

    def agreed(self, value: bool) -> bool:
        """See `Bench`."""
        flag = torch.tensor([value], dtype=torch.int32, device=self._device)
        dist.broadcast(flag, 0)
        return bool(flag.item())

    def run(self, job: Job) -> Result:
        """See `Bench`."""
        began = time.perf_counter()
        torch.compiler.reset()  # of graphs of one code Dynamo keeps a few
        torch.manual_seed(job.seed)
        model = fsdp2_lm.sharded(fsdp2_lm.LM(self.scale.model, self.recompute).to(self._device), self.on_gpu)
        self._transform(model, job, [*model.blocks, model.head])
        curve = self._trained(model, job)
        with lotion_fx.full_precision(model):
            latent = self._loss(model)
        if job.recipe.two_sided:
            loss, randomized = self._rounded(model, job), None
        else:
            loss = self._loss(model)
            with lotion_fx.randomized(model):
                randomized = self._loss(model)
        return Result(loss, randomized, latent, curve, round(time.perf_counter() - began, 1))

    def _transform(self, model: nn.Module, job: Job, regions: list[nn.Module] | None, plain: bool = False) -> None:
        arguments = {"method": "ptq"} if plain else dict(job.recipe.arguments)
        steps = self.steps if job.recipe.has_phases and not plain else None
        only = lotion_fx.preset("lm")  # embeddings and the head stay in full precision
        lotion_fx.transform(model, job.format, **arguments, steps=steps, only=only, regions=regions, inner=self.inner)

    # ------------------------------------------------------------------------------------------------------ training

    def _trained(self, model: nn.Module, job: Job) -> Curve:
        """Trains from the latest checkpoint on, and gives the curve, with what earlier processes saw of it."""
        fmt = "any" if job.method == "ptq" else job.format.replace("/", "_")  # plain training knows no format
        folder = self.folder / f"{job.size}-{job.method}-{fmt}-seed{job.seed}-{job.conditions}"
        every = math.ceil(self.steps / self.scale.points)
        how = fsdp2_lm.Training(self.steps, self.scale.lr, folder, every, self.accumulate, job.seed)
        seen = folder / f"curve-{job.format.replace('/', '_')}.jsonl"
        label = f"{job.method}, {job.format}, seed {job.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        if job.method == "ptq" and _latest(folder) == f"step-{self.steps}" and not seen.exists():
            fsdp2_lm.load_weights(folder, model)  # as another format left them
            return [(self.steps, self._loss(model, self.scale.windows // 4))]
        with tqdm(total=self.steps, desc=label, leave=False, disable=None if self.writes else True) as bar:

            def after_step(step: int, loss: Tensor) -> None:
                bar.update(step - bar.n)
                if step % every and step != self.steps:
                    return
                found = self._loss(model, self.scale.windows // 4)
                bar.set_postfix(rounded=f"{found:.3f}", train=f"{loss.item():.3f}")
                if self.writes:
                    with seen.open("a") as file:
                        file.write(json.dumps([step, found]) + "\n")
                    _drop_all_but_the_latest(folder)

            fsdp2_lm.train(model, self._training, self.scale.model, self._device, how, after_step)
        if self.writes:
            _drop_all_but_the_latest(folder)
        dist.barrier()
        points = {step: loss for step, loss in map(json.loads, seen.read_text().splitlines())} if seen.exists() else {}
        return sorted(points.items())

    # ----------------------------------------------------------------------------------------------------- measuring

    def _loss(self, model: nn.Module, windows: int | None = None) -> float:
        count = windows or self.scale.windows
        return fsdp2_lm.evaluate(model, self._held_out, self.scale.model, self._device, count)

    def _rounded(self, model: nn.Module, job: Job) -> float:
        """The loss after `lotion_fx.round_`, which takes no sharded weights: the first rank does it, in float32."""
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        found = torch.zeros((), device=self._device)
        if self.writes:
            shape, device = self.scale.model, self._device
            whole = fsdp2_lm.LM(shape, recompute=False)
            whole.load_state_dict(state)
            self._transform(whole.to(device), job, None, plain=True)
            drawn = [fsdp2_lm.windows(self._training, shape, -1 - seed, device) for seed in range(CALIBRATION)]
            lotion_fx.round_(whole, [(ids[:, :-1], ids[:, 1:]) for ids in drawn], _cross_entropy)
            seeds = range(self.scale.windows * self.world)
            found += fsdp2_lm.mean_loss(whole, self._held_out, shape, device, seeds)
        dist.broadcast(found, 0)
        return found.item()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _latest(folder: Path) -> str | None:
    """The name of the checkpoint to go on from."""
    return (folder / "latest").read_text() if (folder / "latest").exists() else None


def _drop_all_but_the_latest(folder: Path) -> None:
    """Of the checkpoints, each of which is three times the model."""
    for old in folder.glob("step-*") if _latest(folder) else ():
        if old.name != _latest(folder):
            shutil.rmtree(old)
