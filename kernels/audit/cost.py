"""A predicted time for a compiled kernel, to choose among its configs. A prediction, never a measurement.

The grid of ``P`` programs runs in waves of up to ``M R``: ``M`` multiprocessors that hold ``R`` programs each. In a
wave of ``n`` programs the busiest multiprocessor has ``k = ceil(n / M)``, and these resources are busy for

    memory   n / P * minimum_bytes / min(0.9 bandwidth, n * in flight / 1 us)
    cache    n / P * bytes / (M * 47 B a clock)
    tensor   k / P * M * flops / rate                            summed over operand types
    issue    k * warps * instructions / 4 a clock
    fp32, int32, special, shared: k * warps * instructions of that pipe * 32 / lanes / clock

where a program's instructions are those that run once plus the loop's times its iterations, and 'in flight' are the
bytes of its loads that wait together: all those outside a loop, or those of the ``stages - 1`` iterations by which
asynchronous copies run ahead; ``stages`` is 1 without such copies, and one iteration's loads wait. A program moves
data, then computes: of data (memory, cache), products (tensor) and instructions (the rest), each the longest of its
resources, the wave takes the longest, plus the others divided by what overlaps, ``k`` programs times ``stages``:

    T(n) = max + (sum - max) / (k * stages),         time = 2 us + floor(P / M R) T(M R) + T(P mod M R)

Assumed, with no vendor's word for it: nine tenths of the bandwidth can be had; a loaded memory answers in 1 us; a tile
read again comes from the cache, which gives each multiprocessor what A100's does; a kernel takes 2 us to start and to
end; clocks are boost clocks. The roofline is ``max(minimum_bytes / bandwidth, flops / rate)``, without any of this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lotion_fx.kernels.audit.aot import Evidence, base, width
from lotion_fx.kernels.audit.work import Work
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.targets import Target

ACHIEVABLE = 0.9  # of the memory's bandwidth
LATENCY = 1.0  # of a loaded memory, us
CACHE = 5120 / 108  # bytes a clock that the cache gives a multiprocessor (A100: GA100 architecture whitepaper)
START = 2.0  # of a kernel, us
SHARED_LANES = 32  # 4-byte banks of shared memory, which shuffles use too (CUDA C++ Programming Guide)

_PIPES = {
    "fp32": ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "HADD2", "HMUL2", "HFMA2", "IMAD"),
    "special": ("MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "BREV", "FLO"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "SHFL", "LDG", "STG", "LDGSTS"),
    "int32": (
        *("LOP3", "SHF", "IADD3", "IADD", "VIADD", "LEA", "ISETP", "IMNMX", "VIMNMX", "SEL", "PRMT", "MOV", "F2FP"),
        *("FSETP", "FSEL", "FSET", "FMNMX", "FMNMX3", "FCHK", "PLOP3", "SGXT", "BMSK", "IABS", "I2FP", "I2IP", "F2IP"),
    ),
}
_ASYNCHRONOUS = ("LDGSTS", "UTMALDG", "UBLKCP")
_PIPE = {opcode: pipe for pipe, opcodes in _PIPES.items() for opcode in opcodes}


@dataclass(frozen=True)
class Prediction:
    """The predicted time of one kernel.

    Args:
        us: microseconds.
        bound_by: the resource that is busy longest; ``"latency"`` for a memory that too few loads keep waiting.
        share_of_roofline: the least time that memory and tensor cores allow, over ``us``.
    """

    us: float
    bound_by: str
    share_of_roofline: float


def predict(work: Work, config: Config, evidence: Evidence, target: Target) -> Prediction:
    """The predicted time of a kernel, by the formula above.

    Args:
        work: bytes, products, programs and iterations.
        config: the one that was compiled.
        evidence: of that compilation, for ``target.arch``.
        target: the device.
    """
    programs = work.programs(config)
    wave = target.multiprocessors * evidence.resident
    full, rest = divmod(programs, wave)
    us, bound_by = START, "launch"
    for times, n in ((full, wave), (1, rest)):
        if times and n:
            busy = _busy(work, config, evidence, target, n)
            overlap = -(-n // target.multiprocessors) * _stages(evidence, config)
            one_after_another = [max(times_of.values()) for times_of in busy]
            longest = max(one_after_another)
            us += times * (longest + (sum(one_after_another) - longest) / overlap)
            if bound_by == "launch":
                bound_by = next(name for part in busy for name, time in part.items() if time == longest)
    return Prediction(us, bound_by, roofline(work, target) / us)


def _stages(evidence: Evidence, config: Config) -> int:
    """Iterations of a loop that are under way at once: those that asynchronous copies run ahead, if it has any."""
    return config.num_stages if any(base(name) in _ASYNCHRONOUS for name in evidence.loop) else 1


def roofline(work: Work, target: Target) -> float:
    """The least time in microseconds that the memory's bandwidth and the tensor cores' rate allow."""
    return max(work.minimum_bytes / target.bandwidth / 1e3, _tensor(work, target))


def _tensor(work: Work, target: Target) -> float:
    """Microseconds of the matrix products; an operand type without an instruction is computed as bf16."""
    rates = target.tensor
    return sum(flops / rates.get(kind, rates["bf16"]) / 1e6 for kind, flops in work.tensor_flops.items())


def _busy(work: Work, config: Config, evidence: Evidence, target: Target, n: int) -> tuple[dict[str, float], ...]:
    """Microseconds for which ``n`` programs keep each resource busy: those of data, of products, of instructions."""
    programs = work.programs(config)
    k = -(-n // target.multiprocessors)
    memory, waiting = _memory(evidence, config, target, n)
    data = {
        waiting: n / programs * work.minimum_bytes / memory,
        "cache": n / programs * work.bytes(config) / (target.multiprocessors * CACHE * target.clock * 1e3),
    }
    products = {"tensor": k / programs * target.multiprocessors * _tensor(work, target)}
    cycles = _cycles(executed(evidence, work.iterations(config)), target)
    return data, products, {pipe: k * evidence.warps * each / target.clock / 1e3 for pipe, each in cycles.items()}


def _memory(evidence: Evidence, config: Config, target: Target, n: int) -> tuple[float, str]:
    """Bytes a microsecond that ``n`` programs get from memory, and whether it or their waiting sets that."""
    ahead = max(_stages(evidence, config) - 1, 1)
    in_flight = n * evidence.warps * 32 * max(_loaded(evidence.once), ahead * _loaded(evidence.loop))
    bandwidth = ACHIEVABLE * target.bandwidth * 1e3
    # A kernel that loads by tensor map shows no widths: its copies are taken to be deep enough.
    if in_flight == 0 or in_flight / LATENCY >= bandwidth:
        return bandwidth, "memory"
    return in_flight / LATENCY, "latency"


def _loaded(opcodes: Mapping[str, int]) -> int:
    """Bytes that the loads from global memory among some instructions bring a thread."""
    return sum(n * width(name) // 8 for name, n in opcodes.items() if base(name) in ("LDG", "LDGSTS"))


def executed(evidence: Evidence, iterations: int) -> Counter[str]:
    """Instructions that one warp runs, by name.

    Args:
        evidence: of one compilation.
        iterations: how often the loop's body runs.
    """
    loop = Counter({name: n * iterations for name, n in evidence.loop.items()})
    return Counter(evidence.once) + loop


def _cycles(opcodes: Mapping[str, int], target: Target) -> dict[str, float]:
    """Cycles for which the instructions of one warp keep each pipe of a multiprocessor busy."""
    lanes = {
        "fp32": target.fp32_lanes,
        "int32": target.int32_lanes,
        "special": target.special_lanes,
        "shared": SHARED_LANES,
    }
    cycles = dict.fromkeys(lanes, 0.0)
    for name, n in opcodes.items():
        pipe = _PIPE.get(base(name))
        if pipe:
            words = max(width(name) // 32, 1) if pipe == "shared" else 1
            cycles[pipe] += n * words * 32 / lanes[pipe]
    return {**cycles, "issue": sum(opcodes.values()) / target.issue}
