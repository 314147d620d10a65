"""`lotion-fx kernels`: what the kernels compile to, without a device.

lotion-fx kernels                                       # registers, spills, occupancy, instructions, predicted time
lotion-fx kernels --arch all --kernel "smooth/*"        # of some kernels, on every architecture
lotion-fx kernels --emitted                             # and of the kernels that Inductor emits
lotion-fx kernels --json                                # the same, for a program
lotion-fx kernels --tune                                # compile all candidates, choose, write tuning.json

A kernel whose source has not changed is compiled once on a machine: see `kernels.audit.kept`.
"""

from __future__ import annotations

import fnmatch
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from tabulate import tabulate

from lotion_fx.kernels import tuning
from lotion_fx.kernels.audit import ranking
from lotion_fx.kernels.audit.aot import Refused, audit, base, compile_all
from lotion_fx.kernels.audit.cost import predict
from lotion_fx.kernels.audit.kept import Kept, default_folder
from lotion_fx.kernels.audit.work import Work
from lotion_fx.kernels.audit.works import catalog
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.targets import TARGETS

EMITTED = "emitted/"
NAMES = ", ".join(target.name for target in TARGETS.values())
USUAL = (80, 100)  # the oldest, and the one with most to lower to


def row(work: Work, config: Config, arch: int) -> dict[str, Any]:
    """One kernel's evidence and prediction; what a kernel that does not compile has none of is None.

    Args:
        work: the kernel on a shape.
        config: one of its configs.
        arch: a key of `TARGETS`.
    """
    target = TARGETS[arch]
    described = {"kernel": work.kernel, "arch": target.name, "shape": work.shape, "config": config.options}
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


def rows(
    archs: Iterable[int], pattern: str = "*", emitted: bool = False, kept: Kept | None = None
) -> list[dict[str, Any]]:
    """A row for every kernel, shape and architecture, in the config that it runs with.

    Args:
        archs: keys of `TARGETS`.
        pattern: of kernel names; those of Inductor begin with ``emitted/``.
        emitted: whether Inductor's kernels are among them, for which a training step is traced.
        kept: where evidence stays; by default nowhere.
    """
    chosen = [(work, choose(work, arch), arch) for arch in archs for work in catalog(arch, pattern)]
    compile_all(chosen, kept, _with_a_bar)
    if emitted or pattern.startswith(EMITTED):
        chosen += [kernel for arch in archs for kernel in _emitted(arch, pattern, kept)]
    return [row(*kernel) for kernel in chosen]


def _emitted(arch: int, pattern: str, kept: Kept | None) -> list[tuple[Work, Config, int]]:
    """The kernels of Inductor that match, each in the config that the cost model puts first."""
    from lotion_fx.kernels.emit.inductor_work import emitted_works  # traces and compiles a training step

    works = [work for work in emitted_works(arch) if fnmatch.fnmatch(work.kernel, pattern)]
    compile_all(((work, config, arch) for work in works for config in work.configs), kept, _with_a_bar)
    return [(work, Config.of(ranking.rank([work], arch)[0]["config"]), arch) for work in works]


def _with_a_bar(results: Iterable[Any], total: int) -> Iterable[Any]:
    """The results, with a bar of how many there are yet, where somebody sees it and tqdm is installed."""
    if not sys.stderr.isatty() or find_spec("tqdm") is None:
        return results
    from tqdm import tqdm

    return tqdm(results, "compiling", total, leave=False, unit=" kernels")


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
    if name is not None and name not in (*NAMES.split(", "), "all"):
        raise typer.BadParameter(f"unknown architecture {name!r}; expected one of {NAMES}, or all")
    return name


def _tune(works: list[Work], arch: int, evidence: Path | None, kept: Kept) -> None:
    """Writes the best candidates into the tuning table, and what all of them showed into a file."""
    compile_all(((work, config, arch) for work in works for config in work.configs), kept, _with_a_bar)
    found = ranking.ranked(works, arch)
    best = {kernel: {name: ranking.best(of) for name, of in classes.items()} for kernel, classes in found.items()}
    ranking.update(Path(str(tuning.TABLE)), best, arch)
    tuning.forget()
    if evidence is not None:
        ranking.update(evidence, found, arch)


def main(
    arch: Annotated[
        str | None,
        typer.Option(callback=_known_arch, help=f"One of {NAMES}, or all [default: sm_80 and sm_100; to tune: all]."),
    ] = None,
    kernel: Annotated[str, typer.Option(help="A pattern of kernel names, 'smooth/*'.")] = "*",
    emitted: Annotated[
        bool, typer.Option("--emitted", help="Also the kernels that Inductor emits for a training step; takes minutes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead of a table.")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Compile all candidates and write the best to the table.")
    ] = False,
    evidence: Annotated[
        Path | None, typer.Option(help="With --tune: a file for what the machine code of all candidates shows.")
    ] = None,
) -> None:
    """Compile kernels (--kernel) for GPUs (--arch) that need not be there: registers, spills, bytes, times.

    lotion-fx kernels --arch sm_100 --kernel "smooth/*"

    lotion-fx kernels --arch all --json
    """
    if evidence is not None and not tune:
        raise typer.BadParameter("it is of what --tune compiles; add --tune", param_hint="--evidence")
    archs = [target.arch for target in TARGETS.values() if arch in ("all", target.name)]
    if arch is None:
        archs = list(TARGETS if tune else USUAL)
    if not (kernel.startswith(EMITTED) or any(catalog(each, kernel) for each in archs)):
        known = ", ".join(sorted({work.kernel for work in catalog(archs[0])}))
        raise typer.BadParameter(f"no kernel is named {kernel!r}; there are {known}", param_hint="--kernel")
    kept = Kept(default_folder())
    for each in archs if tune else ():
        _tune(catalog(each, kernel), each, evidence, kept)
    found = rows(archs, kernel, emitted, kept)
    typer.echo(json.dumps(found, indent=1) if as_json else text(found))
