"""What only some of the supported versions can do, as marks of the tests that need it."""

import pytest
import torch
import triton
from packaging.version import Version

from lotion_fx.kernels.emit.absent_cuda import EMITS_SINCE
from tests.harness.interpreter import INTERPRETING

needs_emission = pytest.mark.skipif(
    Version(torch.__version__) < Version(EMITS_SINCE),
    reason=f"emitting for a GPU that is not there takes torch {EMITS_SINCE}",
)
needs_scaled_products = pytest.mark.skipif(
    INTERPRETING and Version(triton.__version__) < Version("3.8"),
    reason="Triton's interpreter has scaled products since 3.8",
)

NEGATES_ZERO = Version(triton.__version__) >= Version("3.8")
"""Whether a kernel's ``-x`` makes -0 of 0: older versions subtract from 0."""
