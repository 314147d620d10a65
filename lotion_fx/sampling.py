"""The pass that ``curvature="ggn"`` makes of its own, before the first forward of a step.

The model runs once in the variant of its graphs that carries probes, labels are drawn from its output, and the probes'
gradients of that loss are the step's curvature. The user's own forward carries no probe, and finds gradients, random
numbers and buffers as if nothing had been there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lotion_fx.likelihood import draws, output_in, sampled_loss
from lotion_fx.private import active_data_parallel_group, buffers_of, version_of
from lotion_fx.state import Smoothing


def sample_first(
    call: Callable[..., Any], forward: Callable[..., Any], model: nn.Module, smoothing: Smoothing
) -> Callable[..., Any]:
    """The user's ``forward``, with a curvature pass through ``call`` before it wherever one is due."""

    def run(*args: Any, **kwargs: Any) -> Any:
        smoothing.turn, smoothing.closed = smoothing.turn + smoothing.closed, False
        if model.training and torch.is_grad_enabled():
            smoothing.group = active_data_parallel_group()
            _forget_skipped_step(smoothing)
            if smoothing.has_term and smoothing.pass_is_due and not smoothing.override:
                check_placement(model, smoothing)
                with _undone(model):
                    _sample(smoothing, call, args, kwargs)
        return forward(*args, **kwargs)

    return run


def check_placement(model: nn.Module, smoothing: Smoothing) -> None:
    """Refuses what counts on one backward pass a forward.

    Raises:
        ValueError: a weight is sharded, or the model holds a DistributedDataParallel.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError("curvature='ggn' runs inside DistributedDataParallel: transform the model, then wrap it")
    for weight in smoothing.weights:
        if isinstance(weight.held(), DTensor):
            raise ValueError(
                f"curvature='ggn' runs a backward pass of its own, for which FSDP2 has no place, and {weight.name!r} "
                "is sharded; take curvature='factored', or DistributedDataParallel"
            )


def _sample(smoothing: Smoothing, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Fills the weights' probes with the curvature of the loss at labels that the model draws itself."""
    assert smoothing.likelihood is not None
    smoothing.sampling = True
    try:
        output = output_in(call(*args, **kwargs), smoothing.likelihood)
        probes = [weight.probe for weight in smoothing.weights if weight.probe is not None]
        with torch.autocast(output.device.type, enabled=False):
            loss = sampled_loss(output, smoothing.likelihood, _generator(smoothing, output.device))
            # Gradients of the sum keep clear of half precision's underflow; T = draws / draws^2 makes it the mean's.
            smoothing.draws = draws(output, smoothing.likelihood)
            scale = torch.full_like(loss, smoothing.draws)
            gradients = torch.autograd.grad(loss, probes, scale, allow_unused=True) if probes else ()
    finally:
        smoothing.sampling = False
    for probe, gradient in zip(probes, gradients, strict=True):
        probe.grad = gradient
    smoothing.last_pass = smoothing.turn


def _generator(smoothing: Smoothing, device: torch.device) -> torch.Generator:
    """Fresh labels in each step and on each rank, the same ones in a run resumed under the same seed."""
    rank = dist.get_rank(smoothing.group) if smoothing.group is not None else 0
    return torch.Generator(device).manual_seed(hash((torch.initial_seed(), smoothing.turn, rank)))


def _forget_skipped_step(smoothing: Smoothing) -> None:
    """T begins anew where the gradients of a step that never came were dropped."""
    masters = [weight.master() for weight in smoothing.weights if weight.master]
    if all(master is None or master.grad is None for master in masters):
        smoothing.terms = None


@contextlib.contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Puts back, at the end, the random number generators and every buffer."""
    devices = sorted({parameter.device for parameter in model.parameters()} - {torch.device("cpu")}, key=str)
    kind = devices[0].type if devices else "cuda"
    with torch.random.fork_rng(devices, device_type=kind), kept_buffers(model):
        yield


@contextlib.contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Puts every buffer back at the end, as a tensor and in its values."""
    owners = map(buffers_of, model.modules())
    held = [(owner, name, buffer) for owner in owners for name, buffer in owner.items()]
    kept = [(owner, name, b, version_of(b), b.detach().clone()) for owner, name, b in held if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, version, values in kept:
                owner[name] = buffer
                if version_of(buffer) != version:
                    buffer.copy_(values)
