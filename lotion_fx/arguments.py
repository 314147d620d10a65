"""Every refusal of a bad argument, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lotion_fx import private
from lotion_fx.blocks import BLOCKS, blocks_of
from lotion_fx.choosing import near
from lotion_fx.likelihood import named
from lotion_fx.numerics.formats import Format
from lotion_fx.numerics.noise import RANDOMIZED, NoiseLaw
from lotion_fx.scalars import check_count, check_flag, check_loss, check_number, shown
from lotion_fx.schedule import METHODS, PHASES, TINY, Schedule, Shares, automatic, shared_out
from lotion_fx.settings import CURVATURES, EARLY, INNERS, MOMENTS, REFRESH, Settings
from lotion_fx.state import Smoothing, registry


def checked(
    settings: Settings, likelihood: Any = None, refresh: int | None = None, *, by_regions: bool = False
) -> Settings:
    """The settings that `transform` or the backend was given, if they make sense.

    Args:
        settings: without a likelihood and a refresh.
        likelihood, refresh: as `transform` takes them.
        by_regions: whether modules are compiled one by one.

    Returns:
        The settings with the likelihood's name, and with how often curvature is gathered.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
    """
    _check_known("curvature", settings.curvature, CURVATURES)
    _check_known("inner", settings.inner, INNERS)
    _check_known("moments", settings.moments, MOMENTS)
    infinite = float("inf")
    finite = "a finite number, 0 or more; 1 is the expected loss"
    check_number("strength", settings.strength, lambda x: 0 <= x < infinite, finite)
    check_number("decay", settings.decay, lambda x: 0 < x < 1, "a number between 0 and 1")
    check_flag("calibrate", settings.calibrate)
    check_number("pull", settings.pull, lambda x: 0 <= x < infinite, "a finite number, 0 or more")
    group = settings.process_group
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"process_group={shown(group)}: expected the group over which your loop averages gradients, such as "
            "torch.distributed.group.WORLD after init_process_group, or None"
        )
    early, interval = _refresh(settings, refresh)
    settings = replace(settings, likelihood=_likelihood(settings, likelihood), early=early, refresh=interval)
    _check_loss(settings, by_regions)
    return settings


def _check_known(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}{near(value, known)}")


def scheduled(
    method: str = "lotion",
    fmt: Format | None = None,
    noise: NoiseLaw = RANDOMIZED,
    schedule: Any = None,
    start: float | None = None,
    finish: float | None = None,
    finish_term: bool = True,
    steps: int | None = None,
) -> Schedule:
    """The phases of a training, of what `transform` was told, if it makes sense.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
    """
    _check_known("method", method, tuple(METHODS))
    share = "a share of the training in (0, 1], such as 0.4, or None"
    for name, value in (("start", start), ("finish", finish)):
        if value is not None:
            check_number(name, value, lambda x: 0 < x <= 1, share)
    before, after = float(start or 0), float(finish or 0)
    if before + after > 1 + TINY:
        raise ValueError(f"start={start!r} and finish={finish!r}: expected shares of one training, at most 1 together")
    check_flag("finish_term", finish_term)
    if steps is not None:
        check_count("steps", steps, 1, "the number of optimizer steps in the whole training")
    given = {"schedule": schedule, "start": start, "finish": finish}
    told = [f"{name}={shown(value)}" for name, value in given.items() if value is not None] or [f"method={method!r}"]
    if schedule is not None and (len(told) > 1 or method != "lotion"):
        other = told[1] if len(told) > 1 else f"method={method!r}"
        raise ValueError(f"{other} is a schedule of its own, beside {told[0]}; pass one of them")
    shares = shared_out(method, before, after, finish_term) if schedule is None else _phases(schedule, fmt, noise)
    is_parted = len(shares) > 1 or any(value is not None for value in given.values())
    if is_parted and steps is None:
        raise ValueError(f"{told[0]} has phases, which are shares of all steps: pass steps=, how many optimizer steps")
    if steps is not None and not is_parted:
        raise ValueError(
            f"steps={steps!r}: {told[0]} has no phases to share them; pass schedule='auto', or leave it out"
        )
    return Schedule(shares, None if steps is None else int(steps))


def _phases(schedule: Any, fmt: Format | None, noise: NoiseLaw) -> Shares:
    """The phases that ``schedule`` names."""
    if isinstance(schedule, str) and schedule == "auto" and fmt is not None:
        return automatic(fmt, noise)
    expected = "expected pairs of a phase and its share, such as (('plain', 0.6), ('ste_scale', 0.4)), or 'auto'"
    if isinstance(schedule, (str, bytes, Mapping)) or not isinstance(schedule, Sequence) or not schedule:
        raise (ValueError if isinstance(schedule, (str, Sequence)) else TypeError)(
            f"schedule={shown(schedule)}: {expected}"
        )
    for pair in schedule:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"schedule: {shown(pair)} is no phase with its share; {expected}")
        _check_known("schedule: phase", pair[0], tuple(PHASES))
        check_number(f"schedule: share of {pair[0]!r}", pair[1], lambda x: 0 < x <= 1, "a number in (0, 1]")
    shares = tuple((str(name), float(share)) for name, share in schedule)
    if abs(sum(share for _, share in shares) - 1) > 1e-6:
        total = f"{sum(share for _, share in shares):.6g}"
        raise ValueError(f"schedule={shown(schedule)}: expected shares that add to 1, and these add to {total}")
    return shares


def _likelihood(settings: Settings, likelihood: Any) -> str | None:
    """The likelihood's name, None for the curvatures that ask for none."""
    curvature = settings.curvature
    if not settings.samples_labels:
        if likelihood is not None:
            raise ValueError(
                f"likelihood={likelihood!r} is for curvature='ggn', and curvature={curvature!r}; leave it out"
            )
        return None
    if settings.inner == "eager":
        raise ValueError("curvature='ggn' is made in the joint graph, and inner='eager' compiles none; try 'aot_eager'")
    likelihood = "categorical" if likelihood is None else likelihood
    return named(likelihood)


