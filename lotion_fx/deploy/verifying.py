"""`verify`: an export against the model that was trained, by the client's own library."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from lotion_fx.copied import copied
from lotion_fx.deploy import manifest
from lotion_fx.deploy.content import Content, first_tensor
from lotion_fx.deploy.exporting import same
from lotion_fx.deploy.layout import Layout
from lotion_fx.deploy.layouts import LAYOUTS, layout_of
from lotion_fx.deploy.loading import content_of
from lotion_fx.expected import expected_loss
from lotion_fx.loss_graph import called, loss_of, pair
from lotion_fx.progress import with_a_bar
from lotion_fx.scalars import shown
from lotion_fx.switches import full_precision, switched

LOTION = "lotion"
"""The layout that holds all of a model's state, under the model's own names."""


@dataclass(frozen=True)
class Compared:
    """One weight.

    Args:
        name: in the model.
        format: its format's name.
        bits: of a weight, scales included.
        is_packed: whether the client holds its codes; else it is dense, at the rounded values.
        is_equal: whether the client's values are those of `eval()`, bit for bit; None where it is dense.
        expected: the increase of the loss that rounding it alone is expected to cause; None without a batch.
        realized: the increase that rounding it alone to nearest does cause.
    """

    name: str
    format: str
    bits: float
    is_packed: bool
    is_equal: bool | None
    expected: float | None = None
    realized: float | None = None


@dataclass(frozen=True)
class Verification:
    """An export, compared with its model. ``str()`` is a table.

    Args:
        layout: its name.
        weights: compared one by one.
        outputs: the largest absolute and the relative (L2) difference of the client's outputs from those of `eval()`;
            None where there were no inputs, or no client runs it.
        why: no outputs were compared.
        others: the other tensors of the state, biases and norms, that differ, and names that only the model or only
            the export has, or has for another tensor; only layout "lotion" compares them.
    """

    layout: str
    weights: tuple[Compared, ...]
    outputs: tuple[float, float] | None
    why: str = ""
    others: tuple[str, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether every packed weight is read bit for bit, at least one is packed, and ``others`` is empty."""
        packed = [w.is_equal for w in self.weights if w.is_packed]
        return bool(packed) and all(packed) and not self.others

    def __str__(self) -> str:
        with_loss = any(w.expected is not None for w in self.weights)
        headers = ["weight", "format", "bits", "client", *(["expected", "realized"] if with_loss else [])]
        rows = [
            [w.name, w.format, f"{w.bits:.2f}", _verdict(w), *([_shown(w.expected), _shown(w.realized)] * with_loss)]
            for w in self.weights
        ]
        if self.outputs is None:
            foot = f"outputs not compared: {self.why}"
        else:
            largest, relative = self.outputs
            foot = f"outputs differ by {largest:.2g} at most, {relative:.2g} relative" if largest else "outputs equal"
        rows += [[name, "", "", "DIFFERENT", *[""] * (len(headers) - 4)] for name in self.others]
        return tabulate(rows, headers, disable_numparse=True) + f"\nlayout {self.layout}; {foot}"


def _verdict(weight: Compared) -> str:
    return "dense, rounded" if not weight.is_packed else "equal" if weight.is_equal else "DIFFERENT"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:+.3g}"


