"""Triton's interpreter, corrected: what a kernel computes on a GPU, computed here on CPU tensors.

Importing this module in a process with ``TRITON_INTERPRET=1`` replaces the pieces of ``triton.runtime.interpreter``
that answer otherwise than a compiled kernel; elsewhere it changes nothing. Each replacement names its defect and the
versions that have it, of 3.8.0 and 3.9.0. What remains different on a GPU:

- ``a * b + c`` may be contracted to one rounding there and never is here; write ``tl.fma`` where a code depends on it;
- ``/``, ``exp``, ``rsqrt`` and the like are approximations there and correctly rounded or nearly so here; write
  ``tl.div_rn`` where a code depends on a quotient;
- ``tl.dot`` of float32 rounds its operands to tf32 there, unless ``input_precision="ieee"``, and never does here;
- sums are in another order.

Triton's private interfaces are touched here and nowhere else in the tests.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter

from tests.harness import inline_asm
from tests.harness.inline_asm import register_asm

__all__ = ["Traffic", "counted_traffic", "register_asm"]

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder
Method = Callable[..., Any]


@dataclass(frozen=True)
class Replacement:
    """One corrected piece.

    Args:
        owner: the class or module that has it.
        name: its attribute.
        parameters: the names of its arguments in the versions this was written for.
        new: what takes its place; its first argument is the original.
        defect: what it does wrong, and in which versions.
        since: the first version of Triton that has it; in an older one the new is all there is.
    """

    owner: Any
    name: str
    parameters: tuple[str, ...]
    new: Method
    defect: str
    since: str = "3.6"


REPLACEMENTS: list[Replacement] = []


def _replaces(owner: Any, name: str, parameters: str, defect: str, since: str = "3.6") -> Callable[[Method], Method]:
    def register(new: Method) -> Method:
        REPLACEMENTS.append(Replacement(owner, name, tuple(parameters.split()), new, defect, since))
        return new

    return register


# --- Floats that NumPy lacks, kept as bits in unsigned integers ---

NARROW = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}


def _values(handle: Any) -> np.ndarray:
    """A handle's numbers, those of a narrow float as float32, exactly."""
    dtype = handle.dtype.scalar
    if dtype not in NARROW:
        return handle.data
    return torch.from_numpy(np.ascontiguousarray(handle.data)).view(NARROW[dtype]).float().numpy()


def _bits(values: np.ndarray, dtype: Any) -> np.ndarray:
    """A narrow float's bits: nearest, ties to even, 8-bit ones saturating, as ``cvt.rn.satfinite`` gives."""
    single = np.ascontiguousarray(values, np.float32)
    if values.dtype == np.float64:  # rounded once, although by way of float32
        single = _to_odd(single, values - single)
    rounded = torch.from_numpy(single)
    if dtype in LARGEST:
        rounded = rounded.clamp(-LARGEST[dtype], LARGEST[dtype])
    return rounded.to(NARROW[dtype]).view(torch.uint16 if dtype is tl.bfloat16 else torch.uint8).numpy()


