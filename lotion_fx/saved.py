"""What a resume needs beside the model's and the optimizer's own state dicts."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lotion_fx import private_ranks
from lotion_fx.passes.attach.probe import Code
from lotion_fx.passes.attach.usage import Use
from lotion_fx.scalars import shown
from lotion_fx.state import Smoothing, Weight, names_of, smoothings_of, weights_of

loaded_by_hand: weakref.WeakSet[Smoothing] = weakref.WeakSet()
"""Whose state was loaded since their last step: it wins over what rides in an optimizer's, see `riding`."""


def state_dict(model: nn.Module) -> dict[str, Any]:
    """What resuming needs beside the model's and the optimizer's own state dicts, at a step boundary.

    Plain tensors, numbers and strings: `torch.save` it, load it with ``weights_only=True``.
    """
    names = names_of(model)
    phases = [smoothing.tally.saved() for smoothing in smoothings_of(model)]
    weights = {
        names[weight]: {name: v.clone() if isinstance(v, Tensor) else v for name, v in saved_of(weight).items()}
        for weight in weights_of(model)
    }
    return {"version": 1, "phases": phases, "weights": weights}


def saved_of(weight: Weight) -> dict[str, Any]:
    """What resuming needs of one weight; its tensors are those in use."""
    return {
        "uses": None if weight.uses is None else [asdict(use) for use in weight.uses],
        "ema": weight.curvature.ema,
        "code": None if weight.curvature.code is None else int(weight.curvature.code),
        "steps": weight.gathered.steps,
        "last_step": weight.gathered.last_step,
        "gains": list(weight.gains),
        "format": None if weight.format is None else weight.format.name,
        "shard": _shard(weight),
    }


def load_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Restores what `state_dict` gave, into a model transformed with the same arguments.

    Raises:
        TypeError: the state is no mapping.
        ValueError: the state is of another version, curvature, noise, set of parameters, or format of one of them;
            nothing is changed then.
    """
    names, smoothings = names_of(model), smoothings_of(model)
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state={shown(state)}: expected what lotion_fx.state_dict returned, not {type(state).__name__}"
        )
    if state.get("version") != 1 or not {"weights", "phases"} <= state.keys():
        raise ValueError(
            f"state: expected what lotion_fx.state_dict returned, version 1, got version {state.get('version')!r} with "
            f"keys {', '.join(map(str, list(state)[:4])) or 'none'}"
        )
    if differing := sorted(set(names.values()) ^ set(state["weights"])):
        raise ValueError(f"state: parameters differ from the model's, first {differing[0]!r}; transform the same model")
    for setting, expected, default in (
        ("curvature", [s.settings.curvature for s in smoothings], None),
        ("noise", [s.settings.noise.name for s in smoothings], "randomized"),
    ):
        found = [phase.get(setting, default) for phase in state["phases"]]
        if expected != found:
            raise ValueError(
                f"state: saved with {setting}={found}, this model has {expected}; transform it the same way"
            )
    for weight, name in names.items():
        now = None if weight.format is None else weight.format.name
        before = state["weights"][name].get("format", now)  # states of before told none
        if before != now:
            raise ValueError(
                f"state: saved with {name!r} in {before or 'full precision'}, this model has it in "
                f"{now or 'full precision'}; transform it with the same fmt and only"
            )
        shard, before = _shard(weight), state["weights"][name].get("shard")
        if state["weights"][name]["ema"] is not None and shard != before:
            raise ValueError(
                f"state: of {name!r} it has the part {before or 'whole'}, this rank holds {shard or 'all'}: under "
                "curvature='fisher' an optimizer without exp_avg_sq leaves each rank a part of its own; save and load "
                "on each rank of as many, or take AdamW"
            )
    for smoothing, phase in zip(smoothings, state["phases"], strict=True):
        resume(smoothing, phase)
    for weight, name in names.items():
        restore(weight, state["weights"][name])
    loaded_by_hand.update(smoothings)


def resume(smoothing: Smoothing, phases: Mapping[str, Any]) -> None:
    """Has a training stand where `Tally.saved` was called; says so where the schedule has another phase there.

    A plain phase may go on as any, so that one plain training is the beginning of several.
    """
    tally = smoothing.tally
    tally.restore(phases)
    before, now = phases.get("phase"), tally.phase.name
    last = now if tally.chosen else smoothing.settings.schedule.phase(max(0, tally.steps - 1)).name  # between two
    if tally.steps and before not in (None, "plain", now, last):
        warnings.warn(
            f"the loaded state was saved after {tally.steps} steps in phase {before!r}, and this model goes "
            f"on in phase {now!r}, by its own method, schedule and steps: transform it as the saved one was, unless "
            "that is meant",
            stacklevel=3,
        )


def _shard(weight: Weight) -> list[list[int]] | None:
    """[start, stop) along each dimension of what its state is of, where this is less than the weight."""
    parameter = weight.master
    if not isinstance(parameter, DTensor) or not weight.smoothing.settings.reads_moment:
        return None
    return [list(span) for span in private_ranks.local_spans(parameter)]


def restore(weight: Weight, saved: Mapping[str, Any]) -> None:
    """Makes a weight what `saved_of` said."""
    parameter = weight.parameter()
    device = parameter.device if parameter is not None else None
    if saved["uses"] is not None:
        weight.learn([Use(**use) for use in saved["uses"]])
    weight.curvature.ema = None if saved["ema"] is None else saved["ema"].to(device, copy=True)
    weight.curvature.code = None if saved["code"] is None else Code(saved["code"])
    weight.gains = tuple(saved["gains"])
    weight.gathered.restore(saved["steps"], saved.get("last_step"))
