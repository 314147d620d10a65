"""One set of kernel tests for two devices: CPU tensors in Triton's interpreter, and a GPU (``pytest -m gpu``).

``tests/compiled/test_kernels.py`` runs every file here in a process with ``TRITON_INTERPRET=1``. In any other process
the tests carry the marker ``gpu``, and skip where there is none; but for those of kernels for CPUs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness.interpreter import INTERPRETING  # corrects the interpreter, before any kernel is imported

ON_CPUS = ("test_cpu_linear",)  # no kernel of Triton's, and so no device of its own
NO_GPU = pytest.mark.skip(reason="no CUDA device; tests/compiled/test_kernels.py runs this in Triton's interpreter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETING:
        return
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.stem not in ON_CPUS:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(NO_GPU)


@pytest.fixture
def device() -> str:
    """Where a kernel's tensors go: ``"cpu"`` in Triton's interpreter, else ``"cuda"``."""
    return "cpu" if INTERPRETING else "cuda"
