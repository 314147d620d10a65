"""What every Hugging Face checkpoint has: settings, tensors, and the names that `from_pretrained` knows them by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lotion_fx.deploy.content import Content, first_tensor
from lotion_fx.deploy.weights import QuantizedWeight
from lotion_fx.loss_graph import called

FILE = "model.safetensors"


def check(content: Content, layout: str) -> None:
    """
    Raises:
        ValueError: the model is none of transformers'.
    """
    if not content.is_from_transformers:
        raise ValueError(
            f"layout={layout!r}: a checkpoint for from_pretrained, and model is a {type(content.model).__name__}, "
            "which is no model of transformers; layout='lotion' takes any module"
        )


def save_settings(
    content: Content, place: Path, quantization: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None
) -> None:
    """A Hugging Face model's configuration, generation settings and tokenizer.

    Args:
        quantization: what the configuration says of it.
        dtype: that `from_pretrained` gives the model; None for that of its parameters.
    """
    model: Any = content.model
    made = type(model.config).from_dict(model.config.to_dict())  # a copy: the model's own is not to change
    made.architectures = [type(model).__name__]
    made.save_pretrained(place)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(place)
    if content.tokenizer is not None:
        content.tokenizer.save_pretrained(place)
    if quantization is not None:
        file = place / "config.json"
        told = json.loads(file.read_text(encoding="utf-8"))
        told["dtype"] = str(dtype or model.dtype).removeprefix("torch.")
        told["quantization_config"] = dict(quantization)
        file.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def made(folder: Path) -> nn.Module:
    """A Hugging Face model of a folder's configuration, at random weights.

    Raises:
        ValueError: there is no configuration, or of no class that transformers has.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"path={str(folder)!r}: the export has no config.json to make a model from; pass model=, a plain module of "
            "the architecture that was exported"
        )
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["?"])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ValueError(f"path={str(folder)!r}: transformers has no {name}; pass model=, made by its own class")
    model: nn.Module = kind(config)
    return model


@torch.no_grad()
def loaded_outputs(place: Path, inputs: Any) -> Tensor:
    """What the model computes that `from_pretrained` makes of a checkpoint, with default arguments, in eval()."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(place)
    kind = getattr(transformers, config.architectures[0])
    return first_tensor(called(kind.from_pretrained(place).eval(), inputs))


def as_saved(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model's state under the names, and cut into the parts, that its checkpoints have.

    WHY: experts are stacked in the model and apart in its checkpoints, and only transformers knows how. The function
    has a public name but no page in the documentation: this is the one place that calls it.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def save_tensors(tensors: Mapping[str, Tensor], place: Path, metadata: Mapping[str, str] | None = None) -> None:
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, place / FILE, {"format": "pt", **(metadata or {})})


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """The module that holds a parameter, by one of its names in the model."""
    return model.get_submodule(name.rpartition(".")[0])


def unplaced(content: Content, name: str) -> str:
    """Why a weight has no place among matrices [outputs, inputs] with blocks along the inputs; empty if it has."""
    weight, owner = content.weights[name], owner_of(content.model, name)
    if name in content.tied.values():
        return "it is tied to another weight, which the client would read as codes"
    if weight.axis != len(weight.shape) - 1:
        return f"{type(owner).__name__} has its blocks along dimension {weight.axis}, the client along the last"
    if len(weight.shape) == 2 and not isinstance(owner, nn.Linear):
        return f"{type(owner).__name__} is no nn.Linear"
    if reason := not_whole(weight):
        return reason
    if not matrices(content, name):
        return f"{type(owner).__name__} has a weight of {len(weight.shape)} dimensions, in checkpoints too"
    return ""


def not_whole(weight: QuantizedWeight) -> str:
    """That its last blocks are short; empty if they are not."""
    block = weight.format.block
    if isinstance(block, int) and weight.length % block:
        return f"its {weight.length} inputs are no multiple of a block of {block}"
    return ""


def matrices(content: Content, name: str) -> dict[str, Tensor]:
    """Of a weight [*rows, K], by its names in the checkpoint, which rows each matrix has: int64, of the rows flat.

    Stacked experts are matrices of their own there. Empty where the checkpoint has a stack, or cuts or turns rows.
    """
    shape = content.weights[name].shape
    rows = torch.arange(torch.Size(shape[:-1]).numel()).reshape(*shape[:-1], 1).expand(*shape[:-1], 2)  # for K columns
    found = {}
    for saved, part in as_saved(content.model, {name: rows}).items():
        if part.dim() != 2 or part.shape[-1] != 2 or not (part == part[:, :1]).all():
            return {}
        found[saved] = part[:, 0].clone()
    return found


def whole(content: Content, name: str, read: Mapping[str, Tensor]) -> Tensor:
    """A weight of its matrices as they were read, by their names in the checkpoint."""
    shape = content.weights[name].shape
    made = next(iter(read.values())).new_empty(torch.Size(shape[:-1]).numel(), shape[-1])
    for saved, rows in matrices(content, name).items():
        made[rows] = read[saved]
    return made.reshape(shape)


def by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Each module's tensors by their names in it."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, own = name.rpartition(".")
        found.setdefault(module, {})[own] = tensor
    return found


def rows_of(weight: QuantizedWeight, rows: Tensor) -> QuantizedWeight:
    """A matrix of some rows of a weight [*rows, K] whose blocks run along K."""
    rows = rows.to(weight.codes.device)
    scales = weight.scales
    if weight.format.block != "tensor":
        scales = scales.flatten(0, -2)[rows]
    codes = weight.codes.flatten(0, -2)[rows]
    return replace(weight, codes=codes, scales=scales, axis=1, shape=(len(rows), weight.length))
