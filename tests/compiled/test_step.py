"""A whole training step, as Inductor writes it in Triton, gives what the same step gives without a compiler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness.inductor import PRIVATE
from tests.harness.interpreted import Outcome

CHECKS = Path(__file__).with_name("check_step.py")


@pytest.mark.interpreted(CHECKS)
def test_step(interpreted: Outcome) -> None:
    interpreted.check()


@pytest.mark.slow
@pytest.mark.interpreted(CHECKS)
def test_step_with_other_formats_and_types(interpreted: Outcome) -> None:
    interpreted.check()


@pytest.mark.parametrize(("owner", "name"), PRIVATE, ids=lambda value: value if isinstance(value, str) else "")
def test_torch_still_has_what_is_replaced(owner: object, name: str) -> None:
    assert hasattr(owner, name), f"torch {torch.__version__} no longer has {name}: adapt tests/harness/inductor.py"
