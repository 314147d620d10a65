"""What a zoo is made of: a model, the batch that it is called with, and how its loss is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[], Any]


@dataclass(frozen=True)
class Entry:
    """One model.

    Args:
        kind: ``"plain"``, ``"transformers"`` or ``"timm"``.
        name: unique in its kind.
        make: builds it, with the same weights after the same seed.
        inputs: its batch: a dictionary of keywords, a tuple of arguments, or the only argument.
    """

    kind: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Inputs

    def batch(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments and keywords of a call, the same ones each time."""
        made = self.inputs()
        if isinstance(made, dict):
            return (), made
        return (made if isinstance(made, tuple) else (made,)), {}


def normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Inputs:
    """Tensors of these shapes from a standard normal law."""

    def inputs() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        return tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)

    return inputs


def whole(high: int, *shapes: tuple[int, ...]) -> Inputs:
    """Tensors of these shapes of integers from 1 to below ``high``."""

    def inputs() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        return tuple(torch.randint(1, high, shape, generator=generator) for shape in shapes)

    return inputs


def named(**inputs: Inputs) -> Inputs:
    """A batch of keywords, each the first tensor of what its function makes."""
    return lambda: {name: make()[0] for name, make in inputs.items()}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a model's output, in order; those in objects of unknown classes are left out."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def loss_of(output: Any) -> Tensor:
    """The model's own loss where its output has one, else the mean square of each real tensor in it, summed."""
    own = output.get("loss") if isinstance(output, Mapping) else None
    if isinstance(own, Tensor):
        return own.sum()
    squares = [x.square().mean() for x in tensors_in(output) if x.is_floating_point() and x.requires_grad]
    return torch.stack(squares).sum()
