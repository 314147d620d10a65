"""Our state rides in the optimizer's: what every pipeline saves and loads already holds what a resume needs.

What `Optimizer.state_dict` tells has one more entry in each weight's state, ``"lotion_fx"``: a vector of bytes, which
no optimizer ever meets at a step. Bytes, for `load_state_dict` casts whatever it loads to the parameter's dtype, in
which 0 to 255 are exact; and of a length that the weight's shape tells, for torch.distributed.checkpoint reads into
what a new optimizer has. What is loaded is taken in at once.
"""

from __future__ import annotations

import inspect
import json
import math
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lotion_fx.saved import loaded_by_hand, restore, resume, saved_of
from lotion_fx.shards import local_of
from lotion_fx.state import Smoothing, Weight, registry

KEY = "lotion_fx"
PAGE = 4096  # bytes; the text that stands before the curvature takes whole pages

_known: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # those that tell our entries
_filled: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # with an entry for parameters that are no weights
_emptied: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # loaded with nothing after steps, and told of
_waiting: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # loaded with entries of weights that nobody knows yet
_without: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # loaded in mid-training without any


def watch() -> None:
    """Looks, from now on, into what any optimizer loads.

    A new optimizer that resumes has taken no step at which a hook could have been put on it, and some have a
    ``load_state_dict`` of their own; all end in ``__setstate__``.
    """
    original = Optimizer.__setstate__
    if getattr(original, "is_watched", False):
        return

    def set_state(self: Optimizer, state: dict[str, Any]) -> None:
        original(self, state)
        if "defaults" not in state:  # a copy has those too, and its model is a copy, or not ours
            take_in(self)

    set_state.is_watched = True  # type: ignore[attr-defined]
    Optimizer.__setstate__ = set_state  # type: ignore[method-assign]


def take_in_waiting() -> None:
    """Takes in what was loaded before its model was transformed."""
    for optimizer in list(_waiting):
        take_in(optimizer)


@torch.no_grad()
def take_in(optimizer: Optimizer) -> None:
    """Takes in, and away, what an optimizer has loaded for weights that are known."""
    states = _states(optimizer)
    entries = [parameter for parameter, state in states.items() if KEY in state]
    _waiting.discard(optimizer)
    is_without = not entries and any(_has_stepped(state) for state in states.values())
    (_without.add if is_without else _without.discard)(optimizer)
    if not optimizer.state and optimizer in _known:  # a new one's may be loaded with itself, as Accelerate does
        _tell_of_nothing(optimizer)
    for parameter in entries:
        if states[parameter][KEY].numel() == 1:  # of one that is no weight
            _pop(optimizer, parameter)
    entries = [parameter for parameter in entries if KEY in (optimizer.state.get(parameter) or ())]
    misfits: dict[str, list[str]] = {}
    for parameter, weight in zip(entries, registry.find(entries), strict=True):
        if weight is None:
            _waiting.add(optimizer)
            continue
        entry = _pop(optimizer, parameter)
        _tells(optimizer)
        if weight.smoothing not in loaded_by_hand and (why := _restore(weight, entry)):
            misfits.setdefault(why, []).append(weight.name)
    for why, names in misfits.items():
        warnings.warn(
            f"the optimizer's loaded state was saved with {why} for {_listed(names)}: it is left out and curvature is "
            "gathered anew; transform the model as the saved one was, or go on",
            stacklevel=2,
        )


