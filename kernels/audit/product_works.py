"""What the kernels that multiply do on layers: `curvature`, `variance_linear`, `packed_linear` and `scaled_linear`."""

from __future__ import annotations

import math

import torch
import triton

from lotion_fx.kernels import curvature as curving
from lotion_fx.kernels import packed_linear as packed
from lotion_fx.kernels import scaled_linear as scaled
from lotion_fx.kernels import variance_linear as varying
from lotion_fx.kernels.audit.models import LARGE, MIDDLE, SMALL
from lotion_fx.kernels.audit.work import Work
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.device_code import specialized
from lotion_fx.kernels.packed import FEW, in_pairs
from lotion_fx.kernels.targets import TARGETS, Target
from lotion_fx.kernels.tiles import count
from lotion_fx.numerics.formats import Format, resolve

# Layers of a training step, and of one on a packed weight.
TRAINED = (SMALL.square, SMALL.up, MIDDLE.square, MIDDLE.up, LARGE.up)
PACKED = (SMALL.up, SMALL.down, MIDDLE.up, MIDDLE.key, MIDDLE.down, LARGE.up, LARGE.down)
MANY = 4096  # positions

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
PRODUCT = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 103: "UTCHMMA", 120: "HMMA"}


# ----------------------------------------------------------------------------------------------------------- curvature


def curvature_works(arch: int) -> list[Work]:
    """`curvature` on the layers of a training step."""
    shapes = [(MANY if layer in SMALL.layer else 2 * MANY, *layer) for layer in TRAINED]
    found = [curvature(arch, shape, torch.bfloat16) for shape in shapes]
    found.append(curvature(arch, shapes[1], torch.float16))
    return found + [curvature(arch, shapes[1], torch.float32, precision) for precision in ("ieee", "tf32")]


def curvature(arch: int, shape: tuple[int, int, int], dtype: torch.dtype, precision: str = "ieee") -> Work:
    """`curvature` on one layer.

    Args:
        arch: a key of `TARGETS`.
        shape: N, O and I.
        dtype: of the operands.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    (positions, outputs, inputs), size, name = shape, dtype.itemsize, TYPES[dtype]
    tensor_cores = dtype != torch.float32 or precision == "tf32"
    squares = "tf32" if dtype == torch.float16 else precision
    written = outputs * inputs * (size + 4)
    scalars = ("positions", "outputs", "inputs", "g_stride", "x_stride")
    row = curving.shape_class(outputs, inputs, dtype, precision)
    noted = [name, "tf32" * (precision == "tf32")]

    def bytes_moved(config: Config) -> int:
        down, across = triton.cdiv(outputs, config.constants["BM"]), triton.cdiv(inputs, config.constants["BN"])
        return positions * size * (outputs * across + inputs * down) + written

    # In units of bfloat16 products, which take half of the time of TF32's.
    of_operands = 2 if dtype == torch.float32 else 1
    flops = round(2 * math.prod(shape) * (of_operands + (2 if squares == "tf32" else 1)))
    return Work(
        kernel="curvature/full",
        shape=f"{positions}x{outputs}x{inputs} {' '.join(filter(None, noted))}",
        fn=curving.curvature_kernel,
        signature={
            **dict.fromkeys(("g", "x", "gradient"), f"*{name}"),
            "curvature": "*fp32",
            **dict.fromkeys(scalars, "i32"),
        },
        constants={"PRECISION": precision, "SQUARES": squares},
        configs=curving.CONFIGS[row],
        programs=lambda config: count(outputs, inputs, config.constants),
        bytes=bytes_moved,
        minimum_bytes=positions * size * (outputs + inputs) + written,
        tensor_flops={"bf16": flops} if tensor_cores else {},
        iterations=lambda config: triton.cdiv(positions, config.constants["BK"]),
        requires={arch: (PRODUCT[arch], "LDGSTS")} if tensor_cores else {},
        aligned=scalars[1:],
        shape_class=row,
    )


# ----------------------------------------------------------------------------------------------------- variance_linear


def variance_works(arch: int) -> list[Work]:
    """`variance_linear`: variances in registers for few positions, and read for a training step's."""
    few, many, usual = varying.FEW, 2 * MANY, MIDDLE.up
    found = [variance_linear(arch, (few, *layer), "nvfp4") for layer in TRAINED]
    found += [variance_linear(arch, (few, *usual), fmt) for fmt in ("mxfp4", "int4", "int8", "nf4")]
    found += [variance_linear(arch, (many, *layer), None) for layer in TRAINED]
    # For comparison with the one above it: what the choice of FEW rests on.
    found += [variance_linear(arch, (many, *usual), "nvfp4")]
    found += [variance_linear(arch, (n, *usual), fmt, random=True) for n, fmt in ((few, "nvfp4"), (many, None))]
    return found + [variance_linear(arch, (MANY, *SMALL.up), None, dtype) for dtype in (torch.float16, torch.float32)]


