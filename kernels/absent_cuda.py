"""The mocks: what PyTorch, Inductor and Triton ask of a CUDA device, answered for one that is not there.

Inductor writes a kernel's source without launching anything; it only asks which device it writes for. Inside
`absent_cuda(80)` it is told an A100. This is the one module besides `lotion_fx.backend` that touches PyTorch's private
interfaces: each is an entry of `MOCKS` that says why it is there, and `tests/gpu_less/test_mocks.py` is the canary that
names the entry which a new release of PyTorch or Triton took away.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget

from lotion_fx.kernels.targets import TARGETS


def properties(arch: int) -> SimpleNamespace:
    """What ``torch.cuda.get_device_properties`` would say of an architecture's device."""
    target = TARGETS[arch]
    return SimpleNamespace(
        name=f"NVIDIA {target.device}",
        major=arch // 10,
        minor=arch % 10,
        multi_processor_count=target.multiprocessors,
        max_threads_per_multi_processor=target.threads,
        max_threads_per_block=1024,
        regs_per_multiprocessor=target.registers,
        warp_size=32,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=_shared(arch),
        shared_memory_per_multiprocessor=target.shared << 10,
        L2_cache_size=target.l2 << 20,
        total_memory=80 << 30,
    )


def _shared(arch: int) -> int:
    """Bytes of shared memory of one program: the system keeps 1 KiB of the multiprocessor's."""
    return (TARGETS[arch].shared - 1) << 10


class Driver:
    """Triton's driver for a device that compiles and never launches."""

    binary_ext = "cubin"

    def __init__(self, arch: int) -> None:
        known = {
            "max_shared_mem": _shared(arch),
            "max_num_regs": TARGETS[arch].registers,
            "multiprocessor_count": TARGETS[arch].multiprocessors,
            "warpSize": 32,
        }
        self.arch, self.utils = arch, SimpleNamespace(get_device_properties=lambda device: known)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@dataclass(frozen=True)
class Mock:
    """One private or device-bound name that is replaced.

    Args:
        owner: module, or module and class, that holds the name.
        name: attribute of the owner.
        kind: what it must be for the mock to mean anything: ``"function"``, ``"staticmethod"``, ``"value"``.
        why: who asks, and what for.
        make: the replacement, for an architecture.
    """

    owner: str
    name: str
    kind: str
    why: str
    make: Callable[[int], Any]


def _always(value: Any) -> Callable[[int], Callable[..., Any]]:
    return lambda arch: lambda *args, **kwargs: value


CUDA, INTERFACE = "torch.cuda", "torch._dynamo.device_interface:CudaInterface"
MOCKS = (
    Mock(CUDA, "is_available", "function", "every gate in front of CUDA code", _always(True)),
    Mock(CUDA, "device_count", "function", "", _always(1)),
    Mock(CUDA, "current_device", "function", "", _always(0)),
    Mock(CUDA, "get_device_properties", "function", "", lambda arch: lambda device=None: properties(arch)),
    Mock(CUDA, "get_device_capability", "function", "", lambda arch: lambda device=None: (arch // 10, arch % 10)),
    Mock(CUDA, "get_device_name", "function", "", lambda arch: lambda device=None: properties(arch).name),
    Mock(CUDA, "is_bf16_supported", "function", "", _always(True)),
    Mock(CUDA, "is_tf32_supported", "function", "", _always(True)),
    Mock(CUDA, "synchronize", "function", "", _always(None)),
    Mock(CUDA, "set_device", "function", "", _always(None)),
    Mock(CUDA, "_lazy_init", "function", "", _always(None)),
    Mock(CUDA, "mem_get_info", "function", "", _always((70 << 30, 80 << 30))),
    Mock(CUDA, "get_rng_state", "function", "", _always(torch.zeros(16, dtype=torch.uint8))),
    Mock(CUDA, "set_rng_state", "function", "", _always(None)),
    Mock(CUDA, "device", "class", "", lambda arch: contextlib.nullcontext),
    Mock(INTERFACE, "is_available", "function", "", _always(True)),
    Mock(INTERFACE, "get_device_properties", "function", "", lambda arch: lambda device=None: properties(arch)),
    Mock(INTERFACE, "current_device", "function", "", _always(0)),
    Mock(INTERFACE, "device_count", "function", "", _always(1)),
    Mock(INTERFACE, "exchange_device", "function", "", _always(0)),
    Mock(INTERFACE, "maybe_exchange_device", "function", "", _always(0)),
    Mock(INTERFACE, "synchronize", "function", "", _always(None)),
    Mock(INTERFACE, "set_device", "function", "", _always(None)),
    Mock(INTERFACE, "get_raw_stream", "function", "", _always(0)),
    Mock("torch:Tensor", "copy_", "method", "", lambda arch: lambda *args: torch.ops.aten.copy_.default(*args)),
    Mock("torch.version", "cuda", "value", "", lambda arch: "13.0"),
    Mock("triton.runtime.driver:driver", "_active", "value", "", Driver),
    Mock("torch._inductor.runtime.triton_helpers", "set_driver_to_gpu", "function", "", _always(None)),
)


def resolve(owner: str) -> Any:
    """The object that ``"module:attribute"`` names."""
    module, _, attribute = owner.partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


@contextlib.contextmanager
def absent_cuda(arch: int) -> Iterator[None]:
    """Inside, the process seems to have one CUDA device of an architecture.

    Args:
        arch: 80, 86, 89, 90, 100, 103 or 120.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(_forget)
        for each in MOCKS:
            owner, replacement = resolve(each.owner), each.make(arch)
            bound = isinstance(owner, type) and callable(replacement) and each.kind != "method"
            stack.enter_context(
                mock.patch.object(owner, each.name, staticmethod(replacement) if bound else replacement)
            )
        _forget()
        yield


# Where Inductor keeps what it learned about the device in functools caches.
CACHES = (
    "torch._inductor.utils",
    "torch._inductor.codegen.triton",
    "torch._inductor.runtime.hints",
    "torch._inductor.runtime.hints:DeviceProperties",
    "torch._inductor.codecache:CacheBase",
    "torch.utils._triton",
)


def _forget() -> None:
    for owner in CACHES:
        for held in list(vars(resolve(owner)).values()):
            held = held.__func__ if isinstance(held, (staticmethod, classmethod)) else held
            if isinstance(held, functools._lru_cache_wrapper):
                held.cache_clear()
