"""`penalty`: the expected-loss term as a differentiable scalar, for objectives of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lotion_fx.state import Weight, weights_of
from lotion_fx.update import curvature_of


class _Term(torch.autograd.Function):
    """One weight's term; its backward tells the hook that the term is in the loss already."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, h: Tensor, weight: Weight) -> Tensor:
        ctx.save_for_backward(parameter, h)
        ctx.weight = weight
        return 0.5 * (h * weight.quantizer.variance(parameter)).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        parameter, h = ctx.saved_tensors
        ctx.weight.gathered.entered_objective()
        slope = ctx.weight.quantizer.variance_vjp(parameter, h)
        return (0.5 * grad * slope).to(parameter.dtype), None, None


def penalty(model: nn.Module) -> Tensor:
    """The term ``strength * 1/2 sum_i h_i sigma_i^2``, 0-d and differentiable, for objectives of one's own.

    It takes the curvature gathered up to the last step: it is 0 before the first, for a method without term, for frozen
    weights, and for those whose term is in the loss itself (``loss_fn``). A step whose backward pass ran through it
    gets no second term from the optimizer's hook.

    Raises:
        ValueError: the model is not under lotion_fx, or its parameters are sharded.
    """
    total = None
    for weight in weights_of(model):
        parameter = weight.parameter()
        tally = weight.smoothing.tally
        if parameter is None or not weight.selected or not tally.has_term or tally.is_frozen(weight):
            continue
        if isinstance(parameter, DTensor):
            raise ValueError(f"model: {weight.name!r} is sharded; penalty needs whole weights, use the step's term")
        total = parameter.new_zeros((), dtype=torch.float32) if total is None else total
        h = curvature_of(weight, parameter)
        if h is not None:
            total = total + tally.strength_of(weight) * _Term.apply(parameter, h, weight)
    return next(model.parameters()).new_zeros((), dtype=torch.float32) if total is None else total
