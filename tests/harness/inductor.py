"""Inductor's generated Triton on CPU tensors, written for the CPU or for a CUDA architecture, run by the interpreter.

Inductor's private interfaces are touched here and in `lotion_fx.kernels.absent_cuda`, and nowhere else in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._C._dynamo import guards
from torch._inductor import config
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tests.harness.interpreter import INTERPRETING


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


PRIVATE = (
    (driver, "_active"),
    (config, "cpu_backend"),
    (triton_helpers, "set_driver_to_cpu"),
    (triton_helpers, "set_driver_to_gpu"),
    (CachingAutotuner, "__init__"),
    (guards, "_empty_strided_cpu"),
    (guards, "_empty_strided_cuda"),
    (torch.cuda, "_DeviceGuard"),
)
"""What is replaced below or set: a test tells when a new PyTorch lacks it."""


@contextmanager
def _widest_first() -> Iterator[None]:
    """The interpreter runs a kernel's first configuration: that of the fewest programs takes it the least time."""
    original = CachingAutotuner.__init__

    def init(self: CachingAutotuner, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.configs.sort(key=lambda c: -math.prod(size for size in c.kwargs.values() if isinstance(size, int)))

    with mock.patch.object(CachingAutotuner, "__init__", init):
        yield


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Inside, Inductor writes Triton for CPU tensors, which the interpreter runs."""
    if not INTERPRETING:
        raise RuntimeError("triton_on_cpu: start the process with TRITON_INTERPRET=1")
    with (
        _widest_first(),
        mock.patch.object(driver, "_active", Driver()),
        mock.patch.object(triton_helpers, "set_driver_to_cpu", lambda: None),
        config.patch(cpu_backend="triton", compile_threads=1, fx_graph_cache=False),
    ):
        yield


@contextmanager
def _cpu_for_cuda() -> Iterator[None]:
    """Inside, what a wrapper for CUDA allocates lies on the CPU, and its streams and device guards are nothing."""
    with (
        mock.patch.object(guards, "_empty_strided_cuda", guards._empty_strided_cpu),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, create=True),
        mock.patch.object(torch.cuda, "_DeviceGuard", lambda device: nullcontext()),
        mock.patch.object(torch.cuda, "set_device", lambda device: None),
        mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None),
    ):
        yield


def cuda_wrapper_on_cpu(source: str) -> Callable[[list[Any]], Any]:
    """The function of an emitted module, to be called with one list of CPU tensors.

    Args:
        source: `lotion_fx.kernels.emitted.Emitted.source`.
    """
    with _cpu_for_cuda(), _widest_first():
        module = PyCodeCache.load(source)

    def call(inputs: list[Any]) -> Any:
        with _cpu_for_cuda():
            return module.call(inputs)

    return call
