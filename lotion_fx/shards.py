"""What a parameter holds on this rank, where FSDP2 or tensor parallelism has cut it into shards.

Two kinds of ranks share a parameter. Those that a batch is divided among average their gradients, and hold shards only
between steps, if at all: their graphs see whole weights. Those that the model is divided among compute the same loss,
each with its own shard: their graphs see a `DTensor`, and by this they are told apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lotion_fx import private_ranks
from lotion_fx.numerics.quantizer import Quantizer
from lotion_fx.passes.attach.part import Part
from lotion_fx.passes.attach.probe import Layout


def local_of(tensor: Tensor) -> Tensor:
    """A tensor's values on this rank, detached: the local shard of a DTensor, all rows of a nested one, else itself."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else rows_of(tensor)).detach()


def rows_of(tensor: Tensor) -> Tensor:
    """The rows of a nested tensor, those of all its parts one after another; any other tensor as it is."""
    if not tensor.is_nested:
        return tensor
    if tensor.layout == torch.jagged:
        return tensor.contiguous().values()
    parts = tensor.unbind()
    return torch.cat([part.reshape(-1, part.shape[-1]) if part.dim() > 1 else part for part in parts])


def summed(value: Tensor, group: Any) -> Tensor:
    """A value summed over the ranks of a process group, which must call it together; as it is of no group."""
    if group is None:
        return value
    value = value.clone()
    dist.all_reduce(value, group=group)
    return value


def settle(parameter: Tensor) -> None:
    """Sums a gradient that every rank of tensor parallelism has a part of, as the optimizer would."""
    grad = parameter.grad
    if isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements != parameter.placements:
        parameter.grad = grad.redistribute(placements=parameter.placements)


def sample(grad: Tensor, count: int = 32) -> Tensor:
    """A view of up to ``count`` evenly spaced elements of a gradient, of its local shard if it is a DTensor."""
    flat = local_of(grad).reshape(-1)
    return flat[:: flat.numel() // count | 1][:count]  # an odd stride, or one column of a matrix may be all it sees


def part_of(parameter: Tensor, layout: Layout) -> Part:
    """The part of a weight of this layout that this rank holds."""
    return Part(layout, private_ranks.local_spans(parameter)) if isinstance(parameter, DTensor) else Part.whole(layout)


def index_of(parameter: Tensor) -> Tensor:
    """The place of each element of this rank's part in the whole parameter, row-major, int64 of the part's shape."""
    whole = tuple((0, length) for length in parameter.shape)
    spans = private_ranks.local_spans(parameter) if isinstance(parameter, DTensor) else whole
    index = torch.zeros((), dtype=torch.int64, device=local_of(parameter).device)
    for (start, stop), length in zip(spans, parameter.shape, strict=True):
        index = (index * length)[..., None] + torch.arange(start, stop, device=index.device)
    return index


@dataclass(frozen=True)
class Ranks:
    """Who shares a sharded parameter.

    Args:
        batch: the process group that the batch is divided among; None of none.
        model: the process group that the weight is divided among in graphs too; None of none.
        shards: the number of shards in ``batch``.
        copies: the number of ranks of ``model`` with the same shard.
    """

    batch: Any
    model: Any
    shards: int
    copies: int

    @staticmethod
    def of(parameter: DTensor, in_graphs: DeviceMesh | None) -> Ranks:
        """Those of a parameter.

        Args:
            in_graphs: the mesh of the `DTensor` that graphs take for this weight or others of its model; None of none.

        Raises:
            ValueError: the two kinds of ranks cannot be told apart by the names of the mesh's dimensions.
        """
        mesh, kinds = parameter.device_mesh, parameter.placements
        theirs = () if in_graphs is None else in_graphs.mesh_dim_names or ()
        if mesh == in_graphs:
            dims = list(range(mesh.ndim))
        else:
            dims = [dim for dim, name in enumerate(mesh.mesh_dim_names or ()) if name in theirs]
            if in_graphs is not None and mesh.ndim > 1 and not dims:
                raise ValueError(
                    f"parameter of shape {tuple(parameter.shape)}: its mesh has dimensions {mesh.mesh_dim_names}, "
                    f"that of tensor parallelism {theirs or None}; make both from one mesh with mesh_dim_names"
                )
        others = [dim for dim in range(mesh.ndim) if dim not in dims]
        shards = math.prod(mesh.size(dim) for dim in others if not kinds[dim].is_replicate())
        copies = math.prod(mesh.size(dim) for dim in dims if kinds[dim].is_replicate())
        return Ranks(private_ranks.mesh_group(mesh, others), private_ranks.mesh_group(mesh, dims), shards, copies)


def shared_amax(quantizer: Quantizer, parameter: Tensor) -> list[Tensor]:
    """The tensor-wide absmax over all shards, 0-d float32, for the formats that need it of a sharded weight.

    All ranks must call it together.
    """
    is_needed = isinstance(parameter, DTensor) and quantizer.format.law.two_level
    return [absmax(parameter)] if is_needed else []


def absmax(parameter: Tensor) -> Tensor:
    """The largest magnitude of a parameter over all its shards, 0-d float32. All ranks must call it together."""
    local = local_of(parameter)
    amax = local.abs().amax().float() if local.numel() else torch.zeros((), dtype=torch.float32, device=local.device)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=private_ranks.mesh_group(mesh, range(mesh.ndim)))
    return amax


def over_shards(sums: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The sums [parameters, n] over all ranks, of those parameters that are sharded."""
    meshes = dict.fromkeys(parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor))
    for mesh in meshes:
        copies = torch.tensor([_copies(parameter, mesh) for parameter in parameters], device=sums.device)
        total = sums / copies[:, None].clamp(min=1)
        dist.all_reduce(total, group=private_ranks.mesh_group(mesh, range(mesh.ndim)))
        sums = torch.where(copies[:, None] > 0, total, sums)
    return sums


def _copies(parameter: Tensor, mesh: DeviceMesh) -> int:
    """How many ranks of a mesh hold the same part of a parameter; 0 of one that is not sharded over it."""
    if not isinstance(parameter, DTensor) or parameter.device_mesh != mesh:
        return 0
    return math.prod(mesh.size(dim) for dim, kind in enumerate(parameter.placements) if kind.is_replicate())
