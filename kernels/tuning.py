"""Which config a kernel runs with: the cost model's choice, made where it was compiled and kept in ``tuning.json``.

`choose` reads that table, so a default run is deterministic and compiles nothing but what it launches. On a device,
with ``LOTION_FX_AUTOTUNE=1`` in the environment, `launchable` times the table's best few and keeps the fastest.

``lotion-fx kernels --tune`` writes the table: by kernel, shape class and architecture, the best few candidates, the
first of which is the choice. What the machine code of all candidates showed is in ``tests/compiled/evidence.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import triton

from lotion_fx.kernels.config import Config
from lotion_fx.kernels.targets import nearest

TABLE = files("lotion_fx.kernels") / "tuning.json"
TOP = 3  # how many candidates the table has, and a device times


@cache
def table() -> Mapping[str, Any]:
    """The checked-in table: kernel -> shape class -> ``"sm_80"`` -> `Config.options`, the best first."""
    return json.loads(TABLE.read_text())


def choose(kernel: str, shape_class: str, arch: int, configs: Sequence[Config]) -> Config:
    """The config that a kernel runs with on an architecture.

    Args:
        kernel: its name, ``"smooth/rtn"``: a module of `lotion_fx.kernels`, and what of it.
        shape_class: the kind of shape, as the module names them.
        arch: compute capability, 80 for ``sm_80``; one without a target takes the nearest.
        configs: the candidates.

    Returns:
        The table's choice, or the first candidate where the table has none.
    """
    return ranked(kernel, shape_class, arch, configs)[0]


def ranked(kernel: str, shape_class: str, arch: int, configs: Sequence[Config]) -> tuple[Config, ...]:
    """The table's candidates, from the best to the worst; all of ``configs`` in their order where it has none."""
    return _tuned(kernel, shape_class, arch) or tuple(configs)


@cache
def _tuned(kernel: str, shape_class: str, arch: int) -> tuple[Config, ...]:
    """What the table has for a kernel, a class and an architecture; empty where it has nothing."""
    return tuple(map(Config.of, table().get(kernel, {}).get(shape_class, {}).get(nearest(arch).name, ())))


def forget() -> None:
    """Reads the table anew: after it was written."""
    table.cache_clear()
    _tuned.cache_clear()


def launchable(
    fn: Any,
    kernel: str,
    shape_class: str,
    arch: int,
    configs: Sequence[Config],
    *,
    config: Config | None = None,
    key: Sequence[str] = (),
    writes: Sequence[str] = (),
) -> tuple[Any, dict[str, Any]]:
    """What to launch, and the arguments that its config adds:

        fn, options = launchable(_kernel, "smooth/rtn", "rows", arch, CONFIGS)
        wrap_triton(fn)[lambda meta: (cdiv(rows, meta["ROWS"]),)](w, out, rows, **options)

    Args:
        fn: the ``triton.jit`` function.
        kernel, shape_class, arch, configs: as for `choose`.
        config: taken as it is, instead of the table's choice.
        key: names of integer arguments; autotuning times anew when one of them changes.
        writes: names of tensors that the kernel reads and overwrites; autotuning restores them after each run.
    """
    if config is None and os.environ.get("LOTION_FX_AUTOTUNE") == "1":
        return _autotuned(fn, ranked(kernel, shape_class, arch, configs), tuple(key), tuple(writes)), {}
    return fn, (config or choose(kernel, shape_class, arch, configs)).options


# By the kernel and the values of its configs, which are not hashable.
_autotuners: dict[tuple[Any, ...], triton.runtime.Autotuner] = {}


def _autotuned(
    fn: Any, configs: Sequence[Config], key: tuple[str, ...], writes: tuple[str, ...]
) -> triton.runtime.Autotuner:
    """The kernel, made to time the best few of ranked configs and keep the fastest; one for all its launches."""
    values = tuple(tuple(sorted(config.options.items())) for config in configs)
    if (fn, values, key, writes) not in _autotuners:
        choices = [
            triton.Config(dict(config.constants), num_warps=config.num_warps, num_stages=config.num_stages)
            for config in configs
        ]
        decorator = triton.autotune(
            choices, key=list(key), restore_value=list(writes) or None, prune_configs_by={"early_config_prune": best}
        )
        _autotuners[fn, values, key, writes] = decorator(fn)
    return _autotuners[fn, values, key, writes]


def best(configs: list[triton.Config], arguments: Mapping[str, Any], **constants: Any) -> list[triton.Config]:
    """Triton's ``early_config_prune``: the first few, for configs come ranked by the cost model."""
    return configs[:TOP]
