"""What a parameter holds on this rank, where FSDP2 has cut it into shards."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lotion_fx import private
from lotion_fx.numerics.quantizer import Quantizer


def local_of(tensor: Tensor) -> Tensor:
    """A tensor's values on this rank, detached: the local shard of a DTensor, else the tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def sample(grad: Tensor, count: int = 32) -> Tensor:
    """A view of up to ``count`` evenly spaced elements of a gradient, of its local shard if it is a DTensor."""
    flat = local_of(grad).reshape(-1)
    return flat[:: max(1, flat.numel() // count)][:count]


def span_of(parameter: Tensor) -> tuple[int, int]:
    """The part of dimension 0 that this rank holds, [start, stop)."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    return private.local_span(parameter)


def index_of(parameter: Tensor) -> Tensor:
    """The place of each element of this rank's part in the whole parameter, row-major, int64 of the part's shape."""
    local, inner = local_of(parameter), math.prod(parameter.shape[1:])
    first = span_of(parameter)[0] * inner
    return torch.arange(first, first + local.numel(), device=local.device).view(local.shape)


def group_of(parameter: DTensor) -> Any:
    """The process group over which a fully sharded parameter's gradients are averaged."""
    return private.mesh_group(parameter.device_mesh)


def shared_amax(name: str, quantizer: Quantizer, parameter: Tensor) -> list[Tensor]:
    """The tensor-wide absmax over all shards, 0-d float32, for the formats that need it of a sharded weight.

    All ranks must call it together.

    Raises:
        ValueError: shards cut a block in two, or there is one scale for all of them.
    """
    if not isinstance(parameter, DTensor):
        return []
    _check_blocks(name, quantizer, parameter)
    fmt = quantizer.format
    if not (fmt.block == "tensor" or fmt.law.two_level):
        return []
    if fmt.block == "tensor":
        raise ValueError(
            f"fmt: {fmt.name!r} has one differentiable scale for all of {name!r}, which is sharded; "
            "use a block or channel format under FSDP, such as 'int4' or 'nvfp4'"
        )
    local = local_of(parameter)
    amax = local.abs().amax().float() if local.numel() else torch.zeros((), dtype=torch.float32, device=local.device)
    dist.all_reduce(amax, dist.ReduceOp.MAX, group=group_of(parameter))
    return [amax]


def _check_blocks(name: str, quantizer: Quantizer, parameter: DTensor) -> None:
    (start, stop), block, length = span_of(parameter), quantizer.format.block, parameter.shape[0]
    if quantizer.axis != 0 or (start, stop) == (0, length) or block == "tensor":
        return
    if block == "channel" or any(at % int(block) and at != length for at in (start, stop)):
        raise ValueError(
            f"fmt: {quantizer.format.name!r} blocks {name!r} along dimension 0, which is cut into shards inside a "
            f"block, at {start} or {stop}; shard another dimension, or leave it out: only={{{name!r}: None}}"
        )
