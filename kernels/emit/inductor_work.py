"""The Triton kernels that Inductor emits for a training step of a transformed block, described as our own are.

Bytes are Inductor's count of what a kernel reads and writes once. Of the configurations that Inductor would time on a
device the one counts that the cost model puts first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from lotion_fx.kernels.audit.work import Work
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.emit.absent_cuda import absent_cuda
from lotion_fx.kernels.emit.emitted import Emitted, emitted
from lotion_fx.private import GridExpr, PyCodeCache, inductor_config


def emitted_works(arch: int) -> list[Work]:
    """Every kernel of the forward pass, the backward pass and the step, each on the shapes that it is launched on.

    Args:
        arch: compute capability, 80 for ``sm_80``.
    """
    with inductor_config.patch(profile_bandwidth=True):  # writes the bytes into the source
        return [work for graph in emitted(arch) for work in _works(graph, arch)]


def _works(graph: Emitted, arch: int) -> list[Work]:
    sources = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'", graph.source, re.S)
    with absent_cuda(arch):
        tuners = {name: getattr(PyCodeCache.load(source), name) for name, source in sources}
    launches = dict.fromkeys(re.findall(r"^ +(\w+)\.run\(.*?((?:, \d+)*), stream=", graph.source, re.M))
    return [
        _work(graph.graph, name, tuners[name], _numbers(tuners[name].triton_meta["signature"], integers))
        for name, integers in launches
        # Those that a user wrote have no count of bytes here; ours are listed by their modules.
        if "kernel_num_gb" in tuners[name].inductor_meta
    ]


def _numbers(signature: Mapping[str, str], integers: str) -> dict[str, int]:
    """The lengths that a launch passes, by name; they are a kernel's last arguments but for the blocks' sizes."""
    names = [name for name in signature if name.endswith("numel")]
    values = [int(value) for value in integers.split(", ") if value]
    return dict(zip(names, values[-len(names) :], strict=True))


def _work(graph: str, name: str, tuner: Any, lengths: Mapping[str, int]) -> Work:
    meta, hints = tuner.triton_meta, tuner.inductor_meta
    signature = {name: kind for name, kind in meta["signature"].items() if kind != "constexpr"}
    names = list(meta["signature"])
    divisible = {names[i] for (i,) in meta["configs"][0]}
    moved = round(hints["kernel_num_gb"] * 1e9)

    def programs(config: Config) -> int:
        return prod(GridExpr.from_meta(hints, dict(config.constants)).eval_slow({**config.constants, **lengths}))

    def iterations(config: Config) -> int:
        loops = ((lengths.get(f"{axis}_numel"), config.constants.get(f"{axis.upper()}_BLOCK")) for axis in ("r0", "r1"))
        return prod(-(-length // block) for length, block in loops if length and block)

    return Work(
        kernel=f"emitted/{graph}/{name.removeprefix('triton_')}",
        shape="x".join(map(str, lengths.values())),
        fn=tuner.fn,
        signature=signature,
        constants=meta["constants"],
        configs=tuple(Config(each.kwargs, each.num_warps, each.num_stages) for each in tuner.configs),
        programs=programs,
        bytes=lambda config: moved,
        minimum_bytes=moved,
        iterations=iterations,
        aligned=tuple(name for name in signature if name in divisible),
    )