def _refresh(settings: Settings, refresh: int | None) -> tuple[int, int]:
    """How many early steps all gather curvature, and of how many one does after them."""
    in_all = {
        "curvature='fisher' reads the optimizer's, which is at hand in every step": settings.reads_moment,
        "with loss_fn= the term may be in the loss of every step": settings.loss_fn is not None,
    }
    if refresh is None:
        seldom = not settings.samples_labels and not any(in_all.values())
        return (EARLY, REFRESH) if seldom else (0, 1)
    check_count("refresh", refresh, 1, "of how many steps one gathers curvature, 1 or more")
    for why, holds in in_all.items():
        if holds and refresh > 1:
            raise ValueError(f"refresh={refresh}: {why}; leave it out")
    return 0, refresh


def _check_loss(settings: Settings, by_regions: bool) -> None:
    loss_fn = settings.loss_fn
    if loss_fn is None:
        return
    if not (isinstance(loss_fn, str) and loss_fn == "model"):
        check_loss(loss_fn, where_returned="'model'")
    why = ""
    if not settings.schedule.has_term:
        phases = ", ".join(name for name, _ in settings.schedule.shares)
        told = f"method={settings.method!r}" if settings.method != "lotion" else f"a schedule of {phases}"
        why = f"{told} has no expected loss; leave loss_fn out"
    elif settings.samples_labels:
        why = "curvature='ggn' draws labels outside of any loss; choose 'factored', 'full' or 'fisher'"
    elif settings.inner == "eager":
        why = "inner='eager' makes no graph; choose 'aot_eager' or 'inductor'"
    elif by_regions:
        why = "with regions= no graph holds the whole loss; compile the whole model"
    if why:
        raise ValueError(f"loss_fn={loss_fn!r}: {why}")


