"""What was read from machine code, kept on disk: a kernel that has not changed is compiled once on a machine.

One file an entry, named by a hash of all that decides it. Written to a file of its own and then renamed, so that no
reader sees half of one; what cannot be read is as good as absent.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/lotion_fx/kernels``, by default under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lotion_fx" / "kernels"


@dataclass(frozen=True)
class Kept:
    """A folder of entries; nothing fails where it cannot be written or read.

    Args:
        folder: made when the first entry is written.
    """

    folder: Path

    def read(self, key: str) -> Any:
        """The entry of a key, None where there is none or it is damaged."""
        try:
            entry = json.loads((self.folder / f"{key}.json").read_text())
            return entry["found"] if entry["key"] == key else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, key: str, found: Any) -> None:
        """Keeps a value of JSON's types under a key."""
        text = json.dumps({"key": key, "found": found})
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.folder, suffix=".part", delete=False) as file:
                file.write(text)
            os.replace(file.name, self.folder / f"{key}.json")
