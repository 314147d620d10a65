"""The file in an exported folder that tells what it is: layout, each weight's format, and a checksum of every file.

JSON; ``sha256`` is of the rest, written with sorted keys and without spaces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from lotion_fx.deploy.content import Content
from lotion_fx.deploy.weights import QuantizedWeight
from lotion_fx.deploy.writing import MARK
from lotion_fx.numerics import grids, scales
from lotion_fx.numerics.formats import Format

VERSION = 1
LARGEST = 2**28  # bytes of a manifest
KINDS = {
    kind.__name__: kind
    for module in (grids, scales)
    for kind in vars(module).values()
    if isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == module.__name__
}


def write(folder: Path, layout: str, content: Content, dense: Mapping[str, str]) -> None:
    """Writes the manifest of a folder whose other files are all there."""
    told = {
        "version": VERSION,
        "layout": layout,
        "weights": {name: describe(weight) for name, weight in content.weights.items()},
        "dense": dict(dense),
        "tied": content.tied,
        "files": {
            file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": digest(file)}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        },
    }
    (folder / MARK).write_text(json.dumps({**told, "sha256": _digest_of(told)}, indent=1), encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """The manifest of an exported folder, whose own checksum holds.

    Raises:
        ValueError: there is none, it is damaged, or of a later version.
    """
    file = folder / MARK
    if not file.is_file():
        raise ValueError(f"path={str(folder)!r}: no export of lotion_fx is here ({MARK} is missing)")
    if file.stat().st_size > LARGEST:
        raise ValueError(f"path={str(file)!r}: damaged: it has {file.stat().st_size} bytes")
    try:
        told = json.loads(file.read_bytes().decode("utf-8"))
        checksum = told.pop("sha256")
        intact = checksum == _digest_of(told)
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"path={str(file)!r}: damaged: it is no manifest of an export ({error})") from error
    if not intact:
        raise ValueError(f"path={str(file)!r}: damaged: its checksum is not that of its contents; copy it anew")
    if told.get("version") != VERSION:
        raise ValueError(f"path={str(file)!r}: of version {told.get('version')!r}; this lotion_fx reads {VERSION}")
    return dict(told)


def check_file(folder: Path, name: str, told: Mapping[str, Any]) -> bytes:
    """The contents of one file of an export.

    Raises:
        ValueError: it is missing, or is not what was written.
    """
    file, files = folder / name, told.get("files")
    known = files.get(name) if isinstance(files, dict) else None
    if not isinstance(known, dict) or not file.is_file():
        raise ValueError(f"path={str(folder)!r}: {name} is missing from this export; copy it anew")
    size = file.stat().st_size
    if size != known.get("size"):
        raise ValueError(f"path={str(file)!r}: damaged: it has {size} bytes, of {known.get('size')}; copy it anew")
    contents = file.read_bytes()
    if hashlib.sha256(contents).hexdigest() != known.get("sha256"):
        raise ValueError(f"path={str(file)!r}: damaged: its checksum is not the one that was written; copy it anew")
    return contents


def digest(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            found.update(block)
    return found.hexdigest()


def _digest_of(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def describe(weight: QuantizedWeight) -> dict[str, Any]:
    return {
        "format": _plain(weight.format),
        "axis": weight.axis,
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
    }


def _plain(value: Any) -> Any:
    """A format as JSON has it: each object a dictionary of its fields, with the name of its class."""
    if not is_dataclass(value):
        return list(value) if isinstance(value, tuple) else value
    kind = type(value).__name__
    if kind != "Format" and KINDS.get(kind) is not type(value):
        raise ValueError(
            f"layout='lotion': {kind} is a class of your own, which no other program knows; use lotion_fx.codebook for "
            "levels of your own"
        )
    return {"kind": kind, **{f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init}}


def format_of(told: Any) -> Format:
    """The format that `_plain` wrote.

    Raises:
        ValueError: it is none.
    """
    made = _made(told)
    if not isinstance(made, Format):
        raise ValueError(f"a format of the export is {told!r}; expected one that this lotion_fx can make")
    return made


def _made(told: Any) -> Any:
    if not isinstance(told, dict):
        return tuple(told) if isinstance(told, list) else told
    kind: Any = Format if told.get("kind") == "Format" else KINDS.get(str(told.get("kind")))
    if kind is None:
        raise ValueError(f"a format of the export has {told.get('kind')!r}, which this lotion_fx does not know")
    return kind(**{name: _made(value) for name, value in told.items() if name != "kind"})