def _to_odd(rounded: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Makes a rounding to nearest one *to odd*, after which a rounding to two bits less is as if it were the only one.

    Args:
        rounded: float32 or float64.
        error: of the sign of the exact value minus ``rounded``.

    Reference: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to
    odd", IEEE Transactions on Computers 57 (2008).
    """
    even = rounded.view(f"int{8 * rounded.itemsize}") & 1 == 0
    toward = np.nextafter(rounded, np.where(error > 0, np.inf, -np.inf).astype(rounded.dtype))
    return np.where(even & (error != 0) & np.isfinite(rounded), toward, rounded)


def _handle(values: np.ndarray, dtype: Any) -> Any:
    """Values as a handle of any type."""
    return Handle(_bits(values, dtype) if dtype in NARROW else values.astype(interpreter._get_np_dtype(dtype)), dtype)


def _narrow(*dtypes: Any) -> Any:
    """The narrow float among types, or None."""
    return next((dtype.scalar for dtype in dtypes if dtype.scalar in NARROW), None)


@_replaces(
    Builder,
    "cast_impl",
    "self src dst_type",
    "float32 to bfloat16 truncates, other casts take a narrow float's bits for a number (3.8.0, 3.9.0)",
)
def _cast(original: Method, self: Any, src: Any, dst_type: Any) -> Any:
    if not _narrow(src.dtype, dst_type):
        return original(self, src, dst_type)
    return _handle(_values(src), dst_type.scalar)


@_replaces(
    Builder,
    "create_fp_to_fp",
    "self src dst_type rounding_mode",
    "to float8 rounds ties up, wraps instead of saturating and loses NaN (3.8.0, 3.9.0)",
)
def _cast_float(original: Method, self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    if not _narrow(src.dtype, dst_type) or rounding_mode == ir.ROUNDING_MODE.RTZ:
        return original(self, src, dst_type, rounding_mode)
    return _handle(_values(src), dst_type.scalar)


if not hasattr(Builder, "get_bf16"):  # bfloat16 constants do not exist (3.8.0)
    Builder.get_bf16 = lambda self, value: self.create_fp_trunc(self.get_fp32(value), tl.bfloat16)


def _arithmetic(original: Method, self: Any, *arguments: Any) -> Any:
    *handles, op = arguments
    dtype = _narrow(*(handle.dtype for handle in handles))
    if dtype is None or op is np.where:  # a choice moves bits
        return original(self, *arguments)
    out = op(*(_values(handle) for handle in handles))
    return Handle(out, tl.int1) if out.dtype == np.bool_ else _handle(out, dtype)


for _name, _parameters in (
    ("unary_op", "self arg op"),
    ("binary_op", "self lhs rhs op"),
    ("ternary_op", "self lhs rhs other op"),
):
    _replaces(Builder, _name, _parameters, "narrow floats are computed on their bits (3.8.0, 3.9.0)")(_arithmetic)


@_replaces(
    Builder,
    "create_fma",
    "self x y z",
    "rounds twice (3.8.0), bfloat16 is computed on its bits (3.8.0, 3.9.0)",
)
def _fma(original: Method, self: Any, x: Any, y: Any, z: Any) -> Any:
    if z.data.dtype == np.float64:
        if not hasattr(interpreter._interpreter, "fma_fp64"):
            raise NotImplementedError(
                f"tl.fma of float64 in the interpreter of triton {triton.__version__} rounds twice"
            )
        return original(self, x, y, z)
    return _handle(_fused(*(_values(handle) for handle in (x, y, z))), z.dtype.scalar)


def _fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """``x y + z`` of float32 or narrower as float64, so that rounding to their type gives the nearest.

    The product of two float32 is exact in float64; the error of the sum is Knuth's TwoSum.
    """
    product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = product + addend
    part = total - product
    return _to_odd(total, (product - (total - part)) + (addend - part))


# --- Matrix products ---


@_replaces(
    Builder,
    "create_dot",
    "self a b d input_precision max_num_imprecise_acc",
    "bfloat16 is multiplied as its bits, float8 loses NaN (3.8.0, 3.9.0)",
)
def _dot(original: Method, self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
    if not _narrow(a.dtype, b.dtype):
        return original(self, a, b, d, *precision)
    return _handle(np.matmul(_values(a), _values(b)) + d.data, d.dtype.scalar)


@_replaces(
    Builder,
    "create_dot_scaled",
    "self lhs lhs_scale_handle lhs_format_enum rhs rhs_scale_handle rhs_format_enum fast_math lhs_k_pack rhs_k_pack "
    "acc_handle",
    "e4m3 scales are read as e8m0, bfloat16 operands overflow (3.8.0, 3.9.0), e8m0 has no NaN and 2^-127 is 0 (3.8.0)",
    since="3.8",
)
def _dot_scaled(original: Method, self: Any, *arguments: Any) -> Any:
    lhs, lhs_scale, lhs_format, rhs, rhs_scale, rhs_format, _, lhs_k_pack, rhs_k_pack, acc = arguments
    left = _scaled(lhs, lhs_scale, lhs_format, -1, -1 if lhs_k_pack else -2)
    right = _scaled(rhs, rhs_scale, rhs_format, -2, -2 if rhs_k_pack else -1)
    return Handle(np.matmul(left, right) + acc.data, tl.float32)


def _scaled(value: Any, scale: Any, kind: Any, k: int, packed: int) -> np.ndarray:
    """An operand of a scaled product as float32, its inner dimension ``k``, e2m1 two a byte along ``packed``."""
    elements = _values(value).astype(np.float32)
    if kind == ir.ScaleDotElemTypeTY.E2M1:
        codes = np.swapaxes(value.data.view(np.uint8), packed, -1)
        pairs = inline_asm.E2M1[np.stack([codes & 15, codes >> 4], axis=-1)]
        elements = np.swapaxes(pairs.reshape(*codes.shape[:-1], -1), packed, -1)
    if scale is None:
        return elements
    scales = _values(scale) if scale.dtype.scalar in NARROW else _e8m0(scale.data)
    scales = scales if k == -1 else np.swapaxes(scales, -1, -2)  # (columns, k / group) in memory on either side
    return elements * np.repeat(scales, elements.shape[k] // scales.shape[k], axis=k)


def _e8m0(codes: np.ndarray) -> np.ndarray:
    codes = codes.view(np.uint8).astype(np.int32)
    return np.where(codes == 255, np.float32("nan"), np.ldexp(np.float32(1), codes - 127))


# --- What older versions cannot do ---


@_replaces(interpreter, "_patch_lang_tensor", "tensor scope", "NumPy 2.4 makes no number of an array of one (3.6.0)")
def _patch_lang_tensor(original: Method, tensor: Any, scope: Any) -> None:
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


def _wrap_interpreted() -> None:
    """Makes `torch.library.wrap_triton` take what Triton's interpreter runs, as torch does from 2.13 on."""
    wrap = torch.library.wrap_triton
    interpreted = interpreter.InterpretedFunction
    torch.library.wrap_triton = lambda kernel: kernel if isinstance(kernel, interpreted) else wrap(kernel)


# --- What has no emulation ---


@_replaces(
    Builder,
    "create_inline_asm",
    "self inlineAsm constraints values type isPure pack",
    "does not exist (3.8.0, 3.9.0)",
)
def _inline_asm(
    original: Method, self: Any, asm: str, constraints: str, values: list[Any], types: list[Any], pure: bool, pack: int
) -> Any:
    dtypes = [interpreter._get_np_dtype(dtype) for dtype in types]
    outputs = inline_asm.run(asm, constraints, [value.data for value in values], dtypes, pack)
    handles = [Handle(output, dtype.scalar) for output, dtype in zip(outputs, types, strict=True)]
    return SimpleNamespace(get_result=handles.__getitem__)


def _by_torch(function: Callable[..., torch.Tensor]) -> Callable[..., np.ndarray]:
    return lambda *arrays: function(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)).numpy()


