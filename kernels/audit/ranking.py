"""The tuning table's making: all candidates compiled, their machine code recorded, the best by the cost model first."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lotion_fx.kernels import tuning
from lotion_fx.kernels.audit.aot import Refused, audit, compile_all
from lotion_fx.kernels.audit.cost import predict
from lotion_fx.kernels.targets import TARGETS
from lotion_fx.kernels.work import Config, Work


def rank(works: Sequence[Work], arch: int) -> list[dict[str, Any]]:
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
    entry: dict[str, Any] = {"config": asdict(config), "predicted_us": {}, "evidence": []}
    for work in works:
        try:
            evidence = audit(work, config, arch)
        except Refused as refused:
            return {"config": asdict(config), "refused": str(refused)}
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


def tune(works: Sequence[Work], arch: int) -> dict[str, Any]:
    """The table's content with new entries of an architecture for some kernels; the others stay as they are.

    Args:
        works: the kernels on all of their shapes; a class that is not among them is dropped.
        arch: a key of `TARGETS`.
    """
    compile_all((work, config, arch) for work in works for config in work.configs)
    tuned = json.loads(json.dumps(dict(tuning.table())))
    classes: dict[tuple[str, str], list[Work]] = {}
    for work in works:
        classes.setdefault((work.kernel, work.shape_class), []).append(work)
    for kernel in {work.kernel for work in works}:
        for of_class in tuned.setdefault(kernel, {}).values():
            of_class.pop(TARGETS[arch].name, None)
    for (kernel, shape_class), group in classes.items():
        tuned[kernel].setdefault(shape_class, {})[TARGETS[arch].name] = rank(group, arch)
    return {kernel: {name: archs for name, archs in of.items() if archs} for kernel, of in tuned.items()}


def written(value: Any, indent: str = "") -> str:
    """JSON with a line for each candidate, so that a change of the table can be read."""
    if not isinstance(value, dict):
        lines = ",\n".join(f"{indent} {json.dumps(entry)}" for entry in value)
        return f"[\n{lines}\n{indent}]"
    items = ",\n".join(f"{indent} {json.dumps(key)}: {written(value[key], indent + ' ')}" for key in sorted(value))
    return f"{{\n{items}\n{indent}}}" if items else "{}"
