"""What is deployed of a trained model: its weights rounded by one of `ROUNDINGS`, and the loss there."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import lotion_fx
from accuracy.adaround import adaround
from accuracy.recipes import BATCHES, ROUNDINGS
from accuracy.setting import Setting


def holding(setting: Setting, state: Mapping[str, Tensor]) -> nn.Module:
    """A plain model of a setting with a state."""
    model = setting.make(0)
    model.load_state_dict(state)
    return model


def rounded(
    setting: Setting, state: Mapping[str, Tensor], fmt: str, rounding: str, seed: int
) -> tuple[nn.Module, float]:
    """A model in ``eval()`` at the rounded weights that a state's are deployed as, and the seconds that rounding took.

    Args:
        state: of the model, its weights latent.
        rounding: one of `ROUNDINGS`.
        seed: of the batches that the rounding sees.
    """
    if rounding == "adaround":
        return _adarounded(setting, state, fmt, seed)
    torch.compiler.reset()  # of graphs of one code Dynamo keeps a few
    model = lotion_fx.transform(holding(setting, state), fmt, method="ptq", inner="aot_eager").eval()
    began = time.perf_counter()
    if told := ROUNDINGS[rounding]:
        batches = setting.calibration(seed, *([BATCHES[rounding]] if rounding in BATCHES else []))
        lotion_fx.round_(model, batches, setting.loss, likelihood=setting.likelihood, **{"in_order": False, **told})
        model.eval()
    return model, time.perf_counter() - began


def _adarounded(setting: Setting, state: Mapping[str, Tensor], fmt: str, seed: int) -> tuple[nn.Module, float]:
    model, known = holding(setting, state).eval(), formats(setting, state, fmt)
    began = time.perf_counter()
    adaround(model, [inputs for inputs, _ in setting.calibration(seed)], known)
    return model, time.perf_counter() - began


@torch.no_grad()
def formats(setting: Setting, state: Mapping[str, Tensor], fmt: str) -> dict[str, lotion_fx.Format]:
    """The format of every weight that `lotion_fx.transform` selects, by name; blocks run along the last dimension."""
    model, _ = rounded(setting, state, fmt, "nearest", 0)
    model(setting.calibration(0)[0][0])  # along which dimension blocks run, the first forward tells
    found = lotion_fx.quantized(model)
    assert all(weight.axis == len(weight.shape) - 1 for weight in found.values())
    return {name: weight.format for name, weight in found.items()}