def _has_stepped(state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state is of after a step: Adagrad's is there before the first."""
    return "step" not in state or float(state["step"]) > 0


def _tell_of_nothing(optimizer: Optimizer) -> None:
    """Warns, once, where an optimizer that has stepped loads the state of before its first step.

    Its training may begin anew, as after a search for a learning rate, or go on with fresh moments.
    """
    found = [weight for weight in registry.find(_parameters(optimizer)) if weight is not None]
    stepped = [w for w in found if w.gathered.steps and w.selected and w.smoothing not in loaded_by_hand]
    if stepped and optimizer not in _emptied:
        _emptied.add(optimizer)
        tally = stepped[0].smoothing.tally
        warnings.warn(
            f"the optimizer has loaded an empty state, and lotion_fx goes on in phase {tally.phase.name!r} after "
            f"{tally.steps} steps, with the curvature that it has: if the training begins anew, call "
            "lotion_fx.load_state_dict(model, state) with lotion_fx.state_dict(model) of then; else "
            "all is well",
            stacklevel=2,
        )


def before_step(optimizer: Any, pairs: Iterable[tuple[Tensor, Weight]]) -> None:
    """Leaves an optimizer its own state alone, and has it tell our entries whenever it is asked for it.

    Args:
        optimizer: about to step.
        pairs: its parameters that are weights.
    """
    pairs = list(pairs)
    if pairs and isinstance(optimizer, Optimizer):
        _tells(optimizer)
    for parameter in _parameters(optimizer) if optimizer in _filled else [parameter for parameter, _ in pairs]:
        if KEY in (optimizer.state.get(parameter) or ()):
            _pop(optimizer, parameter)
    _waiting.discard(optimizer)
    _tell_missing(optimizer, [weight for _, weight in pairs])
    for smoothing in {weight.smoothing for _, weight in pairs}:
        loaded_by_hand.discard(smoothing)


def _tells(optimizer: Optimizer) -> None:
    """From now on an optimizer tells our entries with its state."""
    if optimizer not in _known:
        _known.add(optimizer)
        optimizer.register_state_dict_post_hook(_tell)


def stay(optimizer: Optimizer) -> None:
    """Puts our entries into an optimizer's own state until its next step.

    torch.distributed.checkpoint takes the names of a new optimizer's state from a first step of nothing.
    """
    for parameter, entry in _entries(optimizer).items():
        optimizer.state[parameter][KEY] = entry


def _tell(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Adds our entries to an optimizer's state as it is told, and to its own where that is asked for its names."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    names_of = dict(zip(_parameters(optimizer), names, strict=True))
    entries, stays = _entries(optimizer), is_checkpointing()
    if entries and stays and not any(set(own) - {KEY} for own in optimizer.state.values()):
        # Which wants a state of all parameters or of none.
        _filled.add(optimizer)
        entries = {parameter: entries.get(parameter, torch.zeros(1, dtype=torch.uint8)) for parameter in names_of}
    for parameter, entry in entries.items():
        state["state"][names_of[parameter]] = {**state["state"].get(names_of[parameter], {}), KEY: entry}
        if stays:
            optimizer.state[parameter][KEY] = entry


def is_checkpointing() -> bool:
    """Whether torch.distributed.checkpoint asks, which looks for names in the optimizer's own state afterwards."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") != "torch.distributed.checkpoint.state_dict":
        frame = frame.f_back
    return frame is not None


@torch.no_grad()
def _entries(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """Our entries as they are now."""
    parameters = _parameters(optimizer)
    pairs = [(p, w) for p, w in zip(parameters, registry.find(parameters), strict=True) if w is not None and w.format]
    # Where a state is empty an optimizer makes its moments, so it stays empty, unless steps have left it so.
    stateful = [(p, w) for p, w in pairs if set(optimizer.state.get(p) or ()) - {KEY} or w.gathered.steps]
    phased: set[Smoothing] = set()
    entries = {}
    for parameter, weight in stateful or pairs:
        moment = "exp_avg_sq" in (optimizer.state.get(parameter) or ())
        has_phases = weight.smoothing not in phased
        entries[parameter] = _entry(weight, parameter, has_phases=has_phases, has_moment=moment)
        phased.add(weight.smoothing)
    return entries


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]


def _states(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    """Its parameters' states that hold something."""
    states = getattr(optimizer, "state", {})
    found = ((parameter, states.get(parameter)) for parameter in _parameters(optimizer))
    return {parameter: state for parameter, state in found if isinstance(state, dict) and state}


def _pop(optimizer: Optimizer, parameter: Tensor) -> Tensor:
    entry: Tensor = optimizer.state[parameter].pop(KEY)
    if not optimizer.state[parameter]:
        del optimizer.state[parameter]
    return entry


def _tell_missing(optimizer: Optimizer, weights: list[Weight]) -> None:
    if optimizer not in _without:
        return
    _without.discard(optimizer)
    missing = [
        weight
        for weight in weights
        if weight.selected
        and weight.smoothing not in loaded_by_hand
        and (weight.smoothing.tally.has_term or weight.smoothing.settings.schedule.steps)
    ]
    if missing:
        warnings.warn(
            "the optimizer's state was loaded in mid-training and holds nothing of lotion_fx for "
            f"{_listed([weight.name for weight in missing])}: curvature is gathered anew, "
            "and phases count their steps from here; call lotion_fx.load_state_dict(model, ...) after loading where "
            "lotion_fx.state_dict(model) was saved, else go on",
            stacklevel=2,
        )


def _listed(names: list[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


# -------------------------------------------------------------------------------------------------------------- entries


def _entry(weight: Weight, parameter: Tensor, *, has_phases: bool, has_moment: bool) -> Tensor:
    """A weight's entry, uint8: ``[length of the text | text | curvature, float32]``, in whole pages and with room."""
    settings, saved = weight.smoothing.settings, saved_of(weight)
    vector, device = saved.pop("ema"), local_of(parameter).device
    if settings.reads_moment and weight.shard is not None:
        vector = None  # of this rank's shard alone, and other ranks may be those that read it
    text = {**saved, **_made_with(weight), "name": weight.name, "vector": None if vector is None else vector.numel()}
    if has_phases:
        text["phases"] = weight.smoothing.tally.saved()
    data = json.dumps(text, default=_plain).encode()
    data = len(data).to_bytes(8, "little") + data
    head = torch.frombuffer(bytearray(data.ljust(-(-len(data) // PAGE) * PAGE, b"\0")), dtype=torch.uint8).to(device)
    values = torch.zeros(0, device=device) if vector is None else vector.detach().float().contiguous()
    room = torch.zeros(4 * max(0, _room(weight, has_moment) - values.numel()), dtype=torch.uint8, device=device)
    return torch.cat([head, values.view(torch.uint8), room])


def _room(weight: Weight, has_moment: bool) -> int:
    """How long a weight's vector may become, as far as its shape and its module tell before any graph does."""
    settings, shape = weight.smoothing.settings, weight.shape
    if not settings.schedule.has_term or (settings.reads_moment and (has_moment or weight.shard is not None)):
        return 0
    if settings.reads_moment or settings.curvature == "full":
        return 1 + math.prod(shape)
    grouped = [m.groups for ref, _ in weight.owners if isinstance(m := ref(), _CONVOLUTIONS)]
    cut = [(groups, shape[0] // groups) for groups in grouped] or [(1, shape[0])]
    if len(shape) > 2 and not grouped:
        cut.append((shape[0], shape[1]))  # a stack of experts
    layouts = [weight.layout, *(replace(weight.layout, groups=groups, rows=rows) for groups, rows in cut)]
    return 1 + max(layout.payload for layout in layouts)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
    raise TypeError(f"{value!r}: expected a number, a string or a tensor in saved state")


def _rich(value: dict[str, Any]) -> Any:
    is_tensor = value.keys() == {"tensor", "values"}
    return torch.tensor(value["values"], dtype=getattr(torch, value["tensor"])) if is_tensor else value


def _restore(weight: Weight, entry: Any) -> str:
    """Makes a weight what its entry says; where that is of another transform, says how, and does nothing."""
    parameter = weight.parameter()
    assert parameter is not None  # by which it was found
    saved = _read(entry, local_of(parameter).device)
    for name, now in _made_with(weight).items():
        if saved.get(name) != now and not _is_plain(saved):
            return f"{name}={saved.get(name)!r}, where the model has {now!r},"
    if "phases" in saved:
        resume(weight.smoothing, saved["phases"])
    if not _is_plain(saved) and _is_of_another(weight, saved.get("name")):
        return "parameters in another order"
    restore(weight, saved)
    return ""


def _is_of_another(weight: Weight, saved: str | None) -> bool:
    """Whether an entry was another weight's: an optimizer knows its parameters by their order alone.

    A name that no weight has tells nothing: wrappers come and go.
    """
    return saved != weight.name and any(other.name == saved for other in weight.smoothing.weights)


def _is_plain(saved: Mapping[str, Any]) -> bool:
    """Whether an entry holds nothing that a format, a curvature or a noise law made: training was plain so far.

    Any transform goes on from it, so one plain training is the beginning of several.
    """
    return bool(saved) and saved["ema"] is None and saved["code"] is None


def _made_with(weight: Weight) -> dict[str, Any]:
    """What an entry must have been written under."""
    settings, fmt = weight.smoothing.settings, weight.format
    return {
        "format": None if fmt is None else fmt.name,
        "curvature": settings.curvature,
        "noise": settings.noise.name,
    }


def _read(entry: Any, device: torch.device) -> Mapping[str, Any]:
    """What an entry says, whatever dtype its bytes were cast to; nothing where it is none of ours."""
    if not isinstance(entry, Tensor) or entry.numel() < PAGE:
        return {}
    data = local_of(entry).to(device, torch.uint8).contiguous()
    length = int.from_bytes(bytes(data[:8].tolist()), "little")
    if not 0 < length <= data.numel() - 8:
        return {}
    saved: dict[str, Any] = json.loads(bytes(data[8 : 8 + length].tolist()), object_hook=_rich)
    start, count = -(-(8 + length) // PAGE) * PAGE, saved.pop("vector")
    saved["ema"] = None if count is None else data[start : start + 4 * count].view(torch.float32).clone()
    return saved
