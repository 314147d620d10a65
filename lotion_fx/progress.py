"""A bar for what takes long."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import TypeVar

Item = TypeVar("Item")


def with_a_bar(what: str, items: Iterable[Item], total: int) -> Iterable[Item]:
    """The items, with a bar where somebody sees it, it takes over two seconds, and tqdm is installed."""
    if find_spec("tqdm") is None:
        return items
    from tqdm import tqdm

    return tqdm(items, what, total, leave=False, delay=2, disable=None)


@contextlib.contextmanager
def with_a_line(what: str) -> Iterator[None]:
    """While the body runs, a line says what takes so long that no bar can divide, where somebody sees it."""
    shows, line = sys.stderr.isatty(), f"{what} ..."
    if shows:
        print(line, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shows:
            print("\r" + " " * len(line), end="\r", file=sys.stderr, flush=True)
