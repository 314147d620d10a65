"""What the kernels that go through weights do on them: `smooth`, `adamw_smooth` and `pack`."""

from __future__ import annotations

import math

import triton.language as tl

from lotion_fx.kernels import adamw_smooth as adamw
from lotion_fx.kernels import pack as packing
from lotion_fx.kernels import smooth as smoothing
from lotion_fx.kernels.audit.models import MIDDLE, MODELS, Model
from lotion_fx.kernels.audit.work import Work
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.device import has_conversion
from lotion_fx.kernels.device_code import specialized
from lotion_fx.kernels.packed import in_pairs
from lotion_fx.kernels.view import View
from lotion_fx.numerics.formats import Format, resolve

_SIZES = {"bf16": 2, "fp32": 4}  # bytes of an element


# -------------------------------------------------------------------------------------------------------------- smooth


def smooth_works(arch: int) -> list[Work]:
    """`smooth` on the largest matrix of each model, on blocks longer than a tile, and on Megatron-LM's benchmark."""
    found = []
    for model in MODELS:
        for name in ("nvfp4", "mxfp4", "int4", "int8"):
            found += [smooth(arch, model.up, -1, name, result, "bf16") for result in ("rtn", "rr")]
            found.append(smooth(arch, model.up, -1, name, "term", "fp32"))
        found.append(smooth(arch, model.up, -1, "nvfp4", "variance", "bf16"))
        found += [smooth(arch, model.up, 0, "nvfp4", result, "bf16") for result in ("rtn", "rr")]
        found.append(smooth(arch, model.up, 0, "nvfp4", "term", "fp32"))
    for shape, name in ((MIDDLE.up, "int4/tensor"), (MIDDLE.down, "int8")):  # longer than a tile
        found += [smooth(arch, shape, -1, name, result, "bf16") for result in ("rtn", "rr")]
        found += [smooth(arch, shape, -1, name, result, "fp32") for result in ("term", "sums")]
    return [*found, smooth(arch, (8 * 4096, 6144), -1, "nvfp4", "rtn", "bf16")]


def smooth(arch: int, shape: tuple[int, ...], axis: int, name: str, result: str, dtype: str) -> Work:
    """One result of `smooth` on a weight.

    Args:
        arch: a key of `TARGETS`.
        shape, axis: of the weight, and of its blocks.
        name: of the format.
        result: ``"rtn"``, ``"rr"``, ``"variance"``, ``"term"`` or ``"sums"``.
        dtype: of the weight, ``"bf16"`` or ``"fp32"``.
    """
    fmt, term = resolve(name), result in ("term", "sums")
    view = View.of(shape, fmt, axis, *(shape if term else ()))
    pointers = _smooth_pointers(view, fmt, result, dtype)
    fn = specialized(smoothing.sums_kernel if result == "sums" else smoothing.smooth_kernel, fmt)
    constants = {
        **view.constants,
        "FOURS": view.fours,
        "WHOLE": view.whole,
        "E2M1_CVT": has_conversion(fmt, arch),
        **{key: result == key.lower() for key in ("RTN", "RR", "VARIANCE", "TERM")},
    }
    absent = {name: None for name in fn.arg_names if name.endswith("_ptr") and not pointers.get(name)}
    integers = dict.fromkeys(view.arguments, "i32")
    e2m1 = has_conversion(fmt, arch) and result == "rtn"
    moved = smooth_traffic(view, fmt, result, dtype)
    return Work(
        kernel=f"smooth/{result}",
        shape=f"{'x'.join(map(str, shape))} {dtype} {name}" + (f" axis {axis}" if axis != -1 else ""),
        fn=fn,
        signature={**{key: value for key, value in pointers.items() if value}, **integers},
        constants={**absent, **{key: value for key, value in constants.items() if key in fn.arg_names}},
        configs=smoothing.SUMS if result == "sums" else smoothing.CANDIDATES[view.shape_class],
        programs=lambda config: view.programs(config.constants),
        bytes=lambda config: moved,
        minimum_bytes=moved,
        iterations=lambda config: view.tiles(config.constants),
        requires={arch: ("F2FP.SATFINITE.E2M1",)} if e2m1 else {},
        aligned=tuple(integers),
        shape_class=view.shape_class,
        wide=0.9,
    )


def _smooth_pointers(view: View, fmt: Format, result: str, dtype: str) -> dict[str, str | None]:
    """The types of the pointers that a result takes; None for what is absent."""
    pointers = {"w_ptr": f"*{dtype}", "amax_ptr": "*fp32" if fmt.law.two_level or not view.whole else None}
    if result not in ("term", "sums"):
        made = "*fp32" if result == "variance" else f"*{dtype}"
        return {**pointers, f"{result}_ptr": made, "seed_ptr": "*i64" if result == "rr" else None}
    pointers |= {"h_ptr": "*fp32", "cols_ptr": "*fp32"}
    summed = {"grad_ptr": "*fp32", "factor_ptr": "*fp32", "sums_ptr": None if view.whole else "*fp32"}
    return {**pointers, **({"parts_ptr": "*fp32"} if result == "sums" else summed)}


