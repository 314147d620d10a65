"""Which device a tensor is on, as the kernels see it. Needs no Triton, so that passes can ask where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec

import torch

from lotion_fx.kernels.targets import Target, nearest
from lotion_fx.numerics.formats import Format, resolve

E2M1_GRID = resolve("fp4").grid


def arch_of(device: torch.device) -> int | None:
    """The compute capability of a device that kernels are for, 80 for ``sm_80``.

    None on a CPU, on AMD, without Triton, and before Ampere, for which no kernel was compiled.
    """
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor if major >= 8 else None


def required_arch(device: torch.device) -> int:
    """`arch_of` a device on which a kernel is about to run.

    Raises:
        NotImplementedError: the kernels are for none such.
    """
    arch = arch_of(device)
    if arch is None:
        raise NotImplementedError(f"device={device}: kernels are for NVIDIA's sm_80 and later, and a CPU takes ATen")
    return arch


def target_of(device: torch.device) -> Target:
    """The target nearest to a CUDA device; see `targets.nearest`, and `required_arch` for what is raised."""
    return nearest(required_arch(device))


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[int]:
    """Inside, kernels are launched on this device, for Triton takes the current one; gives its `required_arch`."""
    arch = required_arch(device)
    if device.index == torch.cuda.current_device():
        yield arch
    else:
        with torch.cuda.device(device):
            yield arch


def has_conversion(fmt: Format, arch: int) -> bool:
    """Whether an architecture converts to this format's levels in one instruction: E2M1's, on Blackwell."""
    return fmt.grid == E2M1_GRID and nearest(arch).supports("e2m1")
