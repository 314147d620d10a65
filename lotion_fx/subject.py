"""What a command works on: a model with a batch and a loss, named as ``module:callable`` or as a folder."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lotion_fx.attributes import attribute_of, config_of
from lotion_fx.loss_graph import LossFunction, called, loss_of, misfit, pair, scalar
from lotion_fx.presets import preset
from lotion_fx.state import smoothings_of
from lotion_fx.transformation import transform


@dataclass(frozen=True)
class Subject:
    """A model, and what it can be run on.

    Args:
        model: plain or transformed.
        batch: ``(inputs, targets)`` where there is a loss function, else the model's own arguments; None for no batch.
        loss_fn: None where the model returns its loss.
    """

    model: nn.Module
    batch: Any = None
    loss_fn: LossFunction | None = None

    def loss(self) -> Tensor:
        """The loss of the batch, 0-d, with its graph.

        Raises:
            ValueError: there is no batch, or no loss in what the model returns.
        """
        self.needs_batch()
        out = self.run()
        return loss_of(out) if self.loss_fn is None else scalar(self.loss_fn(out, pair(self.batch)[1]), "loss_fn")

    def run(self) -> Any:
        """The model's output for the batch."""
        return called(self.model, self.inputs)

    @property
    def inputs(self) -> Any:
        """What of the batch the model takes."""
        return self.batch if self.loss_fn is None else pair(self.batch)[0]

    def needs_batch(self) -> None:
        """Raises `ValueError` where there is none."""
        if self.batch is None:
            raise ValueError("source: it gives a model alone; let it return (model, batch) or (model, batch, loss_fn)")


def subject(source: str) -> Subject:
    """What a name stands for, made anew at each call.

    Args:
        source: ``package.module:callable`` or ``path/to/file.py:callable``, of a callable without arguments that
            returns a model, ``(model, batch)`` or ``(model, batch, loss_fn)``; or the folder of a Hugging Face
            checkpoint, whose batch is some tokens with themselves as labels.

    Raises:
        TypeError: the callable takes arguments.
        ValueError: it names nothing, or the callable returns something else.
    """
    if is_reference(source):
        make = _referenced(source)
        if why := misfit(make, ()):
            raise TypeError(f"source={source!r}: expected a callable without arguments, {why}")
        try:
            found = make()
        except Exception as error:
            raise ValueError(f"source={source!r}: it raised {_said(error)}") from error
        parts = found if isinstance(found, tuple) else (found,)
        if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
            raise ValueError(
                f"source={source!r}: it returned {_told(found)}; expected a model, (model, batch) or (model, batch, "
                "loss_fn)"
            )
        if len(parts) == 3 and not callable(parts[2]):
            raise ValueError(f"source={source!r}: its loss_fn is {parts[2]!r}; expected a function (output, targets)")
        return Subject(*parts)
    if not Path(source, "config.json").is_file():
        raise ValueError(
            f"source={source!r}: no Hugging Face checkpoint is there; give its folder, or package.module:callable"
        )
    model = checkpoint(Path(source)).train()  # it comes in eval()
    return Subject(model, _with_labels(model))


def transformed(source: str, fmt: str | None, only: str | None, inner: str = "aot_eager") -> Subject:
    """The subject, its model transformed: by its maker, or here where a format is given.

    Args:
        source: as `subject` takes it.
        fmt, inner: as `transform` takes them.
        only: of `preset`.

    Raises:
        ValueError: a format is given of a transformed model, or none of a plain one.
    """
    torch.manual_seed(0)
    found = subject(source)
    if smoothings_of(found.model):
        if fmt is not None or only is not None:
            raise ValueError(f"--fmt, --only: the model of {source!r} is transformed already; leave them out")
        return found
    if fmt is None:
        raise ValueError(
            f"--fmt: the model of {source!r} is not transformed; it needs a format, such as int4 or nvfp4/pow2"
        )
    chosen = None if only is None else preset(only)
    transform(found.model, fmt, only=chosen, inner=inner, calibrate=False)  # whose first step has a term
    return found


def why_it_fails(source: str) -> str:
    """What a reference's own model, before it is transformed, fails with on its batch; empty if it does not."""
    if not is_reference(source) or (found := subject(source)).batch is None or smoothings_of(found.model):
        return ""
    try:
        found.loss()
    except Exception as error:  # whatever a model of the user's raises
        return f"source={source!r}: its model, as it is, fails on its batch with {_said(error)}"
    return ""


def _said(error: Exception) -> str:
    """An error's kind and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def is_reference(source: str) -> bool:
    """Whether it is written as ``module:callable``, and no file or folder has this name."""
    return source.rpartition(":")[2].isidentifier() and ":" in source and not Path(source).exists()


def checkpoint(folder: Path) -> nn.Module:
    """The model of a Hugging Face checkpoint, in the dtype that it was saved in."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    if not config.architectures:
        raise ValueError(f"source={str(folder)!r}: its config.json names no architectures, so no class to load it by")
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype="auto")


def tokens_for(model: nn.Module) -> dict[str, Tensor] | None:
    """Some tokens for a Hugging Face language model, int64 [1, 16], always the same; None for other models."""
    size = attribute_of(config_of(model), "vocab_size")
    if size is None:
        return None
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(size, (1, 16), generator=generator)}


def _with_labels(model: nn.Module) -> dict[str, Tensor] | None:
    tokens = tokens_for(model)
    return tokens and {**tokens, "labels": tokens["input_ids"]}


def _referenced(source: str) -> Callable[[], Any]:
    name, _, attribute = source.rpartition(":")
    module = _loaded(name, source)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"source={source!r}: {name} has no callable {attribute!r}")
    return function


def _loaded(name: str, source: str) -> ModuleType:
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ValueError(f"source={source!r}: there is no file {name}")
        return _of_file(Path(name).resolve())
    here = os.getcwd()
    _look_in(here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"source={source!r}: {error.name} cannot be imported from {here}") from error
    except Exception as error:
        raise ValueError(f"source={source!r}: importing {name} raised {_said(error)}") from error


def _of_file(path: Path) -> ModuleType:
    """A file as a module, imported once, with its neighbours in reach as they are for ``python path``."""
    name = f"_subject_{path.stem}_{abs(hash(path)):x}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # of a .py file there always is one
        _look_in(str(path.parent))
        sys.modules[name] = importlib.util.module_from_spec(spec)  # classes and compiled code look for their module
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException as error:
            del sys.modules[name]
            if isinstance(error, Exception):
                raise ValueError(f"source: {path} cannot be run: {_said(error)}") from error
            raise
    return sys.modules[name]


def _look_in(folder: str) -> None:
    if folder not in sys.path:  # a command's own begins with the command's folder, not with the user's
        sys.path.insert(0, folder)


def _told(found: Any) -> str:
    if isinstance(found, tuple):
        return f"({', '.join(type(part).__name__ for part in found)})"
    return type(found).__name__
