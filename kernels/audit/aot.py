"""Kernels compiled for an architecture on a machine without one, and what their machine code shows.

Triton's wheel brings NVIDIA's assemblers and disassembler, and these need no device. What is read from their output is
evidence, not a measurement: registers, spills, memory, vector widths and instructions are those of the cubin that would
run.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource
from triton.errors import TritonError

from lotion_fx.kernels.audit.kept import Kept
from lotion_fx.kernels.audit.work import Work
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.targets import TARGETS

# Prefixes of the SASS names that tell how a kernel was lowered: matrix products, asynchronous and tensor-map copies,
# matrix and tensor memory, conversions and transcendentals, atomics.
SPECIAL = (
    *("HMMA", "IMMA", "QMMA", "OMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA", "UTCCP"),
    *("LDGSTS", "UTMALDG", "UTMASTG", "UBLKCP", "LDSM", "STSM", "LDTM", "STTM"),
    *("F2FP", "F2F", "F2I", "I2F", "MUFU", "REDUX", "RED", "ATOM"),
)
_GLOBAL = ("LDG", "STG", "LDGSTS")
_TENSOR_MAP = ("UTMALDG", "UTMASTG", "UBLKCP")
_LOCAL = ("LDL", "STL")


class Refused(RuntimeError):
    """A kernel does not compile, or does not fit, for an architecture; the message says why."""


@dataclass(frozen=True)
class Evidence:
    """What the machine code of one kernel, config and architecture shows.

    Args:
        arch: compute capability, 80 for ``sm_80``.
        warps: of one program.
        registers: of one thread.
        spills: bytes that a thread stores to and loads from local memory for want of registers (``ptxas -v``).
        local: instructions that touch local memory (LDL, STL); more than zero also where an array was indexed.
        shared: bytes of shared memory of one program.
        tensor_memory: columns of tensor memory of one program.
        resident: programs that a multiprocessor holds at a time.
        occupancy: their share of the threads that it could hold.
        vector128: share of instructions that move 128 bits or more a thread among those that load from or store to
            global memory, a loop's as often as it runs; copies by tensor map count as wide. 1 for a kernel without any.
        opcodes: how often each SASS instruction stands in the code, by full name.
        once: those of them that run once, by full name.
        loop: those of the largest loop.
    """

    arch: int
    warps: int
    registers: int
    spills: int
    local: int
    shared: int
    tensor_memory: int
    resident: int
    occupancy: float
    vector128: float
    opcodes: Mapping[str, int]
    once: Mapping[str, int]
    loop: Mapping[str, int]

    @property
    def sass(self) -> int:
        """Instructions in the code, without the padding."""
        return sum(self.opcodes.values())

    @property
    def special(self) -> dict[str, int]:
        """The instructions of `SPECIAL`, by full name."""
        return {name: n for name, n in sorted(self.opcodes.items()) if base(name) in SPECIAL}

    def summary(self) -> dict[str, Any]:
        """What tables and baselines record."""
        return {
            "registers": self.registers,
            "spills": self.spills,
            "shared": self.shared,
            "tensor_memory": self.tensor_memory,
            "occupancy": round(self.occupancy, 3),
            "vector128": round(self.vector128, 3),
            "sass": self.sass,
            "instructions": self.special,
        }

    def lost(self, required: tuple[str, ...]) -> list[str]:
        """Those prefixes of SASS names that no instruction has."""
        return [prefix for prefix in required if not any(name.startswith(prefix) for name in self.opcodes)]


def base(opcode: str) -> str:
    """``LDG`` of ``LDG.E.128``."""
    return opcode.split(".", 1)[0]


def width(opcode: str) -> int:
    """Bits that one thread moves by a load or store, ``LDG.E.128``; 32 where its name carries none."""
    if base(opcode) in ("LDSM", "STSM"):  # ends in the number of registers, 1 of them unsaid
        matrices = opcode.rsplit(".", 1)[-1]
        return 32 * int(matrices) if matrices in ("2", "4") else 32
    found = re.search(r"\.[US]?(8|16|64|128|256)(?:\.|$)", opcode)
    return int(found[1]) if found else 32


def audit(work: Work, config: Config, arch: int) -> Evidence:
    """Compiles a kernel for an architecture and reads its machine code.

    Args:
        work: the kernel and its arguments.
        config: tile sizes, warps and stages.
        arch: a key of `TARGETS`.

    Raises:
        Refused: an instruction or type is missing, or a multiprocessor cannot hold one program. It names which.
    """
    with _quiet():
        found = _audited(_compilation(work, config, arch))
    if isinstance(found, str):
        raise Refused(f"{work.kernel} [{describe(config)}] for sm_{arch}: {found}")
    return replace(found, vector128=_wide_share(found, max(1, work.iterations(config))))


def _as_they_come(results: Iterable[Any], total: int) -> Iterable[Any]:
    return results


def compile_all(
    kernels: Iterable[tuple[Work, Config, int]],
    kept: Kept | None = None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = _as_they_come,
) -> None:
    """Compiles kernels on all processors at once, each distinct one once, for `audit` to find.

    Args:
        kernels: each with a config and an architecture.
        kept: where what was found stays from process to process; by default nowhere.
        progress: passes on what it is given as it comes, told how many there will be.
    """
    distinct = dict.fromkeys(_compilation(*kernel) for kernel in kernels)
    with _quiet(), ThreadPoolExecutor(os.cpu_count()) as pool:
        pending = [pool.submit(_audited, each, kept) for each in distinct]
        for done in progress(as_completed(pending), len(pending)):
            done.result()


class Compilation(NamedTuple):
    """All that decides what is compiled; see `Work` and `Config`."""

    fn: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    warps: int
    stages: int
    arch: int

    def source(self) -> ASTSource:
        """What Triton compiles."""
        names, constants, signature = self.fn.arg_names, dict(self.constants), dict(self.signature)
        types = {name: "constexpr" if name in constants else signature[name] for name in names}
        sixteen = [i for i, name in enumerate(names) if types[name].startswith("*") or name in self.aligned]
        return ASTSource(
            fn=self.fn,
            signature=types,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in sixteen},
        )

    def key(self) -> str:
        """A hash of the kernel's source, of all else here, of the compilers and of the code that reads their output."""
        parts = (self.source().hash(), self.warps, self.stages, self.arch, *_versions(self.arch))
        return hashlib.sha256(repr(parts).encode()).hexdigest()


