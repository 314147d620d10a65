"""Inductor's generated Triton on CPU tensors: written for the CPU, and run by the corrected interpreter.

Inductor's private interfaces are touched here and in `lotion_fx.kernels.absent_cuda`, and nowhere else in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._inductor import config
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tests.gpu_less.interpreter import INTERPRETING


class Driver:
    """What Inductor asks of Triton's driver while it writes a kernel."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 166912, "multiprocessor_count": 108}
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def _widest_first(original: Any, self: CachingAutotuner, *args: Any, **kwargs: Any) -> None:
    """The interpreter runs a kernel's first configuration: that of the fewest programs takes it the least time."""
    original(self, *args, **kwargs)
    self.configs.sort(key=lambda c: -math.prod(size for size in c.kwargs.values() if isinstance(size, int)))


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Inside, Inductor writes Triton for CPU tensors, which the interpreter runs."""
    if not INTERPRETING:
        raise RuntimeError("triton_on_cpu: start the process with TRITON_INTERPRET=1")
    init = CachingAutotuner.__init__
    with (
        mock.patch.object(driver, "_active", Driver()),
        mock.patch.object(triton_helpers, "set_driver_to_cpu", lambda: None),
        mock.patch.object(CachingAutotuner, "__init__", lambda *args, **kwargs: _widest_first(init, *args, **kwargs)),
        config.patch(cpu_backend="triton", compile_threads=1, fx_graph_cache=False),
    ):
        yield
