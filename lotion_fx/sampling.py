"""The pass that ``curvature="ggn"`` makes of its own, before each forward of a step that is due.

The model runs once in the variant of its graphs that carries probes, labels are drawn from its output, and the probes'
gradients of that loss are added to the step's curvature. The user's own forward carries no probe, and finds gradients,
random numbers, buffers and its inputs as if nothing had been there.
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

from lotion_fx import private_ranks
from lotion_fx.carried import MADE_ITSELF
from lotion_fx.copied import copied
from lotion_fx.kept_state import kept_state
from lotion_fx.likelihood import draws, output_in, sampled_loss
from lotion_fx.state import Smoothing
from lotion_fx.tally import Tally


def sample_first(
    call: Callable[..., Any], forward: Callable[..., Any], model: nn.Module, smoothing: Smoothing
) -> Callable[..., Any]:
    """The user's ``forward``, with a curvature pass through ``call`` before it wherever one is due."""

    @torch.compiler.disable(reason=MADE_ITSELF)
    def run(*args: Any, **kwargs: Any) -> Any:
        tally = smoothing.tally
        tally.step_of_forwards_began()
        if model.training and torch.is_grad_enabled():
            tally.runs_in(private_ranks.active_data_parallel_group())
            tally.forget_skipped_step()
            if tally.has_term and tally.pass_is_due and not tally.override:
                check_placement(model, smoothing)
                with _undone(model):
                    _sample(smoothing, call, *copied((args, kwargs)))
        return forward(*args, **kwargs)

    return run


def check_placement(model: nn.Module, smoothing: Smoothing) -> None:
    """Refuses what counts on one backward pass a forward, where labels are sampled.

    Raises:
        ValueError: a weight is sharded, or the model holds a DistributedDataParallel.
    """
    if not smoothing.settings.samples_labels:
        return
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError("curvature='ggn' runs inside DistributedDataParallel: transform the model, then wrap it")
    for weight in smoothing.weights:
        if isinstance(weight.parameter(), DTensor):
            raise ValueError(
                f"curvature='ggn' runs a backward pass of its own, for which FSDP2 has no place, and {weight.name!r} "
                "is sharded; take curvature='factored', or DistributedDataParallel"
            )


def _sample(smoothing: Smoothing, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Fills the weights' probes with the curvature of the loss at labels that the model draws itself."""
    likelihood, tally = smoothing.settings.likelihood, smoothing.tally
    assert likelihood is not None
    is_first = tally.resting
    with tally.curvature_pass():
        output = output_in(call(*args, **kwargs), likelihood)
        probes = [probe for weight in smoothing.weights if (probe := weight.gathered.probe) is not None]
        with torch.autocast(output.device.type, enabled=False):
            loss = sampled_loss(output, likelihood, _generator(tally, output.device))
            # Gradients of the sum keep clear of half precision's underflow; T = draws / draws^2 makes it the mean's.
            labels = draws(output, likelihood)
            tally.drew(labels)
            scale = torch.full_like(loss, labels)
            gradients = torch.autograd.grad(loss, probes, scale, allow_unused=True) if probes else ()
        for probe, gradient in zip(probes, gradients, strict=True):
            known = None if is_first else probe.grad
            probe.grad = gradient if known is None else known if gradient is None else known + gradient


def _generator(tally: Tally, device: torch.device) -> torch.Generator:
    """Fresh labels in each forward and on each rank, the same ones in a run resumed under the same seed."""
    rank = dist.get_rank(tally.group) if tally.group is not None else 0
    drawn = 0 if tally.resting else tally.draws
    return torch.Generator(device).manual_seed(hash((torch.initial_seed(), tally.step_of_forwards, rank, drawn)))


@contextlib.contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Puts back, at the end, the random number generators, every buffer, and what is not trained."""
    devices = sorted({parameter.device for parameter in model.parameters()} - {torch.device("cpu")}, key=str)
    kind = devices[0].type if devices else "cuda"
    with torch.random.fork_rng(devices, device_type=kind), kept_state(model):
        yield
