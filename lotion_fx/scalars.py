"""Plain arguments: numbers, flags, losses and generators, refused in one sentence where they are none."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch


def check_number(name: str, value: Any, fits: Callable[[float], bool], expected: str) -> None:
    """Refuses what is no number, or not one that fits.

    Args:
        expected: ends the sentence.

    Raises:
        TypeError: it is no real number; ``True`` is none.
        ValueError: it does not fit.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={shown(value)}, of type {type(value).__name__}: expected {expected}")
    if not fits(float(value)):
        raise ValueError(f"{name}={value!r}: expected {expected}")


def check_count(name: str, value: Any, least: int, expected: str) -> None:
    """Likewise of a whole number; 10.0 is none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        kind = ValueError if isinstance(value, float) else TypeError
        raise kind(f"{name}={shown(value)}, of type {type(value).__name__}: expected {expected}, a whole number")
    if value < least:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)}: expected True or False, not {type(value).__name__}")


def check_loss(value: Any, *, where_returned: str) -> None:
    """Refuses what is no loss.

    Args:
        where_returned: what to pass where the model returns its loss.
    """
    told = (
        f"expected a function of (output, targets) such as F.mse_loss, or {where_returned} where the model returns it"
    )
    if isinstance(value, type):
        raise TypeError(f"loss_fn={value.__name__}: {told}; a class makes one: {value.__name__}()")
    if not callable(value):
        raise (ValueError if isinstance(value, str) else TypeError)(f"loss_fn={shown(value)}: {told}")


def check_generator(value: Any) -> None:
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"generator={shown(value)}: expected a torch.Generator or None, not {type(value).__name__}")


def shown(value: Any, width: int = 60) -> str:
    """A value on one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= width else text[: width - 3] + "..."
