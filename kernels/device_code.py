"""What a format and a noise law compute, as Triton device functions, printed from the one definition of each.

A kernel is written once, as a `template` that calls the functions below by name; `specialized` binds them to one format
and one law and gives the kernel to launch. The grid's and the scale law's functions are traced from the methods in
`lotion_fx.numerics` and printed op by op, the noise law's are printed from its SymPy expressions: a kernel holds no
number that the reference does not hold, and a user's own `Grid` runs in every kernel.

Values are float32, ``z = w / s`` in grid units, codes uint8; each function is elementwise:

    grid     clamp(z)  nearest(z)  neighbours(z) -> lo, hi  below(level)  above(level)  encode(level)  decode(code)
    scale    tensor_scale(amax)  block_scale(amax, ts)  smallest_amax(ts)  encode_scale(s)  decode_scale(code)
    noise    draw(z, lo, hi, third)  mean  mean_slopes  variance  variance_slopes          (each gives a tuple)
    numbers  Q_MAX  TWO_LEVEL  HAS_THIRD (does the law use a third level?)

``ts`` is the tensor's scale; laws with one level ignore it. The functions are bound through the kernel's globals, not
as ``tl.constexpr`` arguments, because those are what Inductor carries into the source it emits. `kernels.division` has
the quotient ``w / s``, for Triton's ``/`` does not round as IEEE division does.

No bit of a code may depend on whether the compiler contracts ``a * b + c``: what decides a code holds no such sum, but
for random roundings by laws other than the default, whose probabilities may differ in their last bits.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from lotion_fx.numerics.formats import Format
from lotion_fx.numerics.noise import RANDOMIZED, NoiseLaw
from lotion_fx.numerics.printer import TritonPrinter, define, source
from lotion_fx.private import settle_device_guard

__all__ = ["specialized", "template"]

aten = torch.ops.aten

settle_device_guard()  # `printed` traces in threads of its own


class StandIn:
    """What a template calls by name and `specialized` replaces."""

    def __call__(self, *args: Any) -> Any:
        raise TypeError("a template's device functions exist only in the kernel that `specialized` makes of it")


clamp = nearest = neighbours = below = above = encode = decode = StandIn()
tensor_scale = block_scale = smallest_amax = encode_scale = decode_scale = StandIn()
draw = mean = mean_slopes = variance = variance_slopes = StandIn()
Q_MAX: Any = StandIn()
TWO_LEVEL: Any = StandIn()
HAS_THIRD: Any = StandIn()


class Template:
    """A kernel, or a device function, that knows no format yet."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.__name__ = fn.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{self.__name__} is a template: specialized({self.__name__}, fmt, law) is the kernel")


def template(fn: Callable[..., Any]) -> Template:
    """Marks a Triton function that calls the functions of this module, or other templates, by name."""
    return Template(fn)


@cache
def specialized(kernel: Template, fmt: Format, law: NoiseLaw = RANDOMIZED) -> Any:
    """The template as a ``triton.jit`` function in which every function of this module is this format's and this law's.

    Args:
        kernel: made by `template`.
        fmt: the format.
        law: the noise law.
    """
    bound = dict(kernel.fn.__globals__)
    for name in kernel.fn.__code__.co_names:
        value = bound.get(name)
        if isinstance(value, StandIn):
            bound[name] = device_function(name, fmt, law)
        elif isinstance(value, Template):
            bound[name] = specialized(value, fmt, law)
    own = types.FunctionType(kernel.fn.__code__, bound, kernel.fn.__name__, kernel.fn.__defaults__)
    own.__annotations__ = kernel.fn.__annotations__
    own.__module__, own.__qualname__ = kernel.fn.__module__, kernel.fn.__qualname__
    return triton.jit(own)


@cache
def device_function(name: str, fmt: Format, law: NoiseLaw = RANDOMIZED) -> Any:
    """One of the functions or numbers in this module's docstring, for one format and one law."""
    if name in law.expressions:
        return _jitted(name, source(name, law.expressions[name], TritonPrinter()))
    if name in _NUMBERS:
        return tl.constexpr(_NUMBERS[name](fmt, law))
    reference, arity = _references(fmt)[name]
    return _jitted(name, printed(name, reference, arity))


