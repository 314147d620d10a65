"""What is exported: a transformed model's codes and scales, and every other tensor of its `state_dict`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lotion_fx import private
from lotion_fx.attributes import attribute_of, config_of
from lotion_fx.deploy.packed_model import refuse_packed, without_hooks
from lotion_fx.deploy.weights import QuantizedWeight, quantized
from lotion_fx.names import plain_name


@dataclass(frozen=True, eq=False)
class Content:
    """One transformed model, as a layout takes it.

    Args:
        model: the transformed model, which a layout may look at and must not change.
        weights: by name, without those that are other names of one.
        others: the other parameters and buffers of its `state_dict`, likewise.
        tied: other name -> first name, of weights and of others.
        tokenizer: of a Hugging Face model, saved beside it; None where there is none.
    """

    model: nn.Module
    weights: dict[str, QuantizedWeight]
    others: dict[str, Tensor]
    tied: dict[str, str]
    tokenizer: Any = None

    @staticmethod
    def of(model: nn.Module, tokenizer: Any = None) -> Content:
        """
        Raises:
            ValueError: as `quantized`; or the state holds something that is no tensor.
        """
        refuse_packed(model)
        return Content.with_weights(model, quantized(model), tokenizer)

    @staticmethod
    def with_weights(model: nn.Module, weights: dict[str, QuantizedWeight], tokenizer: Any = None) -> Content:
        """That of a model, transformed or plain, whose weights are given.

        Raises:
            ValueError: the state holds something that is no tensor.
        """
        first: dict[int, str] = {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in weights:
            first[id(parameters.get(name))] = name
        others: dict[str, Tensor] = {}
        tied: dict[str, str] = {}
        for key, value in model.state_dict(keep_vars=True).items():
            name = plain_name(key)
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"model: its state_dict has {name!r} of type {type(value).__name__}; only tensors can be exported"
                )
            if name in weights:
                continue
            if (known := first.setdefault(id(value), name)) != name:
                tied[name] = known
            else:
                others[name] = (value.full_tensor() if isinstance(value, DTensor) else value).detach()
        return Content(model, weights, others, tied, tokenizer)

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the state at the values that `eval()` computes with, other names included."""
        for name, weight in self.weights.items():
            yield name, weight.dequantize()
        yield from self.others.items()
        for name, known in self.tied.items():
            yield name, self.weights[known].dequantize() if known in self.weights else self.others[known]

    def names(self, weight: str) -> list[str]:
        """All that a weight goes by, its first name first."""
        return [weight, *(other for other, known in self.tied.items() if known == weight)]

    @property
    def is_from_transformers(self) -> bool:
        return config_of(self.model) is not None and attribute_of(self.model, "save_pretrained") is not None


def plain_copy(model: nn.Module, weights: dict[str, QuantizedWeight]) -> nn.Module:
    """A copy of a transformed model that nothing of lotion_fx is left in, in eval(), at its rounded weights.

    Args:
        weights: `quantized(model)`.
    """
    made = without_hooks(model).eval()
    parameters = dict(made.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight.dequantize())
    return made.requires_grad_(False)


def first_tensor(out: Any) -> Tensor:
    """The logits of a model's output, else the first tensor that is no scalar."""
    logits = attribute_of(out, "logits")
    if isinstance(logits, Tensor):
        return logits
    leaves = [leaf for leaf in private.tree_leaves(out) if isinstance(leaf, Tensor)]
    for leaf in leaves:
        if leaf.dim():
            return leaf
    raise ValueError("batch: the model returns no tensor to compare")