def variance_linear(
    arch: int,
    shape: tuple[int, int, int],
    fmt: str | None,
    dtype: torch.dtype = torch.bfloat16,
    random: bool = False,
    bias: bool = False,
) -> Work:
    """`variance_linear` on one layer, all operands of one dtype.

    Args:
        arch: a key of `TARGETS`.
        shape: N, O and I.
        fmt: the format's name; None where variances are read.
        dtype: of the operands.
        random, bias: whether the input is random, and whether there is a bias.
    """
    (positions, outputs, inputs), name, size = shape, TYPES[dtype], dtype.itemsize
    which, row = "given" if fmt is None else "registers", varying.shape_class(positions, dtype, random)
    of_format = {} if fmt is None else varying.format_constants(resolve(fmt))
    amax = of_format.get("AMAX", "none")
    variance_size = 0 if fmt else 2 if dtype == torch.bfloat16 else 4
    as_operands = variance_size == 2 or (
        fmt and amax == "none"
    )  # then an absmax is absent, and the weight in its place
    of_weight = {"amax" if fmt else "variances": f"*{name}" if as_operands else "*fp32"}
    strides = ("x_stride", "u_stride", "w_stride", *(() if fmt else ("s_stride",)))

    def bytes_moved(config: Config) -> int:
        down, across = triton.cdiv(positions, config.constants["BM"]), triton.cdiv(outputs, config.constants["BN"])
        of_positions = positions * inputs * size * (1 + random)
        of_amax = {"none": 0, "tensor": 4 * across, "channel": 4 * outputs}[amax]
        of_outputs = outputs * inputs * (size + variance_size) + outputs * size * bias + of_amax
        return of_positions * across + of_outputs * down + 2 * positions * outputs * size

    # The product of squares beside float16 is one in TF32, at half the rate; IEEE float32 takes no tensor core.
    products = 1 + (1 + random) * (1 + (dtype == torch.float16))
    squares = "tf32" if dtype == torch.float16 else "ieee"
    return Work(
        kernel=f"variance_linear/{which}",
        shape=f"{positions}x{outputs}x{inputs} {name}{f' {fmt}' if fmt else ''}{' random input' if random else ''}",
        fn=specialized(varying.variance_linear_kernel, resolve(fmt)) if fmt else varying.variance_given_kernel,
        signature={
            **dict.fromkeys(("x", "u", "w", "bias"), f"*{name}"),
            **of_weight,
            **dict.fromkeys(("y", "v"), f"*{name}"),
            **dict.fromkeys(("positions", "outputs", "inputs", *strides), "i32"),
        },
        constants={"RANDOM": random, "BIAS": bias, "PRECISION": "ieee", "SQUARES": squares, **of_format},
        configs=varying.CONFIGS[which][row],
        programs=lambda config: count(positions, outputs, config.constants),
        bytes=bytes_moved,
        minimum_bytes=bytes_moved(Config({"BM": positions, "BN": outputs})),
        tensor_flops={} if dtype == torch.float32 else {"bf16": 2 * math.prod(shape) * products},
        iterations=lambda config: triton.cdiv(inputs, config.constants["BK"]),
        requires={} if dtype == torch.float32 else {arch: (PRODUCT[arch], "LDGSTS")},
        aligned=("outputs", "inputs", *strides),
        shape_class=row,
    )