_NUMBERS: dict[str, Callable[[Format, NoiseLaw], Any]] = {
    "Q_MAX": lambda fmt, law: fmt.grid.max,
    "TWO_LEVEL": lambda fmt, law: fmt.law.two_level,
    "HAS_THIRD": lambda fmt, law: law.beyond is not None,
}


def _references(fmt: Format) -> dict[str, tuple[Callable[..., Any], tuple[torch.dtype, ...]]]:
    """Each function's definition in `lotion_fx.numerics` and the dtypes of its arguments."""
    grid, law, real, code = fmt.grid, fmt.law, torch.float32, torch.uint8
    stored = getattr(law, "type", None)  # of a block's scale; None where that is float32
    return {
        "clamp": (grid.clamp, (real,)),
        "nearest": (grid.nearest, (real,)),
        "neighbours": (grid.neighbours, (real,)),
        "below": (grid.below, (real,)),
        "above": (grid.above, (real,)),
        "encode": (grid.encode, (real,)),
        "decode": (grid.decode, (code,)),
        "tensor_scale": (lambda amax: law.tensor_scale(amax, grid), (real,)),
        "block_scale": (lambda amax, ts: law.block_scale(amax, grid, ts), (real, real)),
        "smallest_amax": (lambda ts: law.smallest_amax(grid, ts), (real,)),
        "encode_scale": (stored.encode if stored else lambda scale: scale + 0.0, (real,)),
        "decode_scale": (stored.decode if stored else lambda scale: scale + 0.0, (code if stored else real,)),
    }


def _jitted(name: str, text: str) -> Any:
    return triton.jit(define(name, text, {"tl": tl, "libdevice": tl.extra.libdevice, "__name__": __name__}))


# ------------------------------------------------------------------------------------------------------------ printing


def printed(name: str, function: Callable[..., Any], dtypes: tuple[torch.dtype, ...]) -> str:
    """The source of a Triton device function that computes what an elementwise function of tensors computes.

    Args:
        name: of the device function.
        function: made of plain ATen operations; returns a tensor, a number, or a tuple of tensors.
        dtypes: of its arguments.

    Raises:
        NotImplementedError: it uses an operation that has no entry here.
    """
    # A kernel may be wanted in the middle of a trace. Dispatch modes belong to a thread: in another none is active.
    with ThreadPoolExecutor(1) as alone:
        graph = alone.submit(_traced, function, dtypes).result()
    arguments = [f"a{i}" for i in range(len(dtypes))]
    names = dict(zip(graph.find_nodes(op="placeholder"), arguments, strict=True))
    lines: list[str] = []
    for node in graph.nodes:
        if node.op == "call_function":
            text = _expression(name, node, names)
            if _is_literal(node) or text in names.values():
                names[node] = text
            else:
                names[node] = f"x{len(lines)}"
                lines.append(f"{names[node]} = {text}")
        elif node.op == "output":
            result = node.args[0]
            results = result if isinstance(result, (tuple, list)) else [result]
            lines.append(f"return {', '.join(_operand(x, names) for x in results)}")
    return f"def {name}({', '.join(arguments)}):\n" + "".join(f"    {line}\n" for line in lines)


def _traced(function: Callable[..., Any], dtypes: tuple[torch.dtype, ...]) -> fx.Graph:
    # A bound method has one argument more than tracing expects.
    graph = make_fx(lambda *args: function(*args))(*(torch.ones(2, dtype=dtype) for dtype in dtypes)).graph
    graph.eliminate_dead_code()
    return graph


def _operand(x: Any, names: dict[fx.Node, str]) -> str:
    return names[x] if isinstance(x, fx.Node) else _literal(x)


def _literal(x: Any) -> str:
    return f"float('{x}')" if isinstance(x, float) and not math.isfinite(x) else repr(x)


def _is_literal(x: Any) -> bool:
    """Whether this is a tensor of one constant, which is printed as the number."""
    literals = (aten.full_like.default, aten.zeros_like.default, aten.scalar_tensor.default)
    return isinstance(x, fx.Node) and x.target in literals


def _triton_type(dtype: torch.dtype) -> str:
    return "tl." + {"bool": "int1"}.get(text := str(dtype).removeprefix("torch."), text)


