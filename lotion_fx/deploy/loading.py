"""`load`: a model from an export of layout "lotion"."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from lotion_fx import private
from lotion_fx.deploy import huggingface
from lotion_fx.deploy.content import Content
from lotion_fx.deploy.layouts import lotion
from lotion_fx.deploy.packed_model import hold
from lotion_fx.deploy.weights import QuantizedWeight
from lotion_fx.scalars import check_flag, shown


def load(path: str | os.PathLike[str], model: nn.Module | None = None, *, packed: bool = True) -> nn.Module:
    """A model at the weights of an export, in eval().

    Args:
        path: a folder that `export` wrote with layout "lotion".
        model: a plain module of the architecture that was exported, whose tensors are replaced, in place, by those of
            the export, in the dtypes that they had there. It may be left out for a Hugging Face model, whose
            configuration is in the folder.
        packed: whether the weights stay packed, as `quantize` holds them; else they are dense tensors.

    Raises:
        ValueError: the export is damaged, of another layout, or does not fit the model; or no model is given and the
            folder has no configuration.
        TypeError: the model is no module.
    """
    check_flag("packed", packed)
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path={shown(path)}: expected the folder that lotion_fx.export wrote")
    made, weights = _loaded(Path(path).expanduser(), model)
    if packed:
        hold(made, weights)
    return made


def content_of(path: Path, model: nn.Module | None = None, tokenizer: Any = None) -> Content:
    """What an export of layout "lotion" holds, to be laid out anew; arguments and errors are those of `load`."""
    made, weights = _loaded(path, model)
    return Content.with_weights(made, weights, tokenizer)


def _loaded(folder: Path, model: nn.Module | None) -> tuple[nn.Module, dict[str, QuantizedWeight]]:
    """A plain module at the dense values of an export, in eval(), and the weights' codes."""
    weights, others, tied = lotion.read(folder)
    made = huggingface.made(folder) if model is None else model
    if not isinstance(made, nn.Module):
        raise TypeError(f"model={shown(model)}: expected a plain nn.Module, not {type(model).__name__}")
    if any(private.before_of(module) is not None for module in made.modules()):
        raise ValueError("model: it is under lotion_fx; give a plain module, and transform it afterwards to train on")
    lotion.fill(made, weights, others, tied)
    return made.eval(), weights