# ------------------------------------------------------------------------------------------------------- packed_linear


def packed_works(arch: int) -> list[Work]:
    """`packed_linear` on one row, 16 and 4096 rows of activations."""
    listed = [("nvfp4", torch.bfloat16, shape) for shape in PACKED]
    others = (("nvfp4", torch.float16), ("mxfp4", torch.bfloat16), ("int4", torch.bfloat16), ("int8", torch.bfloat16))
    listed += [(*other, MIDDLE.up) for other in others]
    return [
        packed_linear(resolve(name), dtype, rows, *shape, arch)
        for name, dtype, shape in listed
        for rows in (1, FEW, MANY)
    ]


def packed_linear(
    fmt: Format, dtype: torch.dtype, rows: int, outputs: int, features: int, arch: int, *, row_scales: bool = False
) -> Work:
    """`packed_linear` on one layer.

    Args:
        fmt: of the weight.
        dtype: of the activations.
        rows, outputs, features: the numbers of inputs and outputs are multiples of 16 and of the block.
        arch: a key of `TARGETS`.
        row_scales: whether rows of activations have scales, as in `scaled_linear`.
    """
    where = packed.constants(fmt, dtype)
    kernel, shape_class = packed.classified(where, rows)
    width = features // 2 if in_pairs(fmt) else features
    blocks = features // fmt.block if isinstance(fmt.block, int) else 1
    absent = {"bias": None, **({} if fmt.law.two_level else {"tensor_scale": None})}
    absent |= {} if row_scales else {"row_scales": None}
    added = packed.chunks_of(rows, outputs, features) * packed.CHUNK.value
    parts = triton.cdiv(features, added)
    types = {
        **{"x": f"*{TYPES[dtype]}", "codes": "*u8", "scales": "*u8" if fmt.law.bits == 8 else "*fp32"},
        **{"tensor_scale": "*fp32", "row_scales": "*fp32", "y": f"*{TYPES[dtype]}" if parts == 1 else "*fp32"},
        **dict.fromkeys(("M", "N", "K", "code_width", "scale_width", "chunks"), "i32"),
    }

    def moved(config: Config) -> int:
        across, down = triton.cdiv(outputs, config.constants["BN"]), triton.cdiv(rows, config.constants["BM"])
        # A tile within a block reads the block's scale anew, and each part of a split sum a channel's.
        again = {"weight": blocks, "block": triton.cdiv(features, config.constants["BK"]), "sum": parts}
        scales = outputs * again[where["PLACE"]] * fmt.law.bits // 8
        once = rows * outputs * (dtype.itemsize if parts == 1 else 4 * parts)
        once += 4 * parts * across * (down * fmt.law.two_level + rows * row_scales)
        return down * (outputs * width + scales) + across * rows * features * dtype.itemsize + once

    weight = outputs * (width + blocks * fmt.law.held.itemsize) + 4 * fmt.law.two_level
    from_shared = arch in packed.FROM_SHARED and rows > FEW
    return Work(
        kernel=kernel,
        shape=f"{rows}x{outputs}x{features} {TYPES[dtype]} {fmt.name}{' W4A4' if row_scales else ''}",
        fn=packed.packed_linear_kernel,
        signature={name: kind for name, kind in types.items() if name not in absent},
        constants={**where, **absent},
        configs=packed.candidates(where, rows, arch),
        programs=lambda config: parts * count(rows, outputs, config.constants),
        bytes=moved,
        minimum_bytes=weight + rows * (features + outputs) * dtype.itemsize + 4 * rows * row_scales,
        tensor_flops={"bf16": 2 * rows * outputs * features},
        iterations=lambda config: triton.cdiv(min(added, features), config.constants["BK"]),
        requires={arch: ("LDGSTS", PRODUCT[arch] if from_shared else "HMMA")},
        aligned=("N", "K", "code_width", *(("scale_width",) if blocks % 16 == 0 else ())),
        shape_class=shape_class,
    )


# ------------------------------------------------------------------------------------------------------- scaled_linear


