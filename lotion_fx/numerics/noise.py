"""Noise laws: how a weight between two levels is randomly rounded, as SymPy data.

A law is the probability of the upper level as a function of the fractional position ``D = (z - lo) / (hi - lo)``, and
perhaps that of a third level. With ``q`` the random level and ``w = s z``, what training needs follows from it,

    mean      M(w, s) = s E q              dM/dw = m'(z)         dM/ds = m - z m'
    variance  V(w, s) = s^2 Var q          dV/dw = s v'(z)       dV/ds = s (2 v - z v')

derived here once and printed to PyTorch (`NoiseLaw.torch`) and to Triton (`lotion_fx.kernels.device_code`) from the
same expressions. Everything is in grid units; the powers of ``s`` are left to the caller.

Source: LOTION, Kwun et al. 2025, arXiv 2510.08757, for randomized rounding; docs/noise.md for what any law can do.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import sympy
import torch

from lotion_fx.numerics.printer import D, gap, hi, lo, reach, torch_function, z

__all__ = ["D", "NoiseLaw", "gaussian", "noises", "register_noise", "resolve_noise"]


@dataclass(frozen=True)
class NoiseLaw:
    """A way of rounding at random onto the neighbouring levels.

    Args:
        name: what `resolve_noise` calls it.
        up: the probability of the upper level, an expression in `D`: 0 at 0, 1 at 1, in [0, 1] between.
        beyond: the probability, in `D`, of the level beyond the nearer neighbour, below ``lo`` for ``D < 1/2`` and
            above ``hi`` from there on; 0 at 0, 1/2 and 1. At the end of the grid it goes to the end level itself. The
            lower level has what is left, ``1 - up - beyond``.
        spread: where given, the variance over ``gap^2``, a number, in the place of what follows from the probabilities
            (which are then ``up=D``): of an error that the law stands for, and that is not drawn at random.

    Attributes:
        rounds: whether the variance is that of the random rounding.
        unbiased: whether the mean is the weight itself.
        expressions: for each printed function its outputs, in the symbols of `printer`:
            ``draw``: ``gap`` times the probabilities of ``hi`` and of the third level; ``mean``; ``mean_slopes``: by w,
            and by s; ``variance``; ``variance_slopes``: by w over s, and by s over s.
        torch: the same printed to PyTorch, functions of tensors ``(z, lo, hi, third)``.

    Raises:
        ValueError: the law is unsuitable: what is wrong with it, and where.
    """

    name: str
    up: sympy.Expr
    beyond: sympy.Expr | None = None
    spread: sympy.Expr | None = None
    unbiased: bool = field(init=False, repr=False, compare=False)
    expressions: Mapping[str, tuple[sympy.Expr, ...]] = field(init=False, repr=False, compare=False)
    torch: Mapping[str, Callable[..., tuple[Any, ...]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        up, beyond = _exact("up", self.up), _exact("beyond", self.beyond or 0)
        spread = None if self.spread is None else _exact("spread", self.spread)
        _check(self.name, up, beyond, spread)
        expressions = _derive(up, beyond, spread)
        object.__setattr__(self, "up", up)
        object.__setattr__(self, "beyond", beyond or None)
        object.__setattr__(self, "spread", spread)
        object.__setattr__(self, "unbiased", expressions["mean"] == (z,))
        object.__setattr__(self, "expressions", expressions)
        object.__setattr__(self, "torch", {name: torch_function(name, e) for name, e in expressions.items()})

    @property
    def rounds(self) -> bool:
        return self.spread is None


def _derive(up: sympy.Expr, beyond: sympy.Expr, given: sympy.Expr | None) -> dict[str, tuple[sympy.Expr, ...]]:
    """What is printed of a law. Inside an interval ``d/dz = (1 / gap) d/dD``, and ``third = lo + gap reach``.

    For any levels ``Var q = (m - lo)(hi - m) + E (q - lo)(q - hi)``, whose last part only a third level has.
    """
    step = _factored(up + reach * beyond)  # (m - lo) / gap
    rest = _factored(1 - up - reach * beyond)  # (hi - m) / gap
    slope = _factored(sympy.diff(step, D))
    aside = beyond * reach * (reach - 1)
    spread = step * rest + aside if given is None else given  # v / gap^2
    spread_slope = _factored(sympy.diff(spread, D))
    variance = _closed(gap * step) * _closed(gap * rest) + gap**2 * aside if given is None else gap**2 * given
    if variance.has(D):  # step may round to just above 1
        variance = sympy.Max(0, variance)
    return {
        "draw": (_closed(gap * up), gap * beyond),
        "mean": (_closed(lo + gap * step),),
        "mean_slopes": (slope, _closed(lo + gap * step - z * slope)),
        "variance": (variance,),
        "variance_slopes": (_closed(gap * spread_slope), _closed(2 * gap**2 * spread - z * gap * spread_slope)),
    }


def _factored(expr: sympy.Expr) -> sympy.Expr:
    """A polynomial in D as a product, which takes no difference of near numbers at its roots, the levels."""
    return sympy.factor(expr) if expr.is_rational_function(D) else expr


def _closed(expr: sympy.Expr) -> sympy.Expr:
    """The expression in the levels alone if that leaves no denominator, as it does for randomized rounding."""
    if not expr.is_rational_function(D):
        return expr
    in_levels = sympy.cancel(expr.subs({D: (z - lo) / (hi - lo), gap: hi - lo}))
    return sympy.collect(in_levels, z) if in_levels.is_polynomial(z, lo, hi) else expr


# ------------------------------------------------------------------------------------------------------------ refusals

_ROUNDING = 1e-9  # by how much a probability computed in float64 may miss its range


def _exact(part: str, expr: Any) -> sympy.Expr:
    """The expression with its floats as the fractions that they were written as."""
    try:
        found = sympy.nsimplify(sympy.sympify(expr), rational=True)
    except (sympy.SympifyError, TypeError, AttributeError):
        found = None
    if not isinstance(found, sympy.Expr):
        raise TypeError(f"{part}={expr!r}: expected a SymPy expression in lotion_fx.noise.D")
    return found


def _check(name: str, up: sympy.Expr, beyond: sympy.Expr, spread: sympy.Expr | None) -> None:
    """Refuses what is no probability, or does not keep the minima of the quantized loss."""
    if spread is not None and not (spread.is_number and spread.is_nonnegative and up == D and not beyond):
        raise ValueError(
            f"spread={spread} of noise {name!r}: expected a number of 0 or more, of a law with up=D and no third level"
        )
    for part, expr in (("up", up), ("beyond", beyond)):
        if strangers := sorted(map(str, expr.free_symbols - {D})):
            raise ValueError(
                f"{part}={expr} of noise {name!r}: free symbols {', '.join(strangers)}; expected lotion_fx.noise.D only"
            )
    half = sympy.Rational(1, 2)
    for part, expr, at, expected in (
        ("up", up, sympy.Integer(0), 0),
        ("up", up, sympy.Integer(1), 1),
        *(("beyond", beyond, at, 0) for at in (sympy.Integer(0), half, sympy.Integer(1))),
    ):
        found = complex(expr.subs(D, at).evalf(30)) if expr.subs(D, at).is_number else complex("nan")
        if not abs(found - expected) <= _ROUNDING:
            why = "a weight at a level must stay there" if at != half else "its level changes sides there"
            found_text = "undefined" if found != found else f"{found if found.imag else found.real:.6g}"
            raise ValueError(f"{part}={expr} of noise {name!r}: is {found_text} at D={at}, expected {expected}; {why}")
    outputs = (up, beyond, up + beyond, sympy.diff(up, D), sympy.diff(beyond, D))
    try:
        evaluate = torch_function("odds", outputs)
    except ValueError as error:
        raise ValueError(f"noise {name!r}: {error}") from None
    at = torch.linspace(0, 1, 2**12 + 1, dtype=torch.float64)
    values = evaluate(at, torch.zeros_like(at), torch.ones_like(at), torch.zeros_like(at))
    for part, expr, value in zip(("up", "beyond", "up + beyond"), outputs, values, strict=False):
        _check_values(f"{part}={expr} of noise {name!r}", at, torch.as_tensor(value).expand_as(at))
    for part, value in zip(("up", "beyond"), values[3:], strict=True):
        value = torch.as_tensor(value, dtype=at.dtype).expand_as(at)
        if not bool(value.isfinite().all()):
            where = float(at[~value.isfinite()][0])
            raise ValueError(f"{part} of noise {name!r}: its slope is not finite at D={where:.4g}; gradients need one")


def _check_values(what: str, at: torch.Tensor, value: torch.Tensor) -> None:
    if not bool(value.isfinite().all()):
        raise ValueError(f"{what}: is not finite, or not real, at D={float(at[~value.isfinite()][0]):.4g}")
    outside = torch.maximum(-value, value - 1)
    worst = int(outside.argmax())
    if outside[worst] > _ROUNDING:
        raise ValueError(
            f"{what}: is {float(value[worst]):.6g} at D={float(at[worst]):.4g}, expected a probability, in [0, 1]"
        )


# -------------------------------------------------------------------------------------------------------- the shipped


@cache
def gaussian(tau: float = 0.2) -> NoiseLaw:
    """Rounding to nearest smoothed by a gaussian, whose support still is the grid.

    ``P(hi)`` is the distribution function, at D, of a normal with mean 1/2 and deviation ``tau`` that is cut to [0, 1].
    It tends to randomized rounding as ``tau`` grows and to rounding to nearest as it vanishes. Not unbiased, and its
    slopes at the levels are small, not 0.

    Args:
        tau: the deviation, in distances between levels, from 0.02 up.
    """
    if not 0.02 <= tau < float("inf"):
        raise ValueError(f"tau={tau!r}: expected a finite number of 0.02 or more, in distances between levels")
    width = 2 * sympy.sqrt(2) * sympy.Rational(repr(float(tau)))
    up = (1 + sympy.erf((2 * D - 1) / width) / sympy.erf(1 / width)) / 2
    return NoiseLaw("gaussian" if tau == 0.2 else f"gaussian/{float(tau)!r}", up)


RANDOMIZED = NoiseLaw("randomized", D)
SMOOTHSTEP = NoiseLaw("smoothstep", D**2 * (3 - 2 * D))
ADAPTIVE = NoiseLaw("adaptive", D, spread=sympy.Rational(1, 6))
"""For weights that are rounded adaptively in the end. Where an element ends is then decided by the errors that others
hand on to it, and not by where it lies between two levels: the variance of randomized rounding, averaged over that."""
_BUILTIN = {law.name: law for law in (RANDOMIZED, SMOOTHSTEP, gaussian(), ADAPTIVE)}
_REGISTERED: dict[str, NoiseLaw] = {}


def noises() -> tuple[str, ...]:
    """The names `resolve_noise` knows, built in and registered, sorted."""
    return tuple(sorted({*_BUILTIN, *_REGISTERED}))


def register_noise(name: str, up: sympy.Expr, beyond: sympy.Expr | None = None) -> NoiseLaw:
    """Makes a law of your own available as ``name`` wherever a noise is named.

    A name keeps its meaning: compiled graphs and their caches hold laws by name.

    Args:
        name: an identifier-like name; not a built-in one.
        up, beyond: see `NoiseLaw`.

    Returns:
        The law.

    Raises:
        TypeError: ``up`` or ``beyond`` is no SymPy expression.
        ValueError: the name is taken by a built-in or by another law, empty, or holds '/' or spaces; or the law is
            unsuitable, with the reason.
    """
    return _registered(NoiseLaw(name, up, beyond))


def _registered(law: NoiseLaw) -> NoiseLaw:
    """A law under its own name, as `register_noise`."""
    name = law.name
    if not isinstance(name, str) or not name or "/" in name or name.split() != [name]:
        raise ValueError(f"name={name!r}: expected a non-empty string without '/' and spaces")
    if name in _BUILTIN:
        raise ValueError(f"name={name!r}: a built-in noise has this name; choose another")
    known = _REGISTERED.setdefault(name, law)
    if known != law:
        raise ValueError(f"name={name!r}: another noise was registered under this name; choose another")
    return known


def registered_noises() -> tuple[NoiseLaw, ...]:
    """The laws that `register_noise` added, in order of their names."""
    return tuple(_REGISTERED[name] for name in sorted(_REGISTERED))


def resolve_noise(noise: str | NoiseLaw) -> NoiseLaw:
    """The law that ``noise`` names, which its own name will name again; an unknown `NoiseLaw` is registered.

    A name is one of `noises()`, or ``gaussian/0.3`` for another deviation.

    Raises:
        TypeError, ValueError: ``noise`` is neither a string nor a `NoiseLaw`; the name is unknown or taken.
    """
    if isinstance(noise, NoiseLaw):
        name, _, option = noise.name.partition("/")
        known = gaussian(float(option)) if name == "gaussian" and option else _BUILTIN.get(name)
        return known if known == noise else _registered(noise)
    if not isinstance(noise, str):
        raise TypeError(f"noise={noise!r}: expected the name of a noise (a string) or a NoiseLaw")
    name, slash, option = noise.partition("/")
    if name == "gaussian" and slash:
        try:
            return gaussian(float(option))
        except ValueError:
            raise ValueError(f"noise={noise!r}: expected a deviation of 0.02 or more after gaussian/") from None
    found = _REGISTERED.get(noise) or _BUILTIN.get(noise)
    if found is None:
        near = difflib.get_close_matches(noise.lower(), noises(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"noise={noise!r}: unknown noise; {hint}Known: {', '.join(noises())}")
    return found
