"""What runs in Triton's interpreter runs in one process for each file of tests here, however many those are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest

from tests.harness.interpreted import Outcome, run_interpreted


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted(file): tells what became of a file that `interpreted` ran")


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Callable[[bool], Mapping[Path, Outcome]]:
    """What became of all files that this module's tests are about: of their fast tests, or of their slow ones.

    Not the session's: each of pytest's workers has one, with all tests in it and its own files to run.
    """
    wanted: dict[bool, list[Path]] = {False: [], True: []}
    for item in request.session.items:
        if item.path == request.path and (marker := item.get_closest_marker("interpreted")):
            wanted[item.get_closest_marker("slow") is not None].append(marker.args[0])

    @cache
    def run(slow: bool) -> Mapping[Path, Outcome]:
        return run_interpreted(wanted[slow], "-m", "slow" if slow else "not slow")

    return run


@pytest.fixture
def interpreted(runs: Callable[[bool], Mapping[Path, Outcome]], request: pytest.FixtureRequest) -> Outcome:
    """What became of the file in the test's marker; of its slow tests where the test is slow."""
    marker = request.node.get_closest_marker("interpreted")
    return runs(request.node.get_closest_marker("slow") is not None)[marker.args[0]]
