"""PyTorch's private interfaces to processes and shards, see `private`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _disable_current_modes


def active_data_parallel_group() -> Any:
    """The process group of the DistributedDataParallel module whose forward is running, None outside of one."""
    module = DistributedDataParallel._get_active_ddp_module()
    return module.process_group if module is not None else None


def mesh_group(mesh: DeviceMesh, dims: Sequence[int]) -> Any:
    """One process group of a mesh's processes along some of its dimensions; None along none."""
    if len(dims) <= 1:
        return mesh.get_group(dims[0]) if dims else None
    names = mesh.mesh_dim_names if len(dims) < mesh.ndim else None
    return (mesh if names is None else mesh[tuple(names[dim] for dim in dims)])._flatten().get_group()


def identity_of(tensor: Tensor) -> int:
    """An id that a `DTensor` has in common with the tensor it was made of, and with what is made of it on this rank."""
    return id(tensor._local_tensor if isinstance(tensor, DTensor) else tensor)


def storage_of(tensor: Any) -> int | None:
    """An id that tensors share which hold the same values, on this rank; None of what has no storage."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        return None
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()._cdata


def local_spans(parameter: DTensor) -> tuple[tuple[int, int], ...]:
    """[start, stop) along each dimension of this rank's shard of a parameter; also while a graph is traced."""
    with _disable_current_modes():  # of a mesh the rank's place is read from a tensor
        mesh, kinds = parameter.device_mesh, parameter.placements
        lengths, starts = compute_local_shape_and_global_offset(parameter.shape, mesh, kinds)
    return tuple((start, start + length) for start, length in zip(starts, lengths, strict=True))
