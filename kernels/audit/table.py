"""`lotion-fx kernels`: what every kernel compiles to on every architecture, without a device.

lotion-fx kernels --arch sm_100 --kernel "smooth/*"     # registers, spills, occupancy, instructions, predicted time
lotion-fx kernels --json                                # the same, for a program
lotion-fx kernels --tune                                # compile all candidates, choose, write tuning.json
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import pkgutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from tabulate import tabulate

import lotion_fx.kernels
from lotion_fx.kernels import tuning
from lotion_fx.kernels.audit import ranking
from lotion_fx.kernels.audit.aot import Refused, audit, base, compile_all
from lotion_fx.kernels.audit.cost import predict
from lotion_fx.kernels.targets import TARGETS
from lotion_fx.kernels.work import Config, Work

EMITTED = "emitted/"
NAMES = ", ".join(target.name for target in TARGETS.values())


def catalog(arch: int, pattern: str = "*") -> list[Work]:
    """Every kernel on every shape: what the modules of `lotion_fx.kernels` that have ``works`` list.

    Args:
        arch: a key of `TARGETS`.
        pattern: of kernel names, ``"smooth/*"``.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(lotion_fx.kernels.__path__))
    modules = [importlib.import_module(f"lotion_fx.kernels.{name}") for name in names]
    found = [work for module in modules if hasattr(module, "works") for work in module.works(arch)]
    return [work for work in found if fnmatch.fnmatch(work.kernel, pattern)]


def row(work: Work, config: Config, arch: int) -> dict[str, Any]:
    """One kernel's evidence and prediction; what a kernel that does not compile has none of is None.

    Args:
        work: the kernel on a shape.
        config: one of its configs.
        arch: a key of `TARGETS`.
    """
    target = TARGETS[arch]
    described = {"kernel": work.kernel, "arch": target.name, "shape": work.shape, "config": tuning.options(config)}
    traffic = {"bytes": work.bytes(config), "minimum_bytes": work.minimum_bytes}
    try:
        evidence = audit(work, config, arch)
    except Refused as refused:
        return {**described, **dict.fromkeys(_SEEN), **traffic, **dict.fromkeys(_PREDICTED), "refused": str(refused)}
    prediction = predict(work, config, evidence, target)
    predicted = round(prediction.us, 2), prediction.bound_by, round(prediction.share_of_roofline, 3)
    return {**described, **evidence.summary(), **traffic, **dict(zip(_PREDICTED, predicted, strict=True))}


_SEEN = ("registers", "spills", "shared", "tensor_memory", "occupancy", "vector128", "sass", "instructions")
_PREDICTED = ("predicted_us", "bound_by", "share_of_roofline")


def choose(work: Work, arch: int) -> Config:
    """The config that a kernel runs with on an architecture."""
    return tuning.choose(work.kernel, work.shape_class, arch, work.configs)


def rows(archs: Iterable[int], pattern: str = "*") -> list[dict[str, Any]]:
    """A row for every kernel, shape and architecture, in the config that it runs with: ours, and those of Inductor.

    Args:
        archs: keys of `TARGETS`.
        pattern: of kernel names; those of Inductor begin with ``emitted/``.
    """
    chosen = [(work, choose(work, arch), arch) for arch in archs for work in catalog(arch, pattern)]
    if pattern.startswith(("*", EMITTED)):
        chosen += [kernel for arch in archs for kernel in _emitted(arch, pattern)]
    compile_all(chosen)
    return [row(*kernel) for kernel in chosen]


def _emitted(arch: int, pattern: str) -> list[tuple[Work, Config, int]]:
    from lotion_fx.kernels.emit.inductor_work import emitted_works  # traces and compiles a training step

    works = [work for work in emitted_works(arch) if fnmatch.fnmatch(work.kernel, pattern)]
    compile_all((work, config, arch) for work in works for config in work.configs)
    return [(work, Config(**ranking.rank([work], arch)[0]["config"]), arch) for work in works]


def text(found: list[dict[str, Any]]) -> str:
    """The rows as a table for reading."""
    lines = [_cells(row) for row in found]
    refused = [row["refused"] for row in found if "refused" in row]
    return "\n".join([tabulate(lines, headers="keys", disable_numparse=True), *refused])


def _short(name: str) -> str:
    """A name of Inductor's, which lists all that it fused, cut in the middle."""
    return name if len(name) <= 60 else f"{name[:40]}...{name[-17:]}"


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    sizes = " ".join(f"{name}={value}" for name, value in row["config"].items() if not name.startswith("num_"))
    launch = f"{sizes} w{row['config']['num_warps']} s{row['config']['num_stages']}"
    described = {"kernel": _short(row["kernel"]), "arch": row["arch"], "shape": row["shape"], "config": launch}
    if "refused" in row:
        return {**described, "registers": "none"}
    special: Counter[str] = Counter()
    for name, n in row["instructions"].items():
        special[base(name)] += n
    return {
        **described,
        "registers": row["registers"],
        "spills": row["spills"],
        "shared": row["shared"],
        "occupancy": f"{row['occupancy']:.0%}",
        "128 bit": f"{row['vector128']:.0%}",
        "instructions": " ".join(f"{n} {name}" for name, n in special.items()),
        "MB": f"{row['bytes'] / 1e6:.2f}",
        "of minimum": f"{row['bytes'] / row['minimum_bytes']:.2f}",
        "predicted us": f"{row['predicted_us']:.1f}",
        "roofline": f"{row['share_of_roofline']:.0%}",
        "bound by": row["bound_by"],
    }


def _known_arch(name: str | None) -> str | None:
    if name is not None and name not in NAMES.split(", "):
        raise typer.BadParameter(f"unknown architecture {name!r}; expected one of {NAMES}")
    return name


def main(
    arch: Annotated[str | None, typer.Option(callback=_known_arch, help=f"One of {NAMES} [default: all].")] = None,
    kernel: Annotated[str, typer.Option(help="A pattern of kernel names, 'smooth/*'.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead of a table.")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Compile all candidates and write the best to the table.")
    ] = False,
) -> None:
    """Compile the kernels for GPUs that need not be there: registers, spills, occupancy, bytes, predicted times."""
    archs = [target.arch for target in TARGETS.values() if arch in (None, target.name)]
    if not (kernel.startswith(EMITTED) or any(catalog(each, kernel) for each in archs)):
        known = ", ".join(sorted({work.kernel for work in catalog(archs[0])}))
        raise typer.BadParameter(f"no kernel is named {kernel!r}; there are {known}", param_hint="--kernel")
    for each in archs if tune else ():
        Path(str(tuning.TABLE)).write_text(ranking.written(ranking.tune(catalog(each, kernel), each)) + "\n")
        tuning.forget()
    found = rows(archs, kernel)
    typer.echo(json.dumps(found, indent=1) if as_json else text(found))
