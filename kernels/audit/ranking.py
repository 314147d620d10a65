"""The tuning table's making: all candidates compiled, their machine code recorded, the best by the cost model first."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lotion_fx.kernels import tuning
from lotion_fx.kernels.audit.aot import Refused, audit
from lotion_fx.kernels.audit.cost import predict
from lotion_fx.kernels.audit.work import Work
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.targets import TARGETS

Entry = dict[str, Any]  # a candidate's `Config.options`, evidence and predicted times, or why it is refused


def rank(works: Sequence[Work], arch: int) -> list[Entry]:
    """The entries of one kernel, shape class and architecture, from the best to the worst.

    A config without spills comes before one with any, one with all the instructions that the kernel is for before one
    that lacks some, one with enough wide loads and stores before one with fewer, and then the one whose predicted time
    is the shorter, by their geometric mean over the shapes. Where two are within a hundredth, the order in the module
    decides.

    Args:
        works: one kernel on the shapes of one class.
        arch: a key of `TARGETS`.

    Raises:
        ValueError: shapes of one class have different candidates.
    """
    if any(work.configs != works[0].configs for work in works):
        raise ValueError(
            f"{works[0].kernel}: the shapes of shape_class={works[0].shape_class!r} have different configs; expected "
            "one list for all of them, from which one is chosen: name another class"
        )
    entries = [_entry(works, config, arch) for config in works[0].configs]
    fit = [entry for entry in entries if "refused" not in entry]

    def worse(entry: dict[str, Any]) -> tuple[Any, ...]:
        evidence = entry["evidence"]
        spills, lost = any(e["spills"] for e in evidence), any(e["lost"] for e in evidence)
        narrow = any(e["vector128"] < works[0].wide for e in evidence)
        return (spills, lost, narrow, round(statistics.geometric_mean(entry["predicted_us"].values()) / shortest, 2))

    shortest = min((statistics.geometric_mean(entry["predicted_us"].values()) for entry in fit), default=1.0)
    return sorted(fit, key=worse) + [entry for entry in entries if "refused" in entry]


def _entry(works: Sequence[Work], config: Config, arch: int) -> dict[str, Any]:
    """What a config's machine code shows on each shape, or why it has none."""
    entry: dict[str, Any] = {"config": config.options, "predicted_us": {}, "evidence": []}
    for work in works:
        try:
            evidence = audit(work, config, arch)
        except Refused as refused:
            return {"config": config.options, "refused": str(refused)}
        prediction = predict(work, config, evidence, TARGETS[arch])
        entry["predicted_us"][work.shape] = round(prediction.us, 2)
        _record(entry["evidence"], {**evidence.summary(), "lost": evidence.lost(work.requires.get(arch, ()))})
    return entry


def _record(evidence: list[dict[str, Any]], seen: dict[str, Any]) -> None:
    """Adds a shape's evidence; of the same code, whose loop runs more or less often, the smaller share of 128 bits."""
    for known in evidence:
        if {**known, "vector128": seen["vector128"]} == seen:
            known["vector128"] = min(known["vector128"], seen["vector128"])
            return
    evidence.append(seen)


def ranked(works: Iterable[Work], arch: int) -> dict[str, dict[str, list[Entry]]]:
    """The entries of some kernels by kernel and shape class, from the best to the worst.

    Args:
        works: the kernels on all of their shapes.
        arch: a key of `TARGETS`.
    """
    classes: dict[str, dict[str, list[Work]]] = {}
    for work in works:
        classes.setdefault(work.kernel, {}).setdefault(work.shape_class, []).append(work)
    return {kernel: {name: rank(of, arch) for name, of in by_class.items()} for kernel, by_class in classes.items()}


def best(entries: Sequence[Entry]) -> list[dict[str, int]]:
    """What the tuning table keeps of ranked entries: the first few that compile."""
    return [entry["config"] for entry in entries if "refused" not in entry][: tuning.TOP]


def update(path: Path, found: Mapping[str, Mapping[str, Sequence[Any]]], arch: int) -> None:
    """Writes what was found for an architecture into a file; other kernels and architectures in it stay as they are.

    Args:
        path: of a JSON object kernel -> shape class -> ``"sm_80"`` -> entries; made where there is none.
        found: entries of kernels with all of their classes; a class that is not among them is dropped.
        arch: a key of `TARGETS`.
    """
    kept = json.loads(path.read_text()) if path.exists() else {}
    for kernel, classes in found.items():
        of_kernel = kept.setdefault(kernel, {})
        for of_class in of_kernel.values():
            of_class.pop(TARGETS[arch].name, None)
        for name, entries in classes.items():
            of_kernel.setdefault(name, {})[TARGETS[arch].name] = list(entries)
        kept[kernel] = {name: archs for name, archs in of_kernel.items() if archs}
    path.write_text(written(kept) + "\n")


def written(value: Any, indent: str = "") -> str:
    """JSON with a line for each candidate, so that a change of the table can be read."""
    if not isinstance(value, dict):
        lines = ",\n".join(f"{indent} {json.dumps(entry)}" for entry in value)
        return f"[\n{lines}\n{indent}]"
    items = ",\n".join(f"{indent} {json.dumps(key)}: {written(value[key], indent + ' ')}" for key in sorted(value))
    return f"{{\n{items}\n{indent}}}" if items else "{}"