@cache
def _versions(arch: int) -> tuple[str, ...]:
    reader = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return triton.__version__, get_ptxas(arch).version, reader


def _compilation(work: Work, config: Config, arch: int) -> Compilation:
    constants = {**work.constants, **config.constants}
    types = tuple(work.signature.items()), tuple(constants.items()), work.aligned
    return Compilation(work.fn, *types, config.num_warps, config.num_stages, arch)


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """On an error of ptxas Triton prints the whole PTX."""
    return contextlib.redirect_stdout(io.StringIO())


def describe(config: Config) -> str:
    """``ROWS=4 warps=8 stages=3``."""
    sizes = " ".join(f"{name}={value}" for name, value in config.constants.items())
    return f"{sizes} warps={config.num_warps} stages={config.num_stages}".strip()


_known: dict[Compilation, Evidence | str] = {}


def _audited(compilation: Compilation, kept: Kept | None = None) -> Evidence | str:
    """The evidence, or why there is none; shapes that differ in nothing of a compilation share it."""
    if compilation not in _known:
        key = compilation.key() if kept else ""
        found = _restored(kept.read(key)) if kept else None
        if found is None:
            found = _made(compilation)
            if kept:
                kept.write(key, found if isinstance(found, str) else vars(found))
        _known[compilation] = found
    return _known[compilation]


def _restored(found: Any) -> Evidence | str | None:
    """What was kept, unless it is of other fields than those of `Evidence`."""
    try:
        return Evidence(**found) if isinstance(found, dict) else found
    except TypeError:
        return None


def _made(compilation: Compilation) -> Evidence | str:
    try:
        kernel = _compiled(compilation)
    except TritonError as error:
        return _missing(str(error))
    return _evidence(kernel, compilation.arch)


def _compiled(compilation: Compilation) -> Any:
    # Said outright, as Triton warns that its default will change.
    options = {"num_warps": compilation.warps, "num_stages": compilation.stages, "enable_fp_fusion": True}
    return triton.compile(compilation.source(), target=GPUTarget("cuda", compilation.arch, 32), options=options)


def _missing(message: str) -> str:
    """The instruction or type that an error of Triton or ptxas complains about, else its last line."""
    for pattern in (r"(?:Instruction|Feature|Modifier) '[^']+' not supported", r"type \w+ not supported"):
        if found := re.search(pattern, message):
            return found[0]
    return message.strip().splitlines()[-1]


