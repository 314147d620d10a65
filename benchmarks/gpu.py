"""Times smoothing and packing on a CUDA device, beside what Inductor makes of the same.

    python benchmarks/gpu.py                 # all; on the device that is there
    python benchmarks/gpu.py --only smooth   # some
    python benchmarks/gpu.py --device cpu --quick   # the plumbing, without a device: the operators' ATen path

Medians of Triton's own benchmark, with the L2 cache flushed between runs. The last lines quantize and dequantize 8
weights of [4096, 6144] to NVFP4, for which Megatron-LM#87 published 155 us (absmax known) and 369 us (fused) on a B300.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from tabulate import tabulate
from torch import Tensor

from lotion_fx.kernels import pack as packing
from lotion_fx.kernels.view import amaxes
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import resolve

SHAPES = {"150M": (3072, 768), "8B": (14336, 4096), "70B": (28672, 8192)}
PUBLISHED = (8 * 4096, 6144)


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Args:
        name, shape: for the table.
        kernel: calls the operator.
        inductor: the same by ATen, compiled; None where there is no such thing.
        bytes: that the kernel must move.
    """

    name: str
    shape: str
    kernel: Callable[[], object]
    inductor: Callable[[], object] | None
    bytes: int


def cases(device: torch.device, shapes: dict[str, tuple[int, int]]) -> Iterator[Case]:
    """Every kernel of one operand on the largest matrix of each model."""
    for shape in shapes.values():
        for name in ("nvfp4", "mxfp4", "int4"):
            yield from _smooth_cases(device, shape, name)
            w = torch.randn(shape, device=device, dtype=torch.bfloat16)
            yield Case(f"pack {name}", _text(shape), partial(packing.pack, w, name), None, w.numel() * 5 // 2)


def _smooth_cases(device: torch.device, shape: tuple[int, int], name: str) -> Iterator[Case]:
    fmt, w = resolve(name), torch.randn(shape, device=device, dtype=torch.bfloat16)
    op = torch.ops.lotion_fx.smooth
    seed = torch.tensor(1, device=device)
    rtn = partial(op, w, name, -1, "randomized", True, False, False)
    rr = partial(op, w, name, -1, "randomized", False, True, False, seed)
    yield Case(f"smooth/rtn {name}", _text(shape), rtn, _compiled(rounding.rtn, w, fmt), w.numel() * 4)
    yield Case(f"smooth/rr {name}", _text(shape), rr, _compiled(rounding.rr, w, fmt), w.numel() * 4)
    master, grad, h = (torch.rand(shape, device=device) for _ in range(3))
    factor = torch.tensor(0.5, device=device)
    term = partial(torch.ops.lotion_fx.add_term, grad, master, h, None, 1, factor, name, -1, "randomized")

    def reference(w: Tensor, h: Tensor, grad: Tensor) -> None:
        grad.add_(0.5 * rounding.variance_vjp(w, h, fmt))

    yield Case(f"smooth/term {name}", _text(shape), term, _compiled(reference, master, h, grad), w.numel() * 16)


def published(device: torch.device, shape: tuple[int, int]) -> Iterator[Case]:
    """Round to nearest with the absmax known, and with its pass."""
    w, fmt = torch.randn(shape, device=device, dtype=torch.bfloat16), resolve("nvfp4")
    op, flags = torch.ops.lotion_fx.smooth, ("nvfp4", -1, "randomized", True, False, False)
    amax = amaxes(w, fmt, -1)
    yield Case("NVFP4 QDQ, absmax known", _text(shape), partial(op, w, *flags, None, amax), None, w.numel() * 4)
    yield Case("NVFP4 QDQ", _text(shape), partial(op, w, *flags), _compiled(rounding.rtn, w, fmt), w.numel() * 6)


def _compiled(function: Callable[..., object], *args: object) -> Callable[[], object]:
    def own(*args: object) -> object:  # compiled for these shapes alone
        return function(*args)

    own.__code__ = own.__code__.replace()
    return partial(torch.compile(own, dynamic=False), *args)


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def microseconds(function: Callable[[], object], device: torch.device) -> float:
    """The median time of a call."""
    function()
    if device.type == "cuda":
        from triton.testing import do_bench

        return 1e3 * do_bench(function, return_mode="median")
    times = []
    for _ in range(3):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


def row(case: Case, device: torch.device, bandwidth: float | None) -> list[object]:
    """Measured time, share of the memory roofline, and Inductor's time over it."""
    ours = microseconds(case.kernel, device)
    theirs = microseconds(case.inductor, device) if case.inductor else None
    roofline = None if bandwidth is None else case.bytes / (bandwidth * 1e3) / ours
    return [case.name, case.shape, ours, roofline, theirs, None if theirs is None else theirs / ours]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--quick", action="store_true", help="tiny weights")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "no CUDA device; --device cpu --quick runs the plumbing, `lotion-fx kernels` predicts times\n")
    bandwidth = None
    if device.type == "cuda":
        from lotion_fx.kernels.device import target_of

        bandwidth = target_of(device).bandwidth
        print(torch.cuda.get_device_name(device))
    shapes = {"tiny": (64, 128)} if args.quick else SHAPES
    every = [*cases(device, shapes), *published(device, (64, 128) if args.quick else PUBLISHED)]
    rows = [row(case, device, bandwidth) for case in every if args.only in case.name]
    headers = ["", "shape", "kernel, us", "of the roofline", "Inductor, us", "Inductor / kernel"]
    print(tabulate(rows, headers, floatfmt=("", "", ".1f", ".0%", ".1f", ".2f"), missingval=""))


if __name__ == "__main__":
    main()
