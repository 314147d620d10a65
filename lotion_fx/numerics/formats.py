"""Number formats, each defined once: a grid of levels, a block, and a scale law.

A weight block ``w_B`` is stored as one scale ``s`` and one code per weight. In *grid units* ``z = w / s``; the grid
says which levels surround ``z``, which one is nearest and which bits encode it. Everything else in the package
(training forward, variance, packing, kernels) derives from the objects here and repeats none of their numbers.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lotion_fx.numerics.grids import Codebook, Grid, Integer, Minifloat
from lotion_fx.numerics.scales import Float32Scale, HalfScale, PowerOfTwoScale, ScaleLaw, TwoLevelScale

__all__ = ["Format", "codebook", "formats", "register_format", "registered", "resolve"]

Block = int | Literal["tensor", "channel"]


@dataclass(frozen=True)
class Format:
    """A number format for weights: which levels, how many weights share a scale, and how the scale is found.

    Args:
        name: what `resolve` calls it.
        grid: the levels.
        block: weights per scale along the contraction axis; "channel" for that whole axis, "tensor" for all weights.
        law: the scale law.

    Raises:
        ValueError: ``block`` is not a positive integer, "tensor" or "channel"; or the law needs another grid.
    """

    name: str
    grid: Grid
    block: Block
    law: ScaleLaw = Float32Scale()  # noqa: RUF009  frozen, as are all laws

    def __post_init__(self) -> None:
        whole = isinstance(self.block, int) and not isinstance(self.block, bool) and self.block >= 1
        if not whole and self.block not in ("tensor", "channel"):
            raise ValueError(f"block={self.block!r}: expected a positive integer, 'tensor' or 'channel'")
        if self.law == PowerOfTwoScale("even") and not isinstance(self.grid, Minifloat):
            raise ValueError(f"law={self.law!r}: the rule 'even' rounds to a mantissa, which {self.grid!r} has not")

    @property
    def saturates(self) -> bool:
        """Whether a scale can be less than a block needs, so that its largest weights lie past the last level."""
        return self.law.saturates(self.grid)

    @property
    def bits_per_weight(self) -> float:
        """Bits of a code plus a weight's share of its block's scale.

        A scale shared by a whole channel or tensor is left out: its share depends on the shape and is far below a bit.
        """
        return self.grid.bits + (self.law.bits / self.block if isinstance(self.block, int) else 0.0)


def codebook(levels: Sequence[float], block: Block = 32, name: str = "codebook") -> Format:
    """A format with the user's own levels and a float32 scale ``amax / max|level|`` per block.

    Args:
        levels: 2 to 256 finite numbers, ascending, distinct, 0 among them.
        block: weights per scale, "channel" or "tensor".
        name: the format's name.

    Raises:
        ValueError: the levels or the block are not as above.
        TypeError: the levels are no numbers.
    """
    try:
        numbers: tuple[float, ...] | None = tuple(float(level) for level in levels)
    except (TypeError, ValueError):
        numbers = None
    if numbers is None or isinstance(levels, (str, bytes)):
        raise TypeError(f"levels={levels!r}: expected 2 to 256 numbers, such as [-1, 0, 1]")
    return Format(name, Codebook(numbers), block)


_E2M1 = Minifloat(2, 1, 6.0)
_E2M3 = Minifloat(2, 3, 7.5)
_E3M2 = Minifloat(3, 2, 28.0)
_E4M3 = Minifloat(4, 3, 448.0)
_E5M2 = Minifloat(5, 2, 57344.0)

# 4-bit NormalFloat: quantiles of the standard normal, eight on each side of 0. Listed because the levels in use are
# the float32 roundings of one particular computation. Source: QLoRA, Dettmers et al. 2023, appendix E.
_NF4 = Codebook(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)

_GROUP = 32  # weights per scale of a format whose name says nothing else
_MX_BLOCK = 32  # fixed by the MX specification
_NVFP4_BLOCK = 16  # fixed by the hardware


def _builtin() -> dict[str, Format]:
    table = [Format(f"int{b}", Integer(2 ** (b - 1) - 1), "channel" if b == 8 else _GROUP) for b in range(2, 9)]
    table += [Format("fp4", _E2M1, _GROUP), Format("fp8", _E4M3, "channel"), Format("nf4", _NF4, _GROUP)]
    table += [Format("nvfp4", _E2M1, _NVFP4_BLOCK, TwoLevelScale(_E4M3))]
    mx = {"mxfp4": _E2M1, "mxfp6_e2m3": _E2M3, "mxfp6_e3m2": _E3M2, "mxfp8_e4m3": _E4M3, "mxfp8_e5m2": _E5M2}
    table += [Format(name, grid, _MX_BLOCK, PowerOfTwoScale()) for name, grid in mx.items()]
    return {fmt.name: fmt for fmt in table}


_BUILTIN = _builtin()
_ALIASES = {"mxfp6": "mxfp6_e2m3", "mxfp8": "mxfp8_e4m3"}
_REGISTERED: dict[str, Format] = {}


def formats() -> tuple[str, ...]:
    """The names `resolve` knows: built in, their aliases, and registered ones, sorted."""
    return tuple(sorted({*_BUILTIN, *_ALIASES, *_REGISTERED}))


def register_format(name: str, format: Format) -> Format:
    """Make ``format`` available as ``name`` wherever a format is named.

    A name keeps its meaning: compiled graphs and their caches hold formats by name.

    Args:
        name: an identifier-like name; not a built-in one.
        format: what the name stands for.

    Returns:
        The format under its new name.

    Raises:
        ValueError: the name is taken by a built-in or by another format, empty, or holds '/' (which separates options)
            or spaces.
        TypeError: ``format`` is not a `Format`.
    """
    if not isinstance(name, str) or not name or "/" in name or name.split() != [name]:
        raise ValueError(f"name={name!r}: expected a non-empty string without '/' and spaces")
    if name in _BUILTIN or name in _ALIASES:
        raise ValueError(f"name={name!r}: a built-in format has this name; choose another")
    if not isinstance(format, Format):
        raise TypeError(f"format={format!r}: expected a Format, such as codebook(levels) returns")
    named = replace(format, name=name)
    known = _REGISTERED.setdefault(name, named)
    if known != named:
        raise ValueError(f"name={name!r}: another format was registered under this name; choose another")
    return known


def registered() -> tuple[Format, ...]:
    """The formats that `register_format` added, in order of their names."""
    return tuple(_REGISTERED[name] for name in sorted(_REGISTERED))


def resolve(fmt: str | Format) -> Format:
    """The format that ``fmt`` names; a `Format` is returned as it is.

    A name is one of `formats()`, optionally with options after slashes:

    * ``/tensor``, ``/channel`` or ``/128``: the block of a format without fixed blocks; and then, or alone,
    * ``/bf16`` or ``/fp16``: that format's scales are numbers of that type, rounded up (``int4/32/bf16``);
    * ``/ceil``, ``/floor`` or ``/even``: the scale rule of an MX format;
    * ``/pow2``: the tensor scale of nvfp4 is a power of two, and every weight a bfloat16 number.

    An option that is the format's own default (``/fp32`` for scales among them) gives the plain format.

    Raises:
        ValueError: the name or the option is unknown, or the format fixes what the option would set.
        TypeError: ``fmt`` is neither a string nor a `Format`.
    """
    if isinstance(fmt, Format):
        return fmt
    if not isinstance(fmt, str):
        raise TypeError(f"fmt={fmt!r}: expected a format name (a string) or a Format")
    name, slash, option = fmt.partition("/")
    base = _REGISTERED.get(name) or _BUILTIN.get(_ALIASES.get(name, name))
    if base is None:
        near = difflib.get_close_matches(name.lower(), formats(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"fmt={fmt!r}: unknown format; {hint}Known: {', '.join(formats())}")
    return _with_option(base, fmt, option) if slash else base


def _with_option(base: Format, fmt: str, option: str) -> Format:
    law = base.law
    if isinstance(law, PowerOfTwoScale):
        if option not in law.rules:
            raise ValueError(
                f"fmt={fmt!r}: {base.name} has blocks of {base.block} and takes a scale rule, "
                f"one of {', '.join('/' + rule for rule in law.rules)}"
            )
        changed = replace(base, law=replace(law, rule=option))  # type: ignore[arg-type]
    elif isinstance(law, TwoLevelScale):
        if option not in law.tensors:
            raise ValueError(
                f"fmt={fmt!r}: {base.name} has blocks of {base.block} and takes the type of its tensor scale, "
                f"one of {', '.join('/' + tensor for tensor in law.tensors)}"
            )
        changed = replace(base, law=replace(law, tensor=option))  # type: ignore[arg-type]
    elif isinstance(law, (Float32Scale, HalfScale)):
        return _with_block_and_scale(base, fmt, option.split("/"))
    else:
        raise ValueError(f"fmt={fmt!r}: {base.name} has blocks of {base.block} and takes no option")
    return base if changed == base else replace(changed, name=f"{base.name}/{option}")


def _with_block_and_scale(base: Format, fmt: str, options: list[str]) -> Format:
    *before, last = options
    scale = [last] if last in _SCALES else []
    blocks = before if scale else options
    if len(blocks) > 1 or not all(_is_block(option) for option in blocks):
        raise ValueError(
            f"fmt={fmt!r}: expected after {base.name} a block (/tensor, /channel or a size such as /128), a type of "
            f"its scales ({', '.join('/' + name for name in _SCALES)}), or both in this order"
        )
    name, changed = base.name, base
    for option in (*blocks, *scale):
        if option in _SCALES:
            other = replace(changed, law=_SCALES[option])
        else:
            other = replace(changed, block=int(option) if option.isdecimal() else option)  # type: ignore[arg-type]
        if other != changed:
            name, changed = f"{name}/{int(option) if option.isdecimal() else option}", other
    return replace(changed, name=name)


_SCALES: dict[str, ScaleLaw] = {"fp32": Float32Scale(), **{name: HalfScale(name) for name in HalfScale.names}}  # type: ignore[arg-type]


def _is_block(option: str) -> bool:
    return option in ("tensor", "channel") or (option.isascii() and option.isdecimal() and int(option) > 0)