def _round(x: np.ndarray) -> np.ndarray:
    """Nearest integer, ties away from zero."""
    whole = np.floor(np.abs(x))
    return np.copysign(whole + (np.abs(x) - whole >= 0.5), x)


# fmt: off
_BY_NUMPY = (
    np.rint, np.floor, np.ceil, np.trunc, np.sqrt, np.exp, np.exp2, np.expm1, np.log, np.log2, np.log10, np.log1p,
    np.sin, np.cos, np.tan, np.sinh, np.cosh, np.tanh, np.copysign, np.fmod, np.hypot, np.nextafter, np.fmin, np.fmax,
    np.ldexp, np.isnan, np.isinf, np.signbit,
)
_BY_TORCH = (
    torch.asin, torch.acos, torch.atan, torch.atan2, torch.asinh, torch.acosh, torch.atanh, torch.erf, torch.erfc,
    torch.erfinv, torch.lgamma, torch.rsqrt, torch.pow,
)
# fmt: on
LIBDEVICE: dict[str, Callable[..., Any]] = {
    **{function.__name__: function for function in _BY_NUMPY},
    **{function.__name__: _by_torch(function) for function in _BY_TORCH},
    "abs": np.abs,
    "fabs": np.abs,
    "fma": lambda x, y, z: _fused(x, y, z),
    "ilogb": lambda x: np.frexp(x)[1] - 1,
    "isinfd": np.isinf,
    "isnand": np.isnan,
    "llrint": np.rint,
    "nearbyint": np.rint,
    "round": _round,
    "fadd_rn": np.add,
    "fdiv_rn": np.divide,
    "fmul_rn": np.multiply,
    "fsqrt_rn": np.sqrt,
    "fsub_rn": np.subtract,
}
"""What a libdevice function computes, by its symbol without ``__nv_`` and the ``f`` of float32."""


@_replaces(
    Builder,
    "create_extern_elementwise",
    "self libName libPath symbol argList retType isPure",
    "does not exist (3.8.0, 3.9.0)",
)
def _extern(
    original: Method, self: Any, library: str, path: str, symbol: str, arguments: list[Any], result: Any, pure: bool
) -> Any:
    name = symbol.removeprefix("__nv_")
    if name not in LIBDEVICE and arguments[0].dtype.scalar == tl.float32:
        name = name.removesuffix("f")
    if name not in LIBDEVICE or (name == "fma" and result.scalar != tl.float32):
        raise NotImplementedError(f"libdevice function {symbol}: add it to LIBDEVICE in {__name__}")
    return _handle(np.asarray(LIBDEVICE[name](*(argument.data for argument in arguments))), result.scalar)


