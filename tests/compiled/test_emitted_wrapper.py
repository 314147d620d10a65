"""The wrapper that Inductor emits for a GPU, its kernels and all, computes a training step on CPU as eager does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.interpreted import run_interpreted

CHECKS = Path(__file__).with_name("check_emitted_wrapper.py")


def test_emitted_wrapper() -> None:
    run_interpreted(CHECKS)


@pytest.mark.slow
def test_emitted_wrapper_of_another_architecture() -> None:
    run_interpreted(CHECKS, "-m", "slow")
