"""Smoothing and packing on a CUDA device: their times beside the predicted ones and those of what Inductor makes.

Medians of Triton's own benchmark, with the L2 cache flushed between runs. The last cases quantize and dequantize 8
weights of [4096, 6144] to NVFP4, for which Megatron-LM#87 published 155 us (absmax known) and 369 us (fused) on a B300.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lotion_fx.kernels.smooth  # noqa: F401  registers the op
from lotion_fx.kernels import pack as packing
from lotion_fx.kernels.device import target_of
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
        work: the kernel and shape under which its time is predicted; None where the table has none.
    """

    name: str
    shape: str
    kernel: Callable[[], object]
    inductor: Callable[[], object] | None
    bytes: int
    work: tuple[str, str] | None = None


def cases(device: torch.device, shapes: dict[str, tuple[int, int]]) -> Iterator[Case]:
    """Every kernel of one operand on the largest matrix of each model."""
    for shape in shapes.values():
        for name in ("nvfp4", "mxfp4", "int4"):
            yield from _smooth_cases(device, shape, name)
            w = torch.randn(shape, device=device, dtype=torch.bfloat16)
            of = "pack", f"{_text(shape)} bf16 {name}"
            yield Case(f"pack {name}", _text(shape), partial(packing.pack, w, name), None, w.numel() * 5 // 2, of)


def _smooth_cases(device: torch.device, shape: tuple[int, int], name: str) -> Iterator[Case]:
    fmt, w = resolve(name), torch.randn(shape, device=device, dtype=torch.bfloat16)
    op = torch.ops.lotion_fx.smooth
    seed = torch.tensor(1, device=device)
    rtn = partial(op, w, name, -1, "randomized", True, False, False)
    rr = partial(op, w, name, -1, "randomized", False, True, False, seed)
    text, size = _text(shape), w.numel()
    bf16, fp32 = f"{text} bf16 {name}", f"{text} fp32 {name}"
    by_inductor = _compiled(rounding.rtn, w, fmt)
    yield Case(f"smooth/rtn {name}", text, rtn, by_inductor, size * 4, ("smooth/rtn", bf16))
    yield Case(f"smooth/rr {name}", text, rr, _compiled(rounding.rr, w, fmt), size * 4, ("smooth/rr", bf16))
    master, grad, h = (torch.rand(shape, device=device) for _ in range(3))
    factor = torch.tensor(0.5, device=device)
    term = partial(torch.ops.lotion_fx.add_term, grad, master, h, None, 1, factor, name, -1, "randomized")

    def reference(w: Tensor, h: Tensor, grad: Tensor) -> None:
        grad.add_(0.5 * rounding.variance_vjp(w, h, fmt))

    by_inductor = _compiled(reference, master, h, grad)
    yield Case(f"smooth/term {name}", text, term, by_inductor, size * 16, ("smooth/term", fp32))


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


def predicted(works: set[tuple[str, str]], arch: int) -> dict[tuple[str, str], float]:
    """The times that `kernels.audit.cost` predicts of the configs that run, in microseconds, by kernel and shape."""
    from lotion_fx.kernels.audit.aot import audit
    from lotion_fx.kernels.audit.cost import predict
    from lotion_fx.kernels.audit.table import choose
    from lotion_fx.kernels.audit.works import catalog
    from lotion_fx.kernels.targets import nearest

    target = nearest(arch)
    found = {}
    for work in catalog(target.arch):
        if (work.kernel, work.shape) in works:
            config = choose(work, target.arch)
            prediction = predict(work, config, audit(work, config, target.arch), target)
            found[work.kernel, work.shape] = prediction.us
    return found


def row(
    case: Case, device: torch.device, bandwidth: float | None, times: Mapping[tuple[str, str], float]
) -> dict[str, Any]:
    """One case measured.

    Args:
        bandwidth: of the device's memory, GB/s; None where it is not known.
        times: what is predicted, see `predicted`.
    """
    ours = microseconds(case.kernel, device)
    theirs = microseconds(case.inductor, device) if case.inductor else None
    foretold = times.get(case.work) if case.work else None
    return {
        "case": case.name,
        "shape": case.shape,
        "measured_us": ours,
        "predicted_us": foretold,
        "measured_over_predicted": None if foretold is None else ours / foretold,
        "of_roofline": None if bandwidth is None else case.bytes / (bandwidth * 1e3) / ours,
        "inductor_us": theirs,
        "inductor_over_kernel": None if theirs is None else theirs / ours,
    }


def rows(device: torch.device, *, quick: bool) -> list[dict[str, Any]]:
    """Every case measured; tiny weights if ``quick``, and no prediction without a device."""
    every = [*cases(device, {"tiny": (64, 128)} if quick else SHAPES)]
    every += published(device, (64, 128) if quick else PUBLISHED)
    if device.type == "cpu":
        return [row(case, device, None, {}) for case in every]
    target = target_of(device)
    major, minor = torch.cuda.get_device_capability(device)
    times = predicted({case.work for case in every if case.work}, 10 * major + minor)
    return [row(case, device, target.bandwidth, times) for case in every]