def verify(
    path: str | os.PathLike[str], model: nn.Module | str | os.PathLike[str], batch: Any = None, loss_fn: Any = None
) -> Verification:
    """Reads an export with its client's own library, and compares weights and outputs with the trained model's.

    Args:
        path: what `export` wrote.
        model: the transformed model that was exported, as it was then; or the folder of its export of layout "lotion".
        batch: inputs to compare outputs on: the arguments of the model (a dictionary of keywords, a tuple, or one
            argument), or with ``loss_fn`` a pair (inputs, targets). Where it gives a loss, each weight's part of its
            increase is told too.
        loss_fn: of outputs and targets; None where the model returns its loss, or for no losses.

    Raises:
        TypeError: ``path`` is no path.
        ValueError: ``path`` is no export, is damaged, or the model is not under lotion_fx; or ``loss_fn`` has no batch,
            or one that is no pair.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path={shown(path)}: expected the file or folder that lotion_fx.export wrote")
    if loss_fn is not None:
        pair(batch)
    place = Path(path).expanduser()
    layout, dense = _found(place)
    is_transformed = not isinstance(model, (str, os.PathLike))
    content = content_of(Path(model).expanduser()) if isinstance(model, (str, os.PathLike)) else Content.of(model)
    model = content.model
    read, others, known = {}, list[str](), set[str]()
    for name, tensor in with_a_bar("verifying", layout.read(place, content), len(content.weights)):
        if name in content.weights:
            read[name] = same(tensor, content.weights[name].dequantize())
        elif layout.name == LOTION and not (name in content.others and same(tensor, content.others[name])):
            others.append(name)
        known.add(name)
    if layout.name == LOTION:
        read |= dict.fromkeys(content.weights.keys() - read.keys(), False)
        tied = manifest.read(place)["tied"].items() ^ content.tied.items()
        others += sorted((content.others.keys() - known) | {name for name, _ in tied} - set(others))
    losses = _losses(model, batch, loss_fn, content) if is_transformed else {}
    weights = tuple(
        Compared(
            name,
            weight.format.name,
            weight.bits_per_weight,
            name not in dense and name in read,
            read.get(name) if name not in dense else None,
            *losses.get(name, (None, None)),
        )
        for name, weight in content.weights.items()
    )
    outputs, why = _outputs(layout, place, model, batch[0] if loss_fn is not None else batch)
    return Verification(layout.name, weights, outputs, why, tuple(others))


def _found(place: Path) -> tuple[Layout, Mapping[str, str]]:
    """The layout of an export, and which of its weights are dense."""
    if place.is_dir():
        told = manifest.read(place)
        for name in told["files"]:
            manifest.check_file(place, name, told)
        return layout_of(told["layout"]), told["dense"]
    for name in LAYOUTS:
        with contextlib.suppress(ModuleNotFoundError):
            layout = layout_of(name)
            if layout.suffix and layout.suffix == place.suffix and place.is_file():
                return layout, {}
    raise ValueError(f"path={str(place)!r}: no export of lotion_fx is here, or the library that reads it is missing")


@torch.no_grad()
def _outputs(layout: Layout, place: Path, model: nn.Module, inputs: Any) -> tuple[tuple[float, float] | None, str]:
    if inputs is None:
        return None, "no batch was given"
    with _in_eval(model), switched(model, override=""):
        wanted = first_tensor(called(model, copied(inputs)))
    if not wanted.numel() or not wanted.isfinite().all():
        raise ValueError(f"batch: outputs {list(wanted.shape)} of the model are empty or no finite numbers")
    try:
        found = layout.outputs(place, model, copied(inputs))
    except NotImplementedError as error:
        return None, str(error)
    difference = found.double().cpu() - wanted.double().cpu()
    return (float(difference.abs().max()), float(difference.norm() / wanted.double().norm().clamp(min=1e-300))), ""


@contextlib.contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _losses(
    model: nn.Module, batch: Any, loss_fn: Any, content: Content
) -> dict[str, tuple[float | None, float | None]]:
    """Each weight's expected increase of the loss, and that of rounding it alone to nearest."""
    if batch is None or (loss_fn is None and not (isinstance(batch, Mapping) and "labels" in batch)):
        return {}
    expected = {name: float(term.detach()) for name, term in expected_loss(model, batch, loss_fn).terms.items()}

    def loss() -> float:
        given = copied(batch)
        if loss_fn is not None:
            return float(loss_fn(called(model, given[0]), given[1]))
        return float(loss_of(called(model, given)))

    parameters = dict(model.named_parameters())
    realized = {}
    with torch.no_grad(), _in_eval(model), full_precision(model):
        latent = loss()
        for name, weight in with_a_bar("realized losses", content.weights.items(), len(content.weights)):
            own = parameters[name].detach().clone()
            try:
                parameters[name].copy_(weight.dequantize())
                realized[name] = loss() - latent
            finally:
                parameters[name].copy_(own)
    return {name: (expected.get(name), realized[name]) for name in content.weights}
