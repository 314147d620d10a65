"""The interpreter that proves the kernels is itself proven, and still is the one whose pieces were replaced."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import triton
from packaging.version import Version
from triton.runtime import interpreter

from tests.harness.interpreted import Outcome
from tests.harness.interpreter import REPLACEMENTS, Replacement


@pytest.mark.interpreted(Path(__file__).with_name("check_interpreter.py"))
def test_corrected_arithmetic(interpreted: Outcome) -> None:
    interpreted.check()


@pytest.mark.parametrize("piece", REPLACEMENTS, ids=lambda piece: f"{piece.owner.__name__}.{piece.name}")
def test_triton_still_has_what_is_replaced(piece: Replacement) -> None:
    where = f"{piece.owner.__name__}.{piece.name} of triton {triton.__version__}"
    if Version(triton.__version__) < Version(piece.since):
        assert not hasattr(piece.owner, piece.name), f"{where} is there: it is not since {piece.since} only"
        return
    assert hasattr(piece.owner, piece.name), f"{where} is gone: see whether its defect remains: {piece.defect}"
    found = tuple(inspect.signature(getattr(piece.owner, piece.name)).parameters)
    assert found == piece.parameters, f"{where} now takes {found}: adapt tests/harness/interpreter.py"


@pytest.mark.parametrize("name", ["load", "store", "atomic_rmw", "atomic_cas"])
def test_triton_still_has_what_counts_traffic(name: str) -> None:
    found = hasattr(interpreter._interpreter, name)
    assert found, f"the interpreter of triton {triton.__version__} has no {name}: adapt counted_traffic"