def _with_semantic(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, _semantic=None: function(*arguments, _semantic=interpreter.interpreter_semantic)


def _install_libdevice() -> None:
    """Calls CUDA's libdevice for the portable names, which are empty, and hands it the semantic (3.8.0, 3.9.0)."""
    for name, function in inspect.getmembers(cuda_libdevice, tl.core.is_builtin):
        for module in (cuda_libdevice, libdevice):
            setattr(module, name, _with_semantic(function))


# --- Reductions ---


@_replaces(
    interpreter.ReduceOps,
    "apply_impl",
    "self input",
    "an extremum of NaN alone warns (3.8.0, 3.9.0)",
)
def _reduce(original: Method, self: Any, input: tuple[Any, ...]) -> Any:
    extremum = {tl.standard._elementwise_max: np.fmax, tl.standard._elementwise_min: np.fmin}.get(self.combine_fn)
    if extremum is None:
        return original(self, input)
    (tensor,) = input
    return self.to_tensor(extremum.reduce(tensor.handle.data, axis=self.axis, keepdims=self.keep_dims), tensor.dtype)


@_replaces(
    interpreter.ReduceOps,
    "generic_reduce",
    "self input",
    "calls a combine function once an element, which takes seconds (3.8.0, 3.9.0)",
)
def _reduce_by_halves(original: Method, self: Any, input: tuple[Any, ...]) -> list[Any]:
    """Combines neighbours until one is left: a power of two of them, as every dimension is in Triton."""
    shape = list(input[0].handle.data.shape)
    reduced = range(len(shape)) if self.axis is None else [self.axis % len(shape)]
    rest = [size for at, size in enumerate(shape) if at not in reduced]
    arrays = [np.moveaxis(t.handle.data, reduced, range(-len(reduced), 0)).reshape(*rest, -1) for t in input]
    while arrays[0].shape[-1] > 1:
        pairs = [a[..., side::2] for side in (0, 1) for a in arrays]
        combined = self.combine_fn.fn(*map(self.to_tensor, pairs, [t.dtype for t in (*input, *input)]))
        arrays = [tensor.handle.data for tensor in (combined if isinstance(combined, tuple) else (combined,))]
    kept = [1 if at in reduced else size for at, size in enumerate(shape)] if self.keep_dims else rest
    return [self.to_tensor(a.reshape(kept), t.dtype) for a, t in zip(arrays, input, strict=True)]


# --- A launch ---


@_replaces(
    interpreter.GridExecutor,
    "__call__",
    "self args_dev kwargs",
    "floating-point exceptions, of masked lanes too, become warnings (3.8.0, 3.9.0)",
)
def _launch(original: Method, self: Any, *arguments: Any, **constants: Any) -> None:
    with np.errstate(all="ignore"):
        original(self, *arguments, **constants)


@dataclass
class Traffic:
    """Bytes that loads and stores moved.

    Args:
        loaded: by loads, and by atomic operations, which also store.
        stored: by stores and atomic operations.
    """

    loaded: int = 0
    stored: int = 0


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Counts the bytes that the kernels run inside load and store, of the lanes that are not masked.

    A lane counts each time: what two programs read is counted twice, as `kernels.audit.work.Work.bytes` counts.
    """
    traffic, memory = Traffic(), interpreter._interpreter
    load, store, update, exchange = memory.load, memory.store, memory.atomic_rmw, memory.atomic_cas

    def counted_load(pointers: np.ndarray, mask: Any, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
        traffic.loaded += np.count_nonzero(mask) * dtype.itemsize
        return load(pointers, mask, other, dtype)

    def counted_store(pointers: np.ndarray, value: np.ndarray, mask: Any) -> None:
        traffic.stored += np.count_nonzero(mask) * value.itemsize
        store(pointers, value, mask)

    def counted_update(op: Any, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray, order: Any) -> np.ndarray:
        traffic.loaded += np.count_nonzero(mask) * value.itemsize
        traffic.stored += np.count_nonzero(mask) * value.itemsize
        return update(op, pointers, value, mask, order)

    def counted_exchange(pointers: np.ndarray, expected: np.ndarray, value: np.ndarray, order: Any) -> np.ndarray:
        traffic.loaded += value.nbytes
        traffic.stored += value.nbytes
        return exchange(pointers, expected, value, order)

    memory.load, memory.store = counted_load, counted_store
    memory.atomic_rmw, memory.atomic_cas = counted_update, counted_exchange
    try:
        yield traffic
    finally:
        memory.load, memory.store, memory.atomic_rmw, memory.atomic_cas = load, store, update, exchange


def _method(new: Method, original: Method) -> Method:
    return lambda *arguments, **named: new(original, *arguments, **named)


def _install() -> None:
    for one in REPLACEMENTS:
        setattr(one.owner, one.name, _method(one.new, getattr(one.owner, one.name, None)))
    _install_libdevice()
    _wrap_interpreted()


if INTERPRETING:
    _install()
