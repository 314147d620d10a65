"""Which config a kernel runs with: the cost model's choice, made where it was compiled and kept in ``tuning.json``.

`choose` reads that table, so a default run is deterministic and compiles nothing but what it launches. On a device,
with ``LOTION_FX_AUTOTUNE=1`` in the environment, `launchable` times the table's best few and keeps the fastest.

``lotion-fx kernels --tune`` writes the table: by kernel, shape class and architecture, the candidates from the best to
the worst, with what their machine code showed and the time predicted from it. The first one is the choice.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import triton

from lotion_fx.kernels.targets import nearest
from lotion_fx.kernels.work import Config

TABLE = files("lotion_fx.kernels") / "tuning.json"
TOP = 3  # how many candidates a device times


@cache
def table() -> Mapping[str, Any]:
    """The checked-in table: kernel -> shape class -> ``"sm_80"`` -> candidates, the best first."""
    return json.loads(TABLE.read_text())


def choose(kernel: str, shape_class: str, arch: int) -> Config:
    """The config that a kernel runs with on an architecture.

    Args:
        kernel: its name, ``"smooth/rtn"``: a module of `lotion_fx.kernels`, and what of it.
        shape_class: the kind of shape, as the module names them.
        arch: compute capability, 80 for ``sm_80``; one without a target takes the nearest.

    Returns:
        The table's choice, or the first of the module's ``CONFIGS`` where the table has none.
    """
    return candidates(kernel, shape_class, arch)[0]


def candidates(kernel: str, shape_class: str, arch: int) -> tuple[Config, ...]:
    """All configs that the table has for a kernel, from the best to the worst; else the module's, in their order."""
    ranked = table().get(kernel, {}).get(shape_class, {}).get(nearest(arch).name)
    if ranked is None:
        return tuple(importlib.import_module(f"lotion_fx.kernels.{kernel.split('/')[0]}").CONFIGS)
    return tuple(Config(**candidate["config"]) for candidate in ranked)


def launchable(
    fn: Any, kernel: str, shape_class: str, arch: int, *, key: Sequence[str] = (), writes: Sequence[str] = ()
) -> tuple[Any, dict[str, Any]]:
    """What to launch, and the arguments that its config adds:

        fn, options = launchable(_kernel, "smooth/rtn", "rows", arch)
        wrap_triton(fn)[lambda meta: (cdiv(rows, meta["ROWS"]),)](w, out, rows, **options)

    Args:
        fn: the ``triton.jit`` function.
        kernel, shape_class, arch: as for `choose`.
        key: names of integer arguments; autotuning times anew when one of them changes.
        writes: names of tensors that the kernel reads and overwrites; autotuning restores them after each run.
    """
    if os.environ.get("LOTION_FX_AUTOTUNE") == "1":
        return autotuned(fn, kernel, shape_class, arch, tuple(key), tuple(writes)), {}
    return fn, options(choose(kernel, shape_class, arch))


def options(config: Config) -> dict[str, Any]:
    """A config as keyword arguments of a launch."""
    return {**config.constants, "num_warps": config.num_warps, "num_stages": config.num_stages}


@cache
def autotuned(
    fn: Any, kernel: str, shape_class: str, arch: int, key: tuple[str, ...], writes: tuple[str, ...]
) -> triton.runtime.Autotuner:
    """A kernel that times the table's best few on the device and keeps the fastest; arguments as for `launchable`."""

    def best(configs: list[triton.Config], arguments: Mapping[str, Any], **constants: Any) -> list[triton.Config]:
        return configs[:TOP]  # they come ranked

    configs = [
        triton.Config(dict(config.constants), num_warps=config.num_warps, num_stages=config.num_stages)
        for config in candidates(kernel, shape_class, arch)
    ]
    return triton.autotune(
        configs, key=list(key), restore_value=list(writes) or None, prune_configs_by={"early_config_prune": best}
    )(fn)