def smooth_traffic(view: View, fmt: Format, result: str, dtype: str) -> int:
    """Bytes that `smooth` moves for a weight: each input once and each output once.

    Args:
        view, fmt: the weight, and whether its curvature is factored.
        result, dtype: as for `smooth`; gradients and curvature are float32.
    """
    elements, size = view.outer * view.length * view.inner, _SIZES[dtype]
    amax = 4 if fmt.law.two_level else 0 if view.whole else 4 * view.scales
    if result not in ("term", "sums"):
        return elements * (size + (4 if result == "variance" else size)) + amax + (8 if result == "rr" else 0)
    h = elements // (view.rows * view.cols) * (view.rows + view.cols) if view.cols else elements
    if result == "sums":
        return elements * size + 4 * h + amax + 8 * view.count * view.inner
    return elements * (size + 8) + 4 * h + 4 + amax + (0 if view.whole else 8 * view.scales)


# -------------------------------------------------------------------------------------------------------- adamw_smooth


def adamw_works(arch: int) -> list[Work]:
    """`adamw_smooth` in a step of all layers of each model, whichever the architecture."""
    kinds = (("nvfp4", "fp32"), ("mxfp4", "fp32"), ("int4", "fp32"), ("nvfp4", "bf16"))
    return [adamw_smooth(model, name, dtype) for model in MODELS for name, dtype in kinds]


def adamw_smooth(model: Model, name: str, dtype: str) -> Work:
    """`adamw_smooth` on all layers of a model, weights and moments in one dtype.

    Args:
        model: one of `MODELS`.
        name: of the format.
        dtype: ``"bf16"`` or ``"fp32"``.
    """
    fmt, elements = resolve(name), [rows * cols for rows, cols in model.layer]
    size, wide = _SIZES[dtype], {"fp32": tl.float32, "bf16": tl.bfloat16}[dtype]

    def programs(config: Config) -> int:
        return model.layers * sum(adamw.programs_of(n, config) for n in elements)

    return Work(
        kernel="adamw_smooth",
        shape=f"{model.name} {dtype} {name}",
        fn=specialized(adamw.adamw_smooth_kernel, fmt),
        signature={
            **{"table": "*i64", "factors": "*fp32", "owner": "*i32", "amax": "*fp32", "amax_after": "*i32"},
            **dict.fromkeys(("beta1", "rest1", "beta2", "rest2"), "fp32"),
        },
        constants={"WEIGHT": wide, "MOMENT": wide, "ALIGNMENT": 16, "BLOCK": fmt.block},
        configs=adamw.CONFIGS,
        programs=programs,
        bytes=lambda config: adamw_traffic(model.layers * sum(elements), programs(config), size, size, fmt),
        minimum_bytes=adamw_traffic(model.layers * sum(elements), model.layers * len(elements), size, size, fmt),
        iterations=lambda config: config.constants["TILES"],
        wide=0.9,
    )


def adamw_traffic(elements: int, programs: int, size: int, moment_size: int, fmt: Format) -> int:
    """Bytes that `adamw_smooth`'s loads and stores move.

    Args:
        elements: of all weights.
        programs: of a launch.
        size, moment_size: bytes of an element of w and g, and of m and v.
        fmt: a two-level one reads and updates an absmax in each program.
    """
    tables = 4 + 6 * 8 + len(adamw.FACTORS) * 4 + (3 * 4 if fmt.law.two_level else 0)
    return elements * (3 * size + 4 * moment_size) + programs * tables


# ---------------------------------------------------------------------------------------------------------------- pack


def pack_works(arch: int) -> list[Work]:
    """`pack` on the largest matrix of each model, bfloat16."""
    return [pack(arch, model.up, name) for model in MODELS for name in ("nvfp4", "mxfp4", "int4", "int8")]


def pack(arch: int, shape: tuple[int, ...], name: str) -> Work:
    """`pack` on a bfloat16 weight.

    Args:
        arch: a key of `TARGETS`.
        shape: of the weight.
        name: of the format.
    """
    fmt, elements = resolve(name), math.prod(shape)
    view = packing.view_of(shape, fmt)
    stored = "*u8" if hasattr(fmt.law, "type") else "*fp32"
    needs_amax = fmt.law.two_level or not view.whole
    pointers = {"amax_ptr": "*fp32" if needs_amax else None, "scales_ptr": stored if view.whole else None}
    moved = elements * 2 + elements // (2 if in_pairs(fmt) else 1) + (4 if fmt.law.two_level else 0)
    moved += view.count * (1 if stored == "*u8" else 4) if view.whole else 4 * view.scales
    integers = dict.fromkeys(packing.arguments(view), "i32")
    return Work(
        kernel="pack",
        shape=f"{'x'.join(map(str, shape))} bf16 {name}",
        fn=specialized(packing.pack_kernel, fmt),
        signature={
            **{"w_ptr": "*bf16", "codes_ptr": "*u8"},
            **{key: value for key, value in pointers.items() if value},
            **integers,
        },
        constants={
            **{key: None for key, value in pointers.items() if not value},
            **packing.constants(view, fmt, arch),
        },
        configs=packing.CANDIDATES[view.shape_class],
        programs=lambda config: view.programs(config.constants),
        bytes=lambda config: moved,
        minimum_bytes=moved,
        iterations=lambda config: view.tiles(config.constants),
        requires={arch: ("F2FP.SATFINITE.E2M1",)} if has_conversion(fmt, arch) else {},
        aligned=tuple(integers),
        shape_class=view.shape_class,
        wide=0.9,
    )
