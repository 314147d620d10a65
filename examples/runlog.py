"""A log of finished runs that a sweep goes on from: one JSON object a line, added when a run ends and never changed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

Record = TypeVar("Record")


def read(path: Path, record: type[Record]) -> Iterator[Record]:
    """The runs of a log, in its order; none where there is no file.

    Args:
        record: the dataclass that a line holds the fields of.

    Raises:
        ValueError: a line is no such run; the last one, which a killed process may have cut, is passed over and named.
    """
    lines = path.read_text().split("\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                yield record(**json.loads(line))
        except (ValueError, TypeError) as error:
            if number == len(lines):  # whatever was written whole ends in a newline
                print(f"{path}:{number}: cut off in the middle; that run is done again")
                return
            raise ValueError(f"{path}:{number}: no run of this log ({error}); mend the line or take it out") from None


def add(path: Path, run: Any) -> None:
    """Adds a run, a dataclass, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() and path.read_bytes()[-1:] != b"\n":  # drop the half line of a killed process
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(json.dumps(asdict(run)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def fingerprint(**what: Any) -> str:
    """Eight digits that change with anything that a run is said to depend on."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


@cache
def commit() -> str:
    """Of the checkout that this file is in, with "+" where its code differs from it; "unknown" outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", ":/*.py")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "") or "unknown"
