"""`preset`: ready-made values of `transform`'s ``only``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import EllipsisType
from typing import Any

from torch import nn

from lotion_fx.choosing import Kind, Place, near

_HEADS = ("lm_head", "embed_out", "unembed")
_TOP_HEADS = (*_HEADS, "head", "output", "output_projection", "generator", "score", "classifier")
_ROUTERS = ("router", "routers", "gating")
_GATES = (
    "gate",
    "wg",
    "shared_expert_gate",
    "gate_network",
)  # in other models these are no routers, but as wide as data


def preset(name: str) -> dict[Any, EllipsisType | None]:
    """A mapping for `transform`'s ``only``, to be used as it is or with entries of one's own after it.

    ``only=preset("lm")``, or ``only={**preset("lm"), "layers.0.*": "int8", "*.down_proj.*": None}``: as in any
    ``only``, the last entry that matches a parameter wins, and what none matches has ``fmt``.

    Args:
        name: ``"lm"``: every weight that a product meets, but no embedding, output head or router, which language
            models are most sensitive in. The head is what ``get_output_embeddings()`` returns, what a module such as
            ``lm_head``, ``score`` or ``classifier`` holds, and a last linear layer as wide as the vocabulary; routers
            are named so, or ``gate`` and have fewer rows than columns.
            ``"linear"``: weights of `nn.Linear` (and of transformers' ``Conv1D``) alone; one tied to an embedding stays
            out, and no convolution or stacked expert is in.
            ``"all"``: every parameter of two or more dimensions: also embeddings, tied heads, position tables, and
            whatever else the default leaves out for the op that meets it.

    Raises:
        ValueError: the name is unknown.
    """
    presets: dict[str, dict[Any, EllipsisType | None]] = {
        "lm": {OUTPUT_HEAD: None, ROUTERS: None},
        "linear": {"*": None, LINEAR: ...},
        "all": {EVERYTHING: ...},
    }
    if not isinstance(name, str) or name not in presets:
        raise ValueError(f"preset={name!r}: expected one of {', '.join(presets)}{near(name, presets)}")
    return presets[name]


def _parts(place: Place) -> set[str]:
    """The names of the modules that a parameter lies in."""
    return {part for name in place.names for part in name.split(".")[:-1]}


def _heads(model: nn.Module) -> Callable[[Place], bool]:
    heads = []
    with contextlib.suppress(
        AttributeError, NotImplementedError
    ):  # most models have no such method, some none to return
        heads.append(model.get_output_embeddings())  # type: ignore[operator]
    vocabulary = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=None)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    heads += [module for module in linear[-1:] if module.out_features == vocabulary]

    def is_head(place: Place) -> bool:
        owners = [owner for owner, _ in place.owners]
        if any(isinstance(owner, nn.Embedding) for owner in owners):
            return False  # a tied one is left out as an embedding, unless that is asked for
        tops = {name.partition(".")[0] for name in place.names if "." in name}
        return bool(tops.intersection(_TOP_HEADS) or _parts(place).intersection(_HEADS)) or any(
            owner is head for owner in owners for head in heads
        )

    return is_head


def _is_router(place: Place) -> bool:
    parts, shape = _parts(place), place.parameter.shape
    has_few_rows = len(shape) == 2 and shape[0] < shape[1]
    return bool(parts.intersection(_ROUTERS)) or (has_few_rows and bool(parts.intersection(_GATES)))


def _is_linear(place: Place) -> bool:
    owners = [owner for owner, _ in place.owners]
    return place.parameter.dim() == 2 and any(isinstance(o, nn.Linear) or type(o).__name__ == "Conv1D" for o in owners)


OUTPUT_HEAD = Kind("output head", _heads)
ROUTERS = Kind("routers", lambda model: _is_router)
LINEAR = Kind("linear weights", lambda model: _is_linear)
EVERYTHING = Kind("all weights", lambda model: lambda place: place.parameter.dim() >= 2, forces=True)
