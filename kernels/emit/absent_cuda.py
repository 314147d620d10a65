"""The mocks: what PyTorch, Inductor and Triton ask of a CUDA device, answered for one that is not there.

Inductor writes a kernel's source without launching anything; it only asks which device it writes for. Inside
`absent_cuda(80)` it is told an A100. What is replaced is an entry of `MOCKS` that says why it is there, and
`tests/compiled/test_absent_cuda.py` is the canary that names the entry which a new release of PyTorch or Triton took.
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
from lotion_fx.private import TorchDispatchMode, UniformValueConstantFolder


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
        kind: what it is: ``"function"``, ``"static method"``, ``"method"``, ``"class"`` or ``"value"``.
        why: who asks, and what for.
        make: the replacement, for an architecture.
    """

    owner: str
    name: str
    kind: str
    why: str
    make: Callable[[int], Any]


def _properties(arch: int) -> Callable[..., Any]:
    return lambda device=None: properties(arch)


def _always(value: Any) -> Callable[[int], Callable[..., Any]]:
    return lambda arch: lambda *args, **kwargs: value


class _OnCpu(TorchDispatchMode):
    """Makes on CPU what is asked for on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{name: "cpu" if name == "device" else value for name, value in (kwargs or {}).items()})


_deduce_value = UniformValueConstantFolder._deduce_value


def _deduced_on_cpu(self: UniformValueConstantFolder, node: torch.fx.Node) -> Any:
    with _OnCpu():
        return _deduce_value(self, node)


def _unguarded_copy(arch: int) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: torch.ops.aten.copy_.default(self, *args, **kwargs)


CUDA, INTERFACE = "torch.cuda", "torch._dynamo.device_interface:CudaInterface"
MOCKS = (
    Mock(CUDA, "is_available", "function", "everything that is for a device asks it first", _always(True)),
    Mock(CUDA, "current_device", "function", "the wrapper's code names the device", _always(0)),
    Mock(CUDA, "device_count", "function", "the properties of all devices are asked for", _always(1)),
    Mock(CUDA, "device", "class", "lowering enters the device", lambda arch: contextlib.nullcontext),
    Mock(CUDA, "get_device_properties", "function", "Triton's presence depends on the architecture", _properties),
    Mock(CUDA, "get_rng_state", "function", "tracing keeps the device's generator as it was", _always(torch.zeros(16))),
    Mock(CUDA, "set_rng_state", "function", "tracing puts the device's generator back", _always(None)),
    Mock(INTERFACE, "get_device_properties", "static method", "splits, tiles and the target depend on it", _properties),
    Mock(
        "torch._dynamo.device_interface",
        "caching_worker_device_properties",
        "value",
        "another architecture's properties may be in it, and would stay",
        lambda arch: {"cuda": [properties(arch)]},
    ),
    Mock(
        "torch:Tensor", "copy_", "method", "its binding asks a build without CUDA for a device guard", _unguarded_copy
    ),
    Mock("torch.version", "cuda", "value", "without it the device is taken for AMD's", lambda arch: "13.0"),
    Mock(
        "torch._inductor.fx_passes.joint_graph:UniformValueConstantFolder",
        "_deduce_value",
        "method",
        "it folds constants by making them on the device",
        lambda arch: _deduced_on_cpu,
    ),
    Mock("torch._inductor.runtime.triton_helpers", "set_driver_to_gpu", "function", "it loads libcuda", _always(None)),
    Mock("triton.runtime.driver:driver", "_active", "value", "Triton asks its driver for the target", Driver),
)
# Where functools caches hold what was learned about the device before.
CACHES = (
    "torch.utils._triton",
    "torch._inductor.utils",
    "torch._inductor.codecache:CacheBase",
    "torch._inductor.runtime.hints:DeviceProperties",
)


def resolve(owner: str) -> Any:
    """The object that ``"module:attribute"`` names."""
    module, _, attribute = owner.partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


EMITS_SINCE = "2.13"
"""The first version of torch that the replacements were written for."""


@contextlib.contextmanager
def absent_cuda(arch: int) -> Iterator[None]:
    """Inside, the process seems to have one CUDA device of an architecture.

    Args:
        arch: 80, 86, 89, 90, 100, 103 or 120.

    Raises:
        NotImplementedError: an older torch, which asks the device in other places.
    """
    if torch.__version__ < EMITS_SINCE:
        raise NotImplementedError(
            f"emitting for a GPU that is not there takes torch {EMITS_SINCE}, and this is {torch.__version__}"
        )
    with contextlib.ExitStack() as stack:
        stack.callback(_forget)
        for each in MOCKS:
            made = each.make(arch)
            made = staticmethod(made) if each.kind == "static method" else made
            stack.enter_context(mock.patch.object(resolve(each.owner), each.name, made))
        _forget()
        yield


def _forget() -> None:
    for owner in CACHES:
        for held in list(vars(resolve(owner)).values()):
            held = held.__func__ if isinstance(held, (staticmethod, classmethod)) else held
            if isinstance(held, functools._lru_cache_wrapper):
                held.cache_clear()
