"""A bar for what takes long."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import TypeVar

Item = TypeVar("Item")


def with_a_bar(what: str, items: Iterable[Item], total: int) -> Iterable[Item]:
    """The items, with a bar where somebody sees it, it takes over two seconds, and tqdm is installed."""
    if find_spec("tqdm") is None:
        return items
    from tqdm import tqdm

    return tqdm(items, what, total, leave=False, delay=2, disable=None)
