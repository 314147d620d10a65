"""The gate: what kernels compile to may not get worse than the checked-in baseline.

Three rules hold of themselves: a chosen config spills no registers, has the instructions that its kernel is for, and
moves 128 bits a thread by as large a share of its loads and stores as its kernel is held to.
Against ``baseline.json``, what the same versions of PyTorch, Triton and ptxas made of the same kernel, architecture and
shape: at most 10 % more registers and 15 % more instructions, no more shared memory, no lower occupancy, no smaller
share of 128-bit loads and stores. Versions without a baseline are held to the three rules alone: the gate says so.

    python -m tests.compiled.gate            # compile every kernel for every architecture and compare
    python -m tests.compiled.gate --update   # then keep what was found as these versions' baseline
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.nvidia.compiler import get_ptxas

from lotion_fx.kernels.audit import table
from lotion_fx.kernels.audit.aot import Refused, audit, compile_all, describe
from lotion_fx.kernels.audit.work import Work
from lotion_fx.kernels.audit.works import catalog
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.targets import TARGETS

BASELINE = Path(__file__).with_name("baseline.json")

MOST = {"registers": 1.10, "sass": 1.15, "shared": 1.0}  # times the baseline
LEAST = {"occupancy": 1.0, "vector128": 1.0}

Baseline = dict[str, dict[str, dict[str, Any]]]  # versions -> kernel, architecture and shape -> evidence


@cache
def versions(arch: int) -> str:
    """The versions that decide what a kernel compiles to for an architecture."""
    text = subprocess.run([get_ptxas(arch).path, "--version"], capture_output=True, text=True, check=True).stdout
    ptxas = re.search(r"V([\d.]+)", text)
    assert ptxas is not None, text
    return f"torch {torch.__version__.split('+')[0]}, triton {triton.__version__}, ptxas {ptxas[1]}"


def key(work: Work, arch: int) -> str:
    """``"smooth/rtn, sm_80, 4096x4096 bf16 nvfp4"``."""
    return f"{work.kernel}, {TARGETS[arch].name}, {work.shape}"


def recorded(work: Work, config: Config, arch: int) -> dict[str, Any]:
    """What the baseline keeps of one kernel."""
    evidence = audit(work, config, arch).summary()
    return {"config": describe(config), **{name: evidence[name] for name in ("spills", *MOST, *LEAST)}}


def faults(work: Work, config: Config, arch: int, baseline: Baseline) -> list[str]:
    """What is wrong with a kernel's machine code; each fault is one line that names kernel, value and limit.

    Args:
        work: a kernel on a shape.
        config: the one that it runs with.
        arch: a key of `TARGETS`.
        baseline: as `load` gives it.
    """
    where = f"{key(work, arch)} [{describe(config)}]"
    try:
        evidence = audit(work, config, arch)
    except Refused as refused:
        return [str(refused)]
    found = []
    if evidence.spills or evidence.local:
        found.append(f"{where}: spills {evidence.spills} bytes, in {evidence.local} loads and stores; expected none")
    for prefix in evidence.lost(work.requires.get(arch, ())):
        found.append(f"{where}: has no {prefix} instruction, which this kernel is for")
    if evidence.vector128 < work.wide:
        found.append(f"{where}: moves 128 bits by {evidence.vector128:.3f} of its accesses, expected {work.wide:g}")
    kept = baseline.get(versions(arch))
    if kept is None:
        return found
    if key(work, arch) not in kept:
        return [*found, f"{where}: is not in the baseline; to add it: python -m tests.compiled.gate --update"]
    return found + [f"{where}: {fault}" for fault in _worse(evidence.summary(), kept[key(work, arch)])]


def _worse(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    limits = {**{name: then[name] * most for name, most in MOST.items()}, **{name: then[name] for name in LEAST}}
    return [
        f"{name} {then[name]} -> {now[name]}, expected {'at most' if name in MOST else 'at least'} {limit:g}"
        for name, limit in limits.items()
        if (now[name] > limit if name in MOST else now[name] < limit)
    ]


def load() -> Baseline:
    """The checked-in baseline."""
    return json.loads(BASELINE.read_text()) if BASELINE.exists() else {}


def without_baseline(archs: Iterable[int], baseline: Baseline) -> str | None:
    """A sentence that names the versions which have no baseline, if any."""
    missing = sorted({versions(arch) for arch in archs} - set(baseline))
    if not missing:
        return None
    return (
        f"no baseline for {' or '.join(missing)}: only spills and instructions were checked; "
        "to keep what these versions make: python -m tests.compiled.gate --update"
    )


def updated(kernels: Iterable[tuple[Work, Config, int]], baseline: Baseline) -> Baseline:
    """The baseline with these versions' part made anew; a kernel that does not compile gets no entry.

    Args:
        kernels: each with the config that it runs with and an architecture.
        baseline: as `load` gives it.
    """
    fresh: Baseline = {}
    for work, config, arch in kernels:
        with contextlib.suppress(Refused):
            fresh.setdefault(versions(arch), {})[key(work, arch)] = recorded(work, config, arch)
    return {**baseline, **fresh}


def written(baseline: Baseline) -> str:
    """JSON with a line for each kernel, so that a change of the baseline can be read."""
    parts = [
        f"{json.dumps(of)}: {{\n"
        + ",\n".join(f" {json.dumps(name)}: {json.dumps(kept[name])}" for name in sorted(kept))
        + "\n}"
        for of, kept in sorted(baseline.items())
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--update", action="store_true", help="keep what was found as the baseline")
    update = parser.parse_args().update
    kernels = [(work, table.choose(work, arch), arch) for arch in TARGETS for work in catalog(arch)]
    compile_all(kernels)
    baseline = load()
    if update:
        baseline = updated(kernels, baseline)
        BASELINE.write_text(written(baseline))
    found = [fault for kernel in kernels for fault in faults(*kernel, baseline)]
    print("\n".join([*found, without_baseline(TARGETS, baseline) or ""]).strip())
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