def check_compile_options(
    mode: str | None, options: Mapping[str, Any], inner: str, flags: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Refuses what torch.compile does not take; ``flags`` are its ``dynamic`` and ``fullgraph``."""
    if unknown := sorted(set(flags) - {"dynamic", "fullgraph"}):
        raise TypeError(f"transform got {unknown[0]!r}: expected torch.compile's mode, options, dynamic or fullgraph")
    for name, flag in flags.items():
        if flag is not None or name == "fullgraph":
            check_flag(name, flag)
    modes = private.list_mode_options()
    if mode is not None and mode not in modes:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(modes)}{near(mode, modes)}")
    known = set(private.list_options())
    for name in options:
        if name not in known:
            raise ValueError(f"options: {name!r} is no option of Inductor{near(name, known)}")
    if inner != "inductor" and (mode or options):
        raise ValueError(f"mode={mode!r} and options are Inductor's, and inner={inner!r}; leave them out")


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        several = "; transform the module that holds them" if isinstance(model, (list, tuple)) else ""
        raise TypeError(f"model={shown(model)}: expected an nn.Module, not {type(model).__name__}{several}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model: a {type(model).__name__} is TorchScript, which no tracer of Python sees; transform the nn.Module "
            "that it was made of"
        )
    holds = any(registry.owned.get(module) for module in model.modules())
    if holds or any(registry.find(model.parameters())):
        raise ValueError(
            f"model: this {type(model).__name__} is already transformed, or holds a part that is; transform a model "
            "once, the outermost module"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"model: {name!r} is not initialized yet; run the model once before transform")
    if not any(True for _ in model.parameters()):
        raise ValueError(f"model: this {type(model).__name__} has no parameters; transform it after they are made")


def check_regions(model: Any, regions: Any) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        check_model(model)
    if regions is None:
        return [model]
    if regions == BLOCKS:
        return blocks_of(model)
    if isinstance(regions, (str, bytes, nn.ModuleDict)) or not isinstance(regions, Iterable):
        instead = "regions=[module]" if isinstance(regions, nn.Module) else f"such as model.layers, or {BLOCKS!r}"
        instead = "regions=list(modules.values())" if isinstance(regions, nn.ModuleDict) else instead
        raise TypeError(f"regions={shown(regions)}: expected the modules to compile one by one, {instead}")
    inside, chosen = set(model.modules()), list(dict.fromkeys(regions))
    if not chosen:
        raise ValueError("regions=[]: expected the modules to compile one by one, or None for the whole model")
    for region in chosen:
        if not isinstance(region, nn.Module):
            raise TypeError(f"regions: expected modules of the model, got {shown(region)}")
        if region not in inside:
            raise ValueError(f"regions: {type(region).__name__} is no submodule of the model")
        if isinstance(region, (nn.ModuleList, nn.ModuleDict)):
            raise ValueError(f"regions: a {type(region).__name__} is never called; expected the modules in it")
    return chosen


def check_weights(smoothing: Smoothing) -> None:
    for weight in smoothing.weights:
        parameter = weight.parameter()
        assert parameter is not None
        if weight.format is None:
            continue
        if parameter.is_complex() and not weight.forced:
            weight.format, weight.excluded = None, "complex, and formats are of real numbers"
            continue
        if not parameter.is_floating_point():
            raise TypeError(
                f"model: {weight.name!r} is {parameter.dtype}, expected real floating-point numbers, complex ones as "
                f"pairs behind torch.view_as_complex; leave it out with only={{{weight.name!r}: None}}"
            )
        if parameter.element_size() < 2:
            raise TypeError(
                f"model: {weight.name!r} is {parameter.dtype}, of which no optimizer trains; make it bfloat16 or "
                f"wider, or leave it out with only={{{weight.name!r}: None}}"
            )
        if parameter.is_meta:
            raise ValueError(f"model: {weight.name!r} is on the meta device; materialize the model before transform")
        if not bool(torch.isfinite(parameter.detach()).all()):
            local = parameter.detach()
            where = torch.nonzero(~torch.isfinite(local))[0].tolist() if type(local) is Tensor else "some element"
            raise ValueError(f"model: {weight.name!r} is not finite at {where}; repair the checkpoint before transform")
    if not any(weight.format is not None for weight in smoothing.weights):
        raise ValueError(
            "model: no parameter is left to quantize; a weight needs two dimensions, or a glob in only, and what "
            "lotion_fx.quantize or load has packed is none: transform what was packed"
        )
