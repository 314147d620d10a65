"""What a kernel does on one shape: all it takes to compile it without a device, count its traffic, predict its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lotion_fx.kernels.config import Config


@dataclass(frozen=True)
class Work:
    """One kernel on one shape.

    Args:
        kernel: its name in tables, ``"smooth/rtn"``.
        shape: what it works on, ``"4096x4096 bf16 nvfp4"``.
        fn: the ``triton.jit`` function.
        signature: the Triton type of each argument that is not a constant: ``"*bf16"``, ``"i32"``, ``"fp32"``.
        constants: values of its ``tl.constexpr`` arguments other than a config's.
        configs: the candidates among which the cost model chooses.
        programs: how many programs a config launches.
        bytes: what a config's loads and stores move, a tile read twice counted twice.
        minimum_bytes: each input read once and each output written once.
        tensor_flops: of matrix products, 2 for a multiply and add, by the operand type whose rate holds (``"bf16"``,
            ``"fp8"``, ``"fp4"``).
        iterations: how often a config runs the body of its loop; 0 for a kernel without one.
        requires: opcodes (prefixes of SASS names) without which the kernel missed its point, by architecture.
        aligned: integer arguments that are multiples of 16; pointers always are.
        wide: share of its loads from and stores to global memory that must move 128 bits a thread.
        shape_class: the kind of shape, among those that its module tells apart, for which one config is chosen.
    """

    kernel: str
    shape: str
    fn: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    configs: tuple[Config, ...]
    programs: Callable[[Config], int]
    bytes: Callable[[Config], int]
    minimum_bytes: int
    tensor_flops: Mapping[str, int] = field(default_factory=dict)
    iterations: Callable[[Config], int] = lambda config: 0
    requires: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    wide: float = 0.0
    shape_class: str = ""
