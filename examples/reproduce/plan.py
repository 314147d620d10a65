"""What a run at full size will take, before any GPU is at hand: parameters, memory, FLOPs and hours, all predicted."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

from lotion_fx.examples.fsdp2_lm import LM
from lotion_fx.examples.reproduce.sizes import Scale
from lotion_fx.kernels.targets import TARGETS

GPUS = {80: "A100", 90: "H100", 100: "B200"}
UTILIZATION = 0.4
"""Of the dense bf16 peak, an assumption: what well-kept trainings of this size reach, and none was timed here."""
GIB = 2**30
FLOPS_RATIO = {"full": 4 / 3}
"""Of a training step against the plain one, by curvature, where it is not 1: measured in docs/cost.md."""


@dataclass(frozen=True)
class Memory:
    """GiB of one GPU, by what takes them. P parameters, Q of them quantized, N GPUs, L blocks, d the width, V the
    vocabulary, n the tokens that a GPU takes at once.

    Args:
        weights: float32, 4 P / N.
        gradients: float32, 4 P / N.
        optimizer: Adam's two moments, 8 P / N.
        curvature: on every GPU whole, what is kept and what a step gathers: ``factored``: 8 bytes for each row and each
            column of each quantized weight; ``full``: 8 Q; ``fisher``: nothing, for it reads Adam's.
        gathered: two blocks and the head in bf16, as FSDP2 gathers them ahead, 2 bytes a parameter.
        activations: 44 d bytes a token and block in bf16 (input and output of each norm, q, k and v before and after
            their rotation, attention's output, both halves of the gate and their product); with recomputation 2 d, and
            one block's 44 d; and 10 V a token for the logits, their float32 copy and its gradient.
    """

    weights: float
    gradients: float
    optimizer: float
    curvature: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        """Without what the allocator and the communication library keep for themselves."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Plan:
    """One training at full size.

    Args:
        parameters: all of them.
        quantized: those in a format, see `quantized_weights`.
        multiplied: those that a token meets in a matrix product: all but the embedding.
        steps, tokens: of the optimizer, and over all of them.
        flops: 6 ``multiplied`` a token, and 12 L d T for attention over windows of T tokens (causal kernels do half of
            that); ``curvature="full"`` a third more.
        memory: see `Memory`.
        hours: by GPU: ``flops`` over GPUs, peak and `UTILIZATION`.
    """

    size: str
    curvature: str
    gpus: int
    parameters: int
    quantized: int
    multiplied: int
    steps: int
    tokens: int
    flops: float
    memory: Memory
    hours: dict[str, float]


MEMORY = tuple(each.name for each in fields(Memory))


def on_meta(scale: Scale) -> LM:
    """The model, without any storage."""
    with torch.device("meta"):
        return LM(scale.model, recompute=False)


def quantized_weights(model: LM) -> Iterator[Tensor]:
    """Those that ``only=preset("lm")`` leaves in: of all linear layers but the head."""
    return (each.weight for each in model.modules() if isinstance(each, nn.Linear) and each is not model.head)


def plan(scale: Scale, gpus: int, curvature: str = "factored", recompute: bool = False) -> Plan:
    """Predicts a training on so many GPUs.

    Raises:
        ValueError: a step cannot be shared out among them.
    """
    scale.accumulate(gpus)
    model, shape = on_meta(scale), scale.model
    parameters = sum(each.numel() for each in model.parameters())
    multiplied = parameters - model.token.weight.numel()
    tokens = scale.steps * scale.step_tokens
    attention = 12 * shape.depth * shape.width * shape.length
    flops = (6.0 * multiplied + attention) * tokens * FLOPS_RATIO.get(curvature, 1.0)
    peaks = {name: TARGETS[arch].tensor["bf16"] * 1e12 for arch, name in GPUS.items()}
    return Plan(
        scale.name,
        curvature,
        gpus,
        parameters,
        sum(each.numel() for each in quantized_weights(model)),
        multiplied,
        scale.steps,
        tokens,
        flops,
        _memory(model, scale, gpus, curvature, recompute),
        {name: flops / (gpus * peak * UTILIZATION) / 3600 for name, peak in peaks.items()},
    )


def _memory(model: LM, scale: Scale, gpus: int, curvature: str, recompute: bool) -> Memory:
    shape = scale.model
    parameters = sum(each.numel() for each in model.parameters())
    block = sum(each.numel() for each in model.blocks[0].parameters())
    weights = list(quantized_weights(model))
    kept = {
        "factored": 8 * sum(sum(each.shape) for each in weights),
        "full": 8 * sum(each.numel() for each in weights),
        "fisher": 0,
    }
    token_block = 44 * shape.width
    blocks = 2 * shape.width * shape.depth + token_block if recompute else token_block * shape.depth
    activations = shape.batch * shape.length * (blocks + 10 * shape.vocab)
    gathered = 2 * (2 * block + model.head.weight.numel())
    parts = (
        4 * parameters / gpus,
        4 * parameters / gpus,
        8 * parameters / gpus,
        kept[curvature],
        gathered,
        activations,
    )
    return Memory(*(part / GIB for part in parts))


def shown(plans: list[Plan]) -> str:
    """Plans side by side, as text."""
    lines: list[tuple[str, list[str]]] = [
        ("parameters", [f"{each.parameters / 1e6:.1f} M" for each in plans]),
        ("  quantized", [f"{each.quantized / 1e6:.1f} M" for each in plans]),
        ("  without the embedding", [f"{each.multiplied / 1e6:.1f} M" for each in plans]),
        ("steps", [f"{each.steps:,}" for each in plans]),
        ("tokens", [f"{each.tokens / 1e9:.3g} B" for each in plans]),
        ("FLOPs", [f"{each.flops:.3g}" for each in plans]),
        *(
            (f"GiB a GPU: {name}", [f"{vars(each.memory)[name]:.3f}" for each in plans])
            for name in vars(plans[0].memory)
        ),
        ("GiB a GPU: in all", [f"{each.memory.total:.1f}" for each in plans]),
        *((f"hours, {name}, predicted", [f"{each.hours[name]:.2f}" for each in plans]) for name in plans[0].hours),
    ]
    headers = ["", *(f"{each.size}, {each.curvature}, {each.gpus} GPUs" for each in plans)]
    text = tabulate([[name, *cells] for name, cells in lines], headers, disable_numparse=True, tablefmt="github")
    peaks = ", ".join(f"{name} {TARGETS[arch].tensor['bf16']:g}" for arch, name in GPUS.items())
    return f"{text}\n\nHours suppose {UTILIZATION:.0%} of the dense bf16 peak in TFLOP/s: {peaks}."


def launch(size: str, ranks: int = 2) -> str:
    """Trains the size, shrunk, by torchrun on CPU ranks over gloo, and gives what it said.

    Raises:
        RuntimeError: it failed, with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "lotion_fx.examples.reproduce.lotion", "--size", size, "--shrink", "--vocab", "256"]
        command += ["--methods", "lotion", "--formats", "int4/tensor", "--seeds", "1", "--inner", "aot_eager"]
        command += ["--runs", str(Path(folder) / "runs.jsonl"), "--work", folder]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            raise RuntimeError(f"the launch on {ranks} CPU ranks failed:\n{found.stderr[-3000:]}")
        return (Path(folder) / "runs.jsonl").read_text()
