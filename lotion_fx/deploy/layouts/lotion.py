"""Layout "lotion": any module, any format. A folder with one safetensors file, and a manifest that describes itself.

Of a weight ``name`` the file has ``name.codes``, ``name.scales`` and, for a scale law of two levels,
``name.tensor_scale``, as `QuantizedWeight` has them; every other tensor of the model's state is there under its own
name. Tensors that have two names are there once. The manifest says what each format is, levels and all, so that no
format need be registered to read it, and has a checksum of every file and of itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from lotion_fx.deploy import huggingface, manifest
from lotion_fx.deploy.content import Content, first_tensor
from lotion_fx.deploy.layout import Layout
from lotion_fx.deploy.packed_model import without_hooks
from lotion_fx.deploy.weights import DTYPES, QuantizedWeight
from lotion_fx.deploy.writing import MARK
from lotion_fx.kernels.packed import in_pairs
from lotion_fx.loss_graph import called
from lotion_fx.names import plain_name
from lotion_fx.numerics.formats import Format

FILE = "model.safetensors"
PARTS = ("codes", "scales", "tensor_scale")


class Lotion(Layout):
    name = "lotion"
    packages = ("safetensors",)

    def refusal(self, fmt: Format) -> str:
        return ""

    def write(self, content: Content, place: Path) -> dict[str, str]:
        tensors = dict(content.others)
        for name, weight in content.weights.items():
            for part, tensor in zip(PARTS, (weight.codes, weight.scales, weight.tensor_scale), strict=True):
                if tensor is not None and tensors.setdefault(f"{name}.{part}", tensor) is not tensor:
                    raise ValueError(f"model: it has a tensor named {name}.{part}, which layout='lotion' uses itself")
        save_file({name: t.cpu().contiguous().clone() for name, t in tensors.items()}, place / FILE)
        if content.is_from_transformers:
            huggingface.save_settings(content, place)
        return {}

    def read(self, place: Path, content: Content) -> Iterator[tuple[str, Tensor]]:
        if (place / MARK).is_file():  # which tells of formats by itself
            weights, others, _ = read(place)
        else:
            told = {name: manifest.describe(weight) for name, weight in content.weights.items()}
            weights, others = parse((place / FILE).read_bytes(), told)
        for name, weight in weights.items():
            yield name, weight.dequantize()
        yield from others.items()

    def outputs(self, place: Path, model: nn.Module, inputs: Any) -> Tensor:
        # What is in no state, such as a rotary embedding's frequencies, is of the model that `load` gives.
        try:
            made = huggingface.made(place).to(next(model.parameters()).device)
        except ValueError:  # of a class that is the user's own, who gives it to `load`
            made = without_hooks(model)
        fill(made.eval(), *read(place))
        return first_tensor(called(made, inputs))


def read(folder: Path) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor], dict[str, str]]:
    """Weights, other tensors and the other names of both, of a folder whose checksums all hold.

    Raises:
        ValueError: it is damaged, or of another layout. Files are read whole, never mapped: a mapped one that is cut
            later would end the process.
    """
    told = manifest.read(folder)
    if told.get("layout") != Lotion.name:
        raise ValueError(
            f"path={str(folder)!r}: an export for {told.get('layout')}, whose client loads it; load reads 'lotion'"
        )
    contents = manifest.check_file(folder, FILE, told)
    try:
        weights, others = parse(contents, told["weights"])
        tied = dict(told["tied"].items())
        for name, known in tied.items():
            if known not in weights and known not in others:
                raise ValueError(f"{name!r} is said to be {known!r}, which is not there")
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"path={str(folder)!r}: damaged: {MARK} does not describe {FILE}: {error}") from error
    return weights, others, tied


def parse(contents: bytes, told: Mapping[str, Any]) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """The weights, and the other tensors, of a safetensors file's contents.

    Args:
        told: of each weight what the manifest tells.
    """
    try:
        tensors = load(contents)
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"it is no safetensors file ({error})") from error
    weights = {}
    for name, entry in told.items():
        parts = [tensors.pop(f"{name}.{part}", None) for part in PARTS]
        weights[name] = _weight(name, parts, entry)
    return weights, tensors


def _weight(name: str, parts: list[Tensor | None], told: Mapping[str, Any]) -> QuantizedWeight:
    codes, scales, tensor_scale = parts
    fmt, axis, shape = manifest.format_of(told["format"]), told["axis"], tuple(told["shape"])
    dtype = getattr(torch, str(told["dtype"]), None)
    if not shape or not 0 <= axis < len(shape) or dtype not in DTYPES or codes is None or scales is None:
        raise ValueError(f"of {name!r} codes, scales, axis, shape or dtype are missing or wrong")
    if isinstance(fmt.block, int) and fmt.block >= 2**31:
        raise ValueError(f"of {name!r} a block has {fmt.block} weights")
    rows, length = [*shape[:axis], *shape[axis + 1 :]], shape[axis]
    blocks = -(-length // fmt.block) if isinstance(fmt.block, int) else 1
    wanted = [
        (codes, torch.uint8, [*rows, -(-length // 2) if in_pairs(fmt) else length]),
        (scales, fmt.law.stored, [1] if fmt.block == "tensor" else [*rows, blocks]),
    ]
    if (tensor_scale is not None) != fmt.law.two_level:
        raise ValueError(f"of {name!r} the tensor scale is missing, or one too many")
    if tensor_scale is not None:
        wanted.append((tensor_scale, torch.float32, []))
    for tensor, stored, expected in wanted:
        if tensor.dtype != stored or list(tensor.shape) != expected:
            raise ValueError(
                f"of {name!r} a tensor is {tensor.dtype} {list(tensor.shape)}, expected {stored} {expected}"
            )
    return QuantizedWeight(codes, scales, tensor_scale, fmt, axis, shape, dtype)  # type: ignore[arg-type]


@torch.no_grad()
def fill(
    model: nn.Module, weights: dict[str, QuantizedWeight], others: dict[str, Tensor], tied: dict[str, str]
) -> None:
    """Gives a plain module the dense values of an export, see `read`.

    Raises:
        ValueError: they do not fit.
    """
    dense: dict[str, Tensor] = {name: weight.dequantize().contiguous() for name, weight in weights.items()} | others
    dense |= {name: dense[known] for name, known in tied.items()}
    keys = {plain_name(key): key for key in model.state_dict()}
    held = {plain_name(key): tensor for key, tensor in model.state_dict().items()}
    wrong = [f"it has no {name!r}" for name in held.keys() - dense.keys()]
    wrong += [f"{name!r} is not in the model" for name in dense.keys() - held.keys()]
    for name in held.keys() & dense.keys():
        if held[name].shape != dense[name].shape:
            wrong.append(f"{name!r} is {list(dense[name].shape)}, in the model {list(held[name].shape)}")
    if wrong:  # told before anything of the model is changed
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"model: the export does not fit this {type(model).__name__}: {min(wrong)}{more}")
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    assigned = {}
    for name, tensor in dense.items():
        known, parameter = held[name], parameters.get(name)
        if not known.is_meta and known.dtype == tensor.dtype:
            known.copy_(tensor)  # for whatever else holds it: a list, a closure
        elif not known.is_meta and parameter is not None:
            parameter.data = tensor.to(known.device)
        else:
            assigned[keys[name]] = tensor if known.is_meta else tensor.to(known.device)
    model.load_state_dict(assigned, assign=True, strict=False)
    for name, other in tied.items():  # names that were one tensor are one again
        owner, _, attribute = keys[name].rpartition(".")
        first, _, source = keys[other].rpartition(".")
        setattr(model.get_submodule(owner), attribute, getattr(model.get_submodule(first), source))
