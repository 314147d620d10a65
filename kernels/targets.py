"""The GPU architectures that kernels are compiled for: what one multiprocessor holds, how fast it is, what it can do.

Every number is the vendor's. ``multiprocessors`` to ``l2`` and ``tensor`` are those of the named device, the other
limits those of the architecture:

* residency: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". 255 registers a thread,
  65536 a multiprocessor and 1 KiB of shared memory that the system keeps of every block are common to all.
* lanes: the same guide, "Throughput of Native Arithmetic Instructions".
* features: PTX ISA, "Target ISA Notes" of ``cp.async``, ``cvt``, ``cp.async.bulk.tensor``, ``tcgen05.mma`` and
  ``mma.sync ... .block_scale``; each is also seen to compile, or not to, by `tests/compiled/test_targets.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

# What a feature is called here -> the PTX that it stands for.
FEATURES = {
    "cp.async": "cp.async.cg.shared.global: copies to shared memory that pass no register",
    "fp8": "cvt.rn.satfinite.e4m3x2.f32: Triton's fp8e4nv type",
    "e2m1": "cvt.rn.satfinite.e2m1x2.f32: two FP4 codes from two floats",
    "cvt.rs": "cvt.rs.satfinite.e2m1x4.f32: stochastic rounding",
    "tma": "cp.async.bulk.tensor: tensor descriptors",
    "tcgen05": "tcgen05.mma: matrix products in tensor memory, block scaled ones among them",
    "omma": "mma.sync.kind::mxf4nvf4.block_scale: block scaled matrix products in registers",
}


@dataclass(frozen=True)
class Target:
    """One architecture, with a device that stands for it.

    Args:
        arch: compute capability, 80 for ``sm_80``.
        device: the device whose numbers these are.
        multiprocessors: how many it has.
        clock: boost clock in GHz.
        bandwidth: of its memory, GB/s.
        l2: cache, MiB.
        threads: resident on a multiprocessor at most.
        blocks: resident on a multiprocessor at most.
        shared: memory of a multiprocessor, KiB.
        tensor_memory: columns of a multiprocessor's tensor memory.
        tensor: dense rate with fp32 accumulation by operand type, TFLOP/s; a type that is absent has no instruction.
        fp32_lanes: fp32 additions, multiplications or both a clock on a multiprocessor.
        int32_lanes: integer, logic, compare and select operations a clock on a multiprocessor.
        special_lanes: transcendentals (MUFU) and unpacked conversions a clock on a multiprocessor.
        features: keys of `FEATURES`.
        source: where device, rates and bandwidth are published.
    """

    arch: int
    device: str
    multiprocessors: int
    clock: float
    bandwidth: int
    l2: int
    threads: int
    blocks: int
    shared: int
    tensor: Mapping[str, float]
    fp32_lanes: int
    int32_lanes: int
    special_lanes: int
    features: frozenset[str]
    source: str
    tensor_memory: int = 0
    registers: int = 65536
    issue: int = 4  # warp schedulers, each issues one instruction a clock

    @property
    def name(self) -> str:
        """``sm_80``."""
        return f"sm_{self.arch}"

    def supports(self, feature: str) -> bool:
        """Whether the architecture has an instruction.

        Args:
            feature: a key of `FEATURES`; another one raises `ValueError`.
        """
        if feature not in FEATURES:
            raise ValueError(f"feature={feature!r} is unknown; known: {', '.join(FEATURES)}")
        return feature in self.features

    def resident(self, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
        """How many programs one multiprocessor holds at a time; 0 if it cannot hold one.

        Args:
            warps: of one program.
            registers: of one thread; a warp takes them in units of 256 (CUDA occupancy calculator).
            shared: bytes of one program, without the 1 KiB that the system adds.
            tensor_memory: columns of one program.
        """
        by_registers = self.registers // (-(-registers * 32 // 256) * 256) // warps
        by_shared = self.shared * 1024 // (shared + 1024)
        by_tensor_memory = self.tensor_memory // tensor_memory if tensor_memory else self.blocks
        return min(self.blocks, self.threads // (32 * warps), by_registers, by_shared, by_tensor_memory)


_AMPERE = frozenset({"cp.async"})
_HOPPER = _AMPERE | {"fp8", "tma"}
_BLACKWELL = _HOPPER | {"e2m1"}

TARGETS: Mapping[int, Target] = {
    target.arch: target
    for target in (
        Target(
            arch=80,
            device="A100-SXM4-80GB",
            multiprocessors=108,
            clock=1.410,
            bandwidth=2039,
            l2=40,
            threads=2048,
            blocks=32,
            shared=164,
            tensor={"bf16": 312},
            fp32_lanes=64,
            int32_lanes=64,
            special_lanes=16,
            features=_AMPERE,
            source="NVIDIA A100 Tensor Core GPU datasheet (80GB SXM) and GA100 architecture whitepaper, table 4",
        ),
        Target(
            arch=86,
            device="RTX A6000",
            multiprocessors=84,
            clock=1.800,
            bandwidth=768,
            l2=6,
            threads=1536,
            blocks=16,
            shared=100,
            tensor={"bf16": 154.8},
            fp32_lanes=128,
            int32_lanes=64,
            special_lanes=16,
            features=_AMPERE,
            source="NVIDIA Ampere GA102 GPU architecture whitepaper, appendix on RTX A6000",
        ),
        Target(
            arch=89,
            device="L40S",
            multiprocessors=142,
            clock=2.520,
            bandwidth=864,
            l2=96,
            threads=1536,
            blocks=24,
            shared=100,
            tensor={"bf16": 362, "fp8": 733},
            fp32_lanes=128,
            int32_lanes=64,
            special_lanes=16,
            features=_AMPERE | {"fp8"},
            source="NVIDIA L40S datasheet (rates with sparsity halved) and Ada GPU architecture whitepaper (AD102)",
        ),
        Target(
            arch=90,
            device="H100 SXM",
            multiprocessors=132,
            clock=1.830,  # under tensor load, which is what its tensor rates assume; 1.98 otherwise
            bandwidth=3350,
            l2=50,
            threads=2048,
            blocks=32,
            shared=228,
            tensor={"bf16": 989.4, "fp8": 1978.9},
            fp32_lanes=128,
            int32_lanes=64,
            special_lanes=16,
            features=_HOPPER,
            source="NVIDIA H100 datasheet (SXM) and H100 Tensor Core GPU architecture whitepaper, table 2",
        ),
        Target(
            arch=100,
            device="B200",
            multiprocessors=148,
            clock=1.850,  # which its tensor rates imply: 8192 bf16 operations a clock on each multiprocessor
            bandwidth=8000,
            l2=126,
            threads=2048,
            blocks=32,
            shared=228,
            tensor_memory=512,
            tensor={"bf16": 2250, "fp8": 4500, "fp4": 9000},
            fp32_lanes=128,
            int32_lanes=128,
            special_lanes=16,
            features=_BLACKWELL | {"cvt.rs", "tcgen05"},
            source="NVIDIA Blackwell datasheet (HGX B200, a GPU) and CUDA Blackwell tuning guide, 1.4 (L2 and shared)",
        ),
        Target(
            arch=103,
            device="B300",
            multiprocessors=148,
            clock=1.850,
            bandwidth=8000,
            l2=126,
            threads=2048,
            blocks=32,
            shared=228,
            tensor_memory=512,
            tensor={"bf16": 2250, "fp8": 4500, "fp4": 13500},
            fp32_lanes=128,
            int32_lanes=128,
            special_lanes=32,
            features=_BLACKWELL | {"cvt.rs", "tcgen05"},
            source="NVIDIA Blackwell Ultra datasheet (HGX B300, a GPU) and 'Inside NVIDIA Blackwell Ultra', "
            "developer.nvidia.com/blog (128 cores for fp32 and int32, twice the special function units)",
        ),
        Target(
            arch=120,
            device="GeForce RTX 5090",
            multiprocessors=170,
            clock=2.407,
            bandwidth=1792,
            l2=96,
            threads=1536,
            blocks=24,
            shared=100,
            tensor={"bf16": 209.5, "fp8": 419, "fp4": 1676},
            fp32_lanes=128,
            int32_lanes=128,
            special_lanes=16,
            features=_BLACKWELL | {"omma"},
            source="NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A (GeForce RTX 5090)",
        ),
    )
}


def nearest(arch: int) -> Target:
    """The target of an architecture, or else the newest one that is not newer, or else the oldest.

    Args:
        arch: compute capability, 90 for 9.0. One that is not in `TARGETS` is warned about.
    """
    if arch in TARGETS:
        return TARGETS[arch]
    older = [known for known in TARGETS if known <= arch]
    target = TARGETS[max(older, default=min(TARGETS))]
    warnings.warn(f"sm_{arch} is no known target; its kernels are chosen as for {target.name}", stacklevel=2)
    return target
