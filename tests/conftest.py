"""One clone a run, one core a worker, and neither a format nor a log's level left behind.

An editable install made in another clone would give its folders to the tests of this one, unseen.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

# Read when torch is imported, so before any test is: a worker a core leaves no core for a second thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "lotion_fx": "lotion_fx",
    "lotion_fx.passes": "passes",
    "lotion_fx.kernels": "kernels",
    "lotion_fx.examples": "examples",
}


@pytest.fixture(autouse=True)
def formats_of_the_test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone with it: which tests came before in a worker is a matter of chance."""
    from lotion_fx.numerics import formats

    monkeypatch.setattr(formats, "_REGISTERED", dict(formats._REGISTERED))


@pytest.fixture(autouse=True)
def loudness_of_the_test_alone() -> Iterator[None]:
    """A command that silences our log, called as a function, silences no later test of its worker."""
    logger = logging.getLogger("lotion_fx")
    level = logger.level
    yield
    logger.setLevel(level)


def pytest_configure(config: pytest.Config) -> None:
    if refusal := from_elsewhere({name: _folder(name) for name in FOLDERS}, ROOT):
        raise pytest.UsageError(refusal)


def from_elsewhere(found: Mapping[str, Path | None], root: Path) -> str:
    """What is wrong where a package is not the clone's own, in one sentence; empty where all are.

    Args:
        found: the folder that each package imports from, None where there is none.
        root: of the clone whose tests are to run.
    """
    strangers = {name: path for name, path in found.items() if path is None or not _same(path, root / FOLDERS[name])}
    if not strangers:
        return ""
    where = ", ".join(f"{name} from {path or 'nowhere'}" for name, path in strangers.items())
    return f"the tests of {root} would run {where}; run `pip install -e .` in {root}"


def _same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve()


def _folder(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # of the package around it
        return None
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
