"""Layout "bitsandbytes": nf4 as bitsandbytes' Linear4bit holds it, in the checkpoint that transformers loads.

Of a Linear's weight the file has ``weight`` u8 [N K / 2, 1], the even element in the *high* half of a byte,
``weight.absmax`` f32 [N K / block], ``weight.quant_map`` f32 [16], and the rest of its state as JSON in bytes. GPT-2's
Conv1D becomes such a Linear too. A block is 32, 64, 128 and on to 4096 weights.

Loaded weights are exact. In eval(), on a CPU that multiplies bfloat16, bitsandbytes then packs them anew for a product
in bfloat16, which logits show; in train() it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lotion_fx.deploy import huggingface
from lotion_fx.deploy.content import Content
from lotion_fx.deploy.elements import NF4
from lotion_fx.deploy.layout import Layout
from lotion_fx.deploy.weights import QuantizedWeight
from lotion_fx.numerics.formats import Format

BLOCKS = tuple(2**i for i in range(5, 13))


class BitsAndBytes(Layout):
    name = "bitsandbytes"
    packages = ("bitsandbytes", "transformers", "accelerate", "safetensors")

    def refusal(self, fmt: Format) -> str:
        if fmt.grid == NF4 and fmt.block in BLOCKS:
            return ""
        return (
            f"it has nf4 in blocks of {', '.join(map(str, BLOCKS))}; train with 'nf4', whose block is 32, or 'nf4/64'"
        )

    def write(self, content: Content, place: Path) -> dict[str, str]:
        from transformers import BitsAndBytesConfig

        huggingface.check(content, self.name)
        dense = _dense(content)
        others = {**content.others, **{name: content.weights[name].dequantize() for name in dense}}
        tensors = huggingface.as_saved(content.model, others)
        for name, weight in content.weights.items():
            if name not in dense:
                saved = _saved(content, name)
                codes = weight.each_code().flatten()
                tensors[saved] = (codes[::2] << 4 | codes[1::2]).reshape(-1, 1)
                state = _state(weight).as_dict(packed=True)
                tensors |= {f"{saved}.{key}": tensor for key, tensor in state.items()}
        huggingface.save_tensors(tensors, place)
        owners = {name.rpartition(".")[0] for name in content.weights if name not in dense}
        modules = content.model.named_modules()
        told = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=next(iter(content.weights.values())).dtype,
            llm_int8_skip_modules=[name for name, m in modules if _is_linear(m) and name not in owners],
        )
        huggingface.save_settings(content, place, told.to_dict())
        return dense

    def read(self, place: Path, content: Content) -> Iterator[tuple[str, Tensor]]:
        from bitsandbytes.functional import QuantState, dequantize_4bit
        from safetensors.torch import load_file

        tensors = load_file(place / huggingface.FILE)
        dense = _dense(content)
        for name, weight in content.weights.items():
            if name not in dense:
                saved = _saved(content, name)
                state = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{saved}.")}
                read = dequantize_4bit(tensors[saved], QuantState.from_dict(state, torch.device("cpu")))
                yield name, read.movedim(-1, weight.axis)

    def outputs(self, place: Path, model: nn.Module, inputs: Any) -> Tensor:
        return huggingface.loaded_outputs(place, inputs)


def _saved(content: Content, name: str) -> str:
    """A matrix's name in the checkpoint."""
    (saved,) = huggingface.as_saved(content.model, {name: torch.empty(content.weights[name].shape, device="meta")})
    return saved


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _dense(content: Content) -> dict[str, str]:
    """Of each weight without a place, the reason."""
    reasons = {}
    for name, weight in content.weights.items():
        owner = huggingface.owner_of(content.model, name)
        turned = len(weight.shape) == 2 and not isinstance(owner, nn.Linear) and _is_linear(owner) and weight.axis == 0
        reason = huggingface.not_whole(weight) if turned else huggingface.unplaced(content, name)
        if not reason and len(weight.shape) != 2:
            reason = "stacked experts: bitsandbytes holds matrices alone"
        if reason:
            reasons[name] = reason
    return reasons


def _state(weight: QuantizedWeight) -> Any:
    """Its QuantState."""
    from bitsandbytes.functional import QuantState

    rows = [size for axis, size in enumerate(weight.shape) if axis != weight.axis]
    return QuantState(
        absmax=weight.scales.float().flatten(),
        shape=torch.Size([*rows, weight.length]),
        code=torch.tensor(weight.format.grid.levels),
        blocksize=weight.format.block,
        quant_type="nf4",
        dtype=weight.dtype,
    )