# Both operands are taken to the result's dtype first, as ATen does.
_ARITHMETIC = {
    aten.add: "{} + {}",
    aten.sub: "{} - {}",
    aten.mul: "{} * {}",
    aten.maximum: "tl.maximum({}, {})",
    aten.minimum: "tl.minimum({}, {})",
    aten.bitwise_and: "{} & {}",
    aten.bitwise_or: "{} | {}",
    aten.__and__: "{} & {}",
    aten.__or__: "{} | {}",
    aten.__lshift__: "{} << {}",
    aten.__rshift__: "{} >> {}",
}
_COMPARISONS = {aten.ge: ">=", aten.gt: ">", aten.le: "<=", aten.lt: "<", aten.eq: "==", aten.ne: "!="}
_UNARY = {
    aten.abs: "tl.abs({})",
    aten.floor: "tl.floor({})",
    aten.ceil: "tl.ceil({})",
    aten.round: "libdevice.rint({})",  # half to even
    aten.neg: "-{}",
    aten.alias: "{}",
    aten.detach: "{}",
    aten.clone: "{}",
}


def _expression(name: str, node: fx.Node, names: dict[fx.Node, str]) -> str:
    """One ATen operation as a Triton expression."""
    op = node.target.overloadpacket  # type: ignore[union-attr]
    out = node.meta["val"].dtype
    args = [_operand(x, names) for x in node.args]
    if op in _UNARY:
        return _UNARY[op].format(args[0])
    if op in _ARITHMETIC:
        return _ARITHMETIC[op].format(*(_as(x, out, names) for x in node.args[:2]))
    if op in _COMPARISONS:
        return f"{args[0]} {_COMPARISONS[op]} {args[1]}"
    if op is aten.rsub:
        return f"{_as(node.args[1], out, names)} - {_as(node.args[0], out, names)}"
    if op is aten.div:
        return _quotient(node, names)
    if op in (aten.clamp, aten.clamp_min, aten.clamp_max):
        return _clamp(op, node, args)
    if op is aten.where:
        return f"tl.where({args[0]}, {_as(node.args[1], out, names)}, {_as(node.args[2], out, names)})"
    if op is aten.view:  # of a dtype: the same bits
        return f"{args[0]}.to({_triton_type(out)}, bitcast=True)"
    if op is aten._to_copy:
        return f"{args[0]}.to({_triton_type(out)})"
    if op in (aten.full_like, aten.scalar_tensor):
        return _literal(node.args[-1])
    if op is aten.zeros_like:
        return "0.0" if out.is_floating_point else "0"
    raise NotImplementedError(
        f"{name}: {node.target} cannot be printed to Triton; expected elementwise operations among "
        f"{', '.join(sorted(str(known) for known in (*_UNARY, *_ARITHMETIC, *_COMPARISONS)))}, "
        "div, clamp, where, view(dtype), to(dtype), full_like"
    )


def _as(x: Any, dtype: torch.dtype, names: dict[fx.Node, str]) -> str:
    text = _operand(x, names)
    converts = isinstance(x, fx.Node) and x.meta["val"].dtype != dtype and not _is_literal(x)
    return f"{text}.to({_triton_type(dtype)})" if converts else text


def _quotient(node: fx.Node, names: dict[fx.Node, str]) -> str:
    """IEEE division, which Triton's ``/`` is not; by a power of two the equal product."""
    numerator, divisor = node.args[:2]
    literal = divisor.args[-1] if _is_literal(divisor) else divisor  # type: ignore[union-attr]
    text = _as(numerator, node.meta["val"].dtype, names)
    if isinstance(literal, (int, float)) and _is_power_of_two(literal):
        return f"{text} * {1 / literal!r}"
    return f"tl.div_rn({text}, {_operand(divisor, names)})"


def _is_power_of_two(x: float) -> bool:
    return abs(math.frexp(x)[0]) == 0.5 and 2.0**-126 <= abs(x) <= 2.0**126


def _clamp(op: Any, node: fx.Node, args: list[str]) -> str:
    low, high = (*node.args[1:], None, None)[:2] if op is not aten.clamp_max else (None, node.args[1])
    text = args[0]
    nan = "propagate_nan=tl.PropagateNan.ALL"  # as ATen does: what has diverged must not look finite
    if low is not None:
        text = f"tl.maximum({text}, {args[1]}, {nan})"
    if high is not None:
        text = f"tl.minimum({text}, {args[1] if op is aten.clamp_max else args[2]}, {nan})"
    return text


def reference(name: str, fmt: Format) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """What a grid's or a scale law's device function is printed from."""
    return _references(fmt)[name][0]
