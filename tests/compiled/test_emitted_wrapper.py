"""The wrapper that Inductor emits for a GPU, its kernels and all, computes a training step on CPU as eager does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.interpreted import Outcome
from tests.harness.versions import needs_emission

pytestmark = needs_emission

CHECKS = Path(__file__).with_name("check_emitted_wrapper.py")


@pytest.mark.interpreted(CHECKS)
def test_emitted_wrapper(interpreted: Outcome) -> None:
    interpreted.check()


@pytest.mark.slow
@pytest.mark.interpreted(CHECKS)
def test_emitted_wrapper_of_another_architecture(interpreted: Outcome) -> None:
    interpreted.check()
