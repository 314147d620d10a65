"""A weight that graphs take in shards, as a `DTensor`: tensor parallelism's, of which each rank computes with its own.

A shard is rounded by itself. Where it cuts a block in two, or one scale is for all of the weight, every rank gathers
the weight for as long as that takes, rounds it whole and keeps its own part.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lotion_fx.numerics.quantizer import Quantizer
from lotion_fx.numerics.rounding import compute_dtype
from lotion_fx.passes.attach.part import Part
from lotion_fx.passes.attach.probe import Layout
from lotion_fx.private_ranks import local_spans


def is_cut(quantizer: Quantizer, weight: Tensor) -> bool:
    """Whether some rank's shard cuts a block in two, so that no rank can scale its own: the same on every rank."""
    if not isinstance(weight, DTensor):
        return False
    block, axis = quantizer.format.block, quantizer.axis % weight.dim()
    if block == "tensor":
        return not all(kind.is_replicate() for kind in weight.placements)
    mesh, ends, length = weight.device_mesh, [0, weight.shape[axis]], weight.shape[axis]
    for dim, kind in enumerate(weight.placements):
        if getattr(kind, "dim", None) == axis:
            ends = _chunked(ends, mesh.size(dim))
    return any(end != length and (block == "channel" or end % int(block)) for end in ends[1:])


def _chunked(ends: list[int], count: int) -> list[int]:
    """Ends of shards, each of which `torch.chunk` cuts once more."""
    found = [0]
    for start, stop in itertools.pairwise(ends):
        size = max(1, -(-(stop - start) // count))
        found += [min(stop, start + size * (i + 1)) for i in range(count)]
    return found


def gathered(weight: Tensor) -> Tensor:
    """All of a weight, or of what is sharded like it; a tensor that is not sharded is that already."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def like(whole: Tensor, weight: Tensor) -> Tensor:
    """What is given for all of a weight, sharded as the weight is."""
    if not isinstance(weight, DTensor):
        return whole
    local = Part(Layout("full", tuple(weight.shape), 1, 1), local_spans(weight)).cut(whole)
    return DTensor.from_local(
        local.contiguous(),
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=whole.stride(),
    )


def uniform(weight: Tensor) -> Tensor | None:
    """The randomness of a sharded weight's rounding, drawn by every rank for all of it, as one process would; or None.

    None leaves it to the rounding, of a weight that is not sharded.
    """
    if not isinstance(weight, DTensor):
        return None
    return like(torch.rand(weight.shape, dtype=compute_dtype(weight), device=weight.device), weight)


def curvature(grad: Tensor, out: Tensor, kind: str, groups: int, rows: int, direct: bool) -> Tensor:
    """The probe's gradient; of a sharded weight from this rank's gradient, in its place in the vector of the whole."""
    if not isinstance(grad, DTensor) or not isinstance(out, DTensor):
        return torch.ops.lotion_fx.curvature(grad, out, kind, groups, rows, direct)
    if grad.placements != out.placements:  # summed over ranks, of which each has seen a part: no contraction is left
        grad = grad.redistribute(placements=out.placements)
    part = Part(Layout(kind, tuple(out.shape), groups, rows, direct), local_spans(out))
    own, local, of = part.own, grad.to_local(), out.to_local()
    return part.placed(torch.ops.lotion_fx.curvature(local, of, own.kind, own.groups, own.rows, own.direct))
