"""Layout "aoti": any model that torch.export takes, compiled ahead of time by Inductor, as one .pt2 file.

``torch._inductor.aoti_load_package(path)`` runs it on machines of the kind that compiled it, with the torch that did,
where neither lotion_fx nor the model's own code need be. Weights lie in it as codes and scales, and are decoded in each
run by operators of torch's own: the file is small, the run not faster than a dense one.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lotion_fx import private_packages
from lotion_fx.copied import copied
from lotion_fx.deploy.content import Content, first_tensor
from lotion_fx.deploy.layout import Layout
from lotion_fx.deploy.layouts.tracing import arguments, traceable
from lotion_fx.deploy.weights import QuantizedWeight
from lotion_fx.numerics.formats import Format
from lotion_fx.progress import with_a_line

SMALLEST = 9  # numbers of a constant that stays one
ERROR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By how much of their norm outputs of the compiled model may differ: sums in another order."""


class Aoti(Layout):
    name = "aoti"
    suffix = ".pt2"

    def refusal(self, fmt: Format) -> str:
        return ""

    def write(
        self, content: Content, place: Path, *, example_inputs: Any = None, dynamic_shapes: Any = None
    ) -> dict[str, str]:
        """
        Args:
            example_inputs: a tuple of the forward's arguments, or a dictionary of them by name.
            dynamic_shapes: which of their sizes may differ, as `torch.export` takes it.
        """
        args, kwargs = arguments(self.name, example_inputs)
        made = traceable(content)
        if elsewhere := {p.device.type for p in made.parameters()} - {"cpu"}:
            raise ValueError(
                f"model: it is on {elsewhere.pop()}, and layout='aoti' compiles for CPUs; call model.cpu()"
            )
        given, keywords = copied((args, kwargs))
        expected = made(*given, **keywords)
        dense = {}
        for name, weight in content.weights.items():
            names = content.names(name)
            if any(isinstance(_owner(made, each)[0], nn.RNNBase) for each in names):
                dense[name] = "kernels of recurrent modules take dense weights"
            else:
                _hold(made, names, weight)
        program = torch.export.export(made, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder, f"model{self.suffix}")  # the compiler wants the suffix
            with with_a_line("compiling the program, which takes half a minute or more"):
                private_packages.compile_package(program, str(package))
            place.write_bytes(package.read_bytes())
            given, keywords = copied((args, kwargs))
            _compare(private_packages.load_package(str(package))(*given, **keywords), expected)
        return dense

    def read(self, place: Path, content: Content) -> Iterator[tuple[str, Tensor]]:
        """From the constants of the compiled library, as torch extracts them."""
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(place) as package:
            (library,) = (name for name in package.namelist() if name.endswith(".so"))
            constants = private_packages.constants_of(package.extract(library, folder))
        for name, weight in content.weights.items():
            for each in content.names(name):  # the program has what is shared under one of its names
                owner, _, attribute = each.rpartition(".")
                stem = f"{owner}.parametrizations.{attribute}.original".removeprefix(".")
                parts = [constants[f"{stem}{i}"] for i in range(3) if f"{stem}{i}" in constants]
                if len(parts) == len(_parts(weight)):
                    yield name, Decoded(weight)(*parts)
                    break

    def outputs(self, place: Path, model: nn.Module, inputs: Any) -> Tensor:
        """Inputs of the sizes that were compiled for."""
        args, kwargs = arguments(self.name, inputs if isinstance(inputs, (Mapping, tuple, list)) else (inputs,))
        return first_tensor(private_packages.load_package(str(place))(*args, **kwargs))


class Decoded(nn.Module):
    """Makes a weight of its codes and scales, whenever it is read."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, *held: Tensor) -> Tensor:
        parts = [_short(each, part) for each, part in zip(held, _parts(self.weight), strict=True)]
        scale = parts[2] if len(parts) == 3 else None
        return replace(self.weight, codes=parts[0], scales=parts[1], tensor_scale=scale).dequantize()

    def right_inverse(self, w: Tensor) -> tuple[Tensor, ...]:
        return tuple(_long(part) for part in _parts(self.weight))


def _parts(weight: QuantizedWeight) -> list[Tensor]:
    return [part for part in (weight.codes, weight.scales, weight.tensor_scale) if part is not None]


def _long(part: Tensor) -> Tensor:
    """A part as it is held: Inductor writes vectors of up to eight numbers into its code, whence none is read back."""
    return part if part.dim() > 1 else part.reshape(-1).repeat(-(-SMALLEST // part.numel()))


def _short(held: Tensor, part: Tensor) -> Tensor:
    return held if part.dim() > 1 else held[: part.numel()].reshape(part.shape)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner), attribute


def _hold(model: nn.Module, names: list[str], weight: QuantizedWeight) -> None:
    """Puts a weight's codes in its place, once for all of its names."""
    first, *others = dict.fromkeys(_owner(model, name) for name in names)  # a module may have several names itself
    for module, attribute in (first, *others):
        parametrize.register_parametrization(module, attribute, Decoded(weight), unsafe=True)
    for module, attribute in others:
        module.parametrizations[attribute] = first[0].parametrizations[first[1]]  # type: ignore[index, union-attr, operator]


def _compare(found: Any, expected: Any) -> None:
    pairs = zip(*((x if isinstance(x, (tuple, list)) else [x]) for x in (found, expected)), strict=True)
    for one, other in pairs:
        if isinstance(other, Tensor) and other.is_floating_point():
            error = float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))
            if not error <= ERROR.get(other.dtype, 1e-4):
                raise ValueError(
                    f"layout='aoti': on example_inputs the compiled model differs by {error:.1e} of the output's norm; "
                    "nothing was written. Please report this with the version of torch"
                )
