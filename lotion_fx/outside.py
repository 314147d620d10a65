"""Weights that no graph contains: `nn.RNN`, `nn.LSTM` and `nn.GRU`, which Dynamo skips.

Their expected-loss term takes the Fisher form at the step like any weight without a graph. What is left is that a
forward outside of training must run at rounded weights as everywhere: two hooks swap the values for that long.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from lotion_fx import rounding
from lotion_fx.passes.smooth import RR
from lotion_fx.state import Smoothing, registry

SKIPPED = (nn.RNNBase,)
_latent: weakref.WeakKeyDictionary[nn.Module, list[tuple[Tensor, Tensor]]] = weakref.WeakKeyDictionary()


def hook_skipped(model: nn.Module, smoothing: Smoothing) -> None:
    """Hooks every recurrent module of a model; refuses methods whose training forward would have to be rounded.

    Raises:
        ValueError: such a weight is to be quantized by a method other than ``"lotion"`` and ``"ptq"``.
    """
    for module in model.modules():
        if not isinstance(module, SKIPPED):
            continue
        weights = [weight for weight in registry.owned.get(module, {}).values() if weight.format is not None]
        if weights and smoothing.method not in ("lotion", "ptq"):
            raise ValueError(
                f"method={smoothing.method!r} needs a rounded training forward, and {weights[0].name!r} lies in an "
                f"nn.{type(module).__name__}, which no graph contains; use method='lotion', or leave it out with "
                f"only={{{weights[0].name.rpartition('.')[0] + '.*'!r}: None}}"
            )
        if weights:
            module.register_forward_pre_hook(_round)
            module.register_forward_hook(_restore, always_call=True)


def _round(module: nn.Module, args: Any) -> None:
    for attribute, weight in registry.owned.get(module, {}).items():
        override = weight.smoothing.override
        if weight.format is None or override == "latent" or (module.training and override is None):
            continue
        parameter = module._parameters[attribute]
        assert parameter is not None
        rounded = (rounding.rr if override == RR else rounding.rtn)(parameter.detach(), weight.format, weight.axis)
        _latent.setdefault(module, []).append((parameter, parameter.data))
        parameter.data = rounded


def _restore(module: nn.Module, args: Any, output: Any) -> None:
    for parameter, values in _latent.pop(module, []):
        parameter.data = values