def scaled_works(arch: int) -> list[Work]:
    """`scaled_linear` on 16 and 4096 rows of activations: their rounding, and the product or what stands in for it."""
    target = TARGETS[arch]
    listed = [("nvfp4", rows, shape) for shape in PACKED for rows in (FEW, MANY)]
    listed += [("mxfp4", rows, MIDDLE.up) for rows in (FEW, MANY)]
    inputs = sorted({(name, rows, features) for name, rows, (_, features) in listed})
    rounding = [scaled_rows(resolve(name), rows, features, target) for name, rows, features in inputs]
    if scaled.block_scaled(target):
        return rounding + [scaled_product(resolve(name), rows, *shape, target) for name, rows, shape in listed]
    return rounding + [
        packed_linear(resolve(name), torch.bfloat16, rows, *shape, arch, row_scales=True)
        for name, rows, shape in listed
    ]


def scaled_rows(fmt: Format, rows: int, features: int, target: Target) -> Work:
    """The rounding of bfloat16 activations [rows, features]."""
    block = int(fmt.block)

    def pieces(config: Config) -> int:
        return triton.cdiv(features, config.constants["SIZE"])

    moved = rows * (2 * features + features // 2 + features // block)
    return Work(
        kernel="scaled_linear/rows",
        shape=f"{rows}x{features} bf16 {fmt.name}",
        fn=specialized(scaled.quantize_rows_kernel, fmt),
        signature={
            **{"x": "*bf16", "row_scales": "*fp32", "codes": "*u8", "scales": "*u8"},
            **dict.fromkeys(("K", "width", "blocks"), "i32"),
        },
        constants={"BLOCK": block, "E2M1_CVT": target.supports("e2m1")},
        configs=scaled.ROW_CONFIGS,
        programs=lambda config: rows * pieces(config),
        bytes=lambda config: moved + 4 * rows * pieces(config),
        minimum_bytes=moved + 4 * rows,
        requires=dict.fromkeys((100, 103, 120), ("F2FP.SATFINITE.E2M1",)),
        aligned=("K", "width"),
        shape_class=fmt.name,
    )


def scaled_product(fmt: Format, rows: int, outputs: int, features: int, target: Target) -> Work:
    """The block-scaled product of rounded activations and a packed weight, into bfloat16."""
    kernel, shape_class = scaled.classified(fmt, rows)
    width, blocks = features // 2, features // int(fmt.block)
    two_level = fmt.law.two_level

    def moved(config: Config) -> int:
        across, down = triton.cdiv(outputs, config.constants["BN"]), triton.cdiv(rows, config.constants["BM"])
        scales = 4 * (across * rows + two_level * across * down)
        return (width + blocks) * (across * rows + down * outputs) + scales + 2 * rows * outputs

    types = dict.fromkeys(("x_codes", "x_scales", "codes", "scales"), "*u8") | {"row_scales": "*fp32"}
    return Work(
        kernel=kernel,
        shape=f"{rows}x{outputs}x{features} bf16 {fmt.name}",
        fn=scaled.scaled_product_kernel,
        signature={
            **types,
            **({"tensor_scale": "*fp32"} if two_level else {}),
            **{"y": "*bf16", **dict.fromkeys(("M", "N", "width", "blocks"), "i32")},
        },
        constants={
            **{"BLOCK": fmt.block, "E4M3": two_level, "bias": None},
            **({} if two_level else {"tensor_scale": None}),
        },
        configs=scaled.candidates(target),
        programs=lambda config: count(rows, outputs, config.constants),
        bytes=moved,
        minimum_bytes=(width + blocks) * (rows + outputs) + 4 * (rows + two_level) + 2 * rows * outputs,
        tensor_flops={"fp4": 2 * rows * outputs * features},
        iterations=lambda config: triton.cdiv(features, config.constants["BK"]),
        requires={target.arch: ("LDGSTS", "UTCOMMA" if target.supports("tcgen05") else "OMMA")},
        aligned=("N", "width", *(("blocks",) if blocks % 16 == 0 else ())),
        shape_class=shape_class,
    )
