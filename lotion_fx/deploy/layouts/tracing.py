"""A model made ready to be traced: its arguments, and outputs that need no class of their own to be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lotion_fx.attributes import config_of
from lotion_fx.deploy.content import Content, plain_copy
from lotion_fx.scalars import shown


def arguments(layout: str, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the named arguments of a forward.

    Raises:
        ValueError: none are given.
        TypeError: they are no tuple or dictionary.
    """
    if example_inputs is None:
        raise ValueError(
            f"layout={layout!r} traces the model: pass example_inputs=, such as (x,) or dict(input_ids=ids)"
        )
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise TypeError(f"example_inputs={shown(example_inputs)}: expected a tuple of arguments, or a dictionary by name")


def traceable(content: Content) -> nn.Module:
    """A plain copy of the model at its rounded weights, which gives a tensor or a tuple where it gave a mapping.

    A Hugging Face model keeps no cache of keys in it, which would be one more output.
    """
    made = plain_copy(content.model, content.weights)
    config = config_of(made)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # the copy has a configuration of its own
    made.register_forward_hook(_tensors)
    return made


def _tensors(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    if not isinstance(outputs, Mapping):
        return outputs
    found = tuple(x for x in outputs.values() if isinstance(x, Tensor))
    return found[0] if len(found) == 1 else found