def _evidence(kernel: Any, arch: int) -> Evidence | str:
    target = TARGETS[arch]
    try:
        registers, code = _disassembled(kernel.asm["cubin"])
    except subprocess.CalledProcessError as error:
        return f"cuobjdump of triton {triton.__version__} does not read sm_{arch}: {error.stderr.strip()}"
    # Warp specialization launches more warps than the config names.
    threads = re.search(r"\.reqntid (\d+)", kernel.asm["ptx"])
    assert threads is not None, "Triton always states the size of a block"
    warps = int(threads[1]) // 32
    shared, tensor_memory = kernel.metadata.shared, kernel.metadata.tmem_size
    resident = target.resident(warps, registers, shared, tensor_memory)
    if not resident:
        return (
            f"a multiprocessor cannot hold one program of {warps} warps, {registers} registers, {shared} bytes of "
            f"shared memory and {tensor_memory} columns of tensor memory"
        )
    opcodes = Counter(opcode for _, opcode, _ in code if opcode != "NOP")
    local = sum(n for name, n in opcodes.items() if base(name) in _LOCAL)
    once, loop = _parts(code)
    return Evidence(
        arch=arch,
        warps=warps,
        registers=registers,
        # Spills touch local memory.
        spills=_spills(kernel.asm["ptx"], arch) if local else 0,
        local=local,
        shared=shared,
        tensor_memory=tensor_memory,
        resident=resident,
        occupancy=resident * warps * 32 / target.threads,
        vector128=1.0,  # `audit` knows how often the loop runs
        opcodes=opcodes,
        once=once,
        loop=loop,
    )


def _wide_share(evidence: Evidence, iterations: int) -> float:
    """`Evidence.vector128`, the loop's instructions counted as often as the loop runs."""
    (once_wide, once), (loop_wide, loop) = _widths(evidence.once), _widths(evidence.loop)
    moves = once + iterations * loop
    return (once_wide + iterations * loop_wide) / moves if moves else 1.0


def _widths(opcodes: Mapping[str, int]) -> tuple[int, int]:
    """How many instructions move 128 bits or more from or to global memory, and how many move any."""
    maps = sum(n for name, n in opcodes.items() if base(name) in _TENSOR_MAP)
    moves = {name: n for name, n in opcodes.items() if base(name) in _GLOBAL}
    return maps + sum(n for name, n in moves.items() if width(name) >= 128), maps + sum(moves.values())


def _spills(ptx: str, arch: int) -> int:
    """Bytes that a thread stores to and loads from local memory for want of registers, by the assembler's log."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [get_ptxas(arch).path, "-v", "--regAllocOptLevel=2", f"-arch={sm_arch_from_capability(arch)}"]
        command += [source.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", log)))


Instruction = tuple[str, str, str]  # its address in hexadecimal, name, and operands; a guard belongs to the operands


def _disassembled(cubin: bytes) -> tuple[int, list[Instruction]]:
    """Registers of a thread, and the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # The error stream holds notes on the format of the file alone.
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = max(map(int, re.findall(r"REG:(\d+)", text)))
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", text)
    return registers, [(at.lstrip("0") or "0", name, f"{guard}{rest}".strip()) for at, guard, name, rest in lines]


def _parts(code: list[Instruction]) -> tuple[Counter[str], Counter[str]]:
    """Instructions that run once, and those of the largest loop.

    A loop is a strongly connected component of the flow graph, so that a wait which the assembler moved behind the end
    counts in the loop that waits. Subroutines, which only the slow path of a division calls, count in neither; nor do
    waits in a loop of their own.
    """
    flow = nx.DiGraph(_edges(code))
    reached = nx.descendants(flow, 0) | {0}
    cycles = [part for part in nx.strongly_connected_components(flow.subgraph(reached)) if len(part) > 1]
    largest: set[int] = max(cycles, key=len, default=set())
    others = set().union(*cycles) - largest
    once = Counter(code[i][1] for i in reached - largest - others)
    loop = Counter(code[i][1] for i in largest)
    del once["NOP"], loop["NOP"]
    return once, loop


def _edges(code: list[Instruction]) -> Iterator[tuple[int, int]]:
    """From each instruction to those that may run next."""
    at = {address: i for i, (address, _, _) in enumerate(code)}
    for i, (_, name, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)$", operands) if base(name) == "BRA" else None
        if target:
            yield i, at[target[1].lstrip("0") or "0"]
        # A branch may also be guarded by a uniform predicate among its operands.
        ends = base(name) in ("EXIT", "RET", "BRX") and not operands.startswith("@")
        always = target is not None and operands == target[0]
        if not (ends or always) and i + 1 < len(code):
            yield i, i + 1
