"""Runs the PTX of a kernel's ``tl.inline_asm_elementwise`` on NumPy arrays: its very text, operand order and packing.

An instruction is a function on its source registers, registered by a pattern on its opcode:

    register_asm(r"cvt\\.rn\\.satfinite\\.e2m1x2\\.f32", e2m1x2)       # e2m1x2(a, b) -> register

A register is an array of ``uint64``, one entry an instance of the block; a vector operand ``{a, b}`` is a tuple.

Reference: PTX ISA, "Data Movement and Conversion Instructions"; ``ElementwiseInlineAsmOp`` of Triton for the packing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch

Register = np.ndarray
Emulation = Callable[..., Register]

WIDTHS = {"r": 32, "f": 32, "h": 16, "l": 64, "d": 64, "c": 8}
"""Bits of a register by the letter of its constraint."""

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The value of each four-bit code."""

_INSTRUCTIONS: list[tuple[re.Pattern[str], Emulation]] = []


def register_asm(pattern: str, emulation: Emulation) -> None:
    """Adds an instruction.

    Args:
        pattern: a regular expression that its whole opcode, with types, matches. The latest registered wins.
        emulation: maps its source registers to the bits of its destination, whose width cuts them.
    """
    _INSTRUCTIONS.insert(0, (re.compile(pattern), emulation))


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _floats(register: Register) -> np.ndarray:
    return register.astype(np.uint32).view(np.float32)


def _e2m1(x: np.ndarray) -> Register:
    """Nearest code, ties to the even one, beyond 6 and NaN to 6: ``cvt.rn.satfinite`` to e2m1, which has no NaN."""
    magnitude = np.abs(x)
    between = (E2M1[:7] + E2M1[1:8]) / 2
    code = sum((magnitude > at) | ((magnitude == at) & bool(low % 2)) for low, at in enumerate(between))
    negative = np.signbit(x) & ~np.isnan(x)
    return np.where(np.isnan(x), 7, code + 8 * negative).astype(np.uint64)


def _e4m3(x: np.ndarray) -> Register:
    """Nearest code, ties to even, beyond 448 to 448: ``cvt.rn.satfinite`` to e4m3; NaN is 0x7f."""
    code = torch.from_numpy(np.clip(x, -448, 448)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return np.where(np.isnan(x), 0x7F, code).astype(np.uint64)


def _halves(high: np.ndarray, low: np.ndarray) -> Register:
    """Two values as ``f16x2``, exact for the narrower types."""
    bits = [v.astype(np.float16).view(np.uint16).astype(np.uint64) for v in (high, low)]
    return bits[0] << np.uint64(16) | bits[1]


def _e4m3_values(register: Register) -> np.ndarray:
    return torch.from_numpy(register.astype(np.uint8)).view(torch.float8_e4m3fn).float().numpy()


_8, _4 = np.uint64(8), np.uint64(4)
# The first source fills the upper half.
register_asm(r"cvt\.rn\.satfinite\.e2m1x2\.f32", lambda a, b: _e2m1(_floats(a)) << _4 | _e2m1(_floats(b)))
register_asm(r"cvt\.rn\.satfinite\.e4m3x2\.f32", lambda a, b: _e4m3(_floats(a)) << _8 | _e4m3(_floats(b)))
register_asm(r"cvt\.rn\.f16x2\.e2m1x2", lambda a: _halves(E2M1[a >> _4 & _mask(4)], E2M1[a & _mask(4)]))
register_asm(r"and\.b32", lambda a, b: a & b)
register_asm(r"or\.b32", lambda a, b: a | b)
register_asm(r"add\.u32", lambda a, b: a + b & _mask(32))
register_asm(
    r"cvt\.f32\.f16",
    lambda a: a.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32).astype(np.uint64),
)
register_asm(r"cvt\.rn\.f16x2\.e4m3x2", lambda a: _halves(_e4m3_values(a >> _8), _e4m3_values(a)))
register_asm(r"and\.b\d+", np.bitwise_and)
register_asm(r"or\.b\d+", np.bitwise_or)
register_asm(r"xor\.b\d+", np.bitwise_xor)
# PTX clamps the shift where C does not define it; numpy gives 0 from 64 on, and narrower results are cut.
register_asm(r"shl\.b\d+", np.left_shift)
register_asm(r"shr\.[bu]\d+", np.right_shift)
register_asm(r"cvt\.u\d+\.u8", lambda a: a & _mask(8))
register_asm(r"cvt\.u\d+\.u16", lambda a: a & _mask(16))
register_asm(r"cvt\.u\d+\.u32", lambda a: a & _mask(32))


def run(
    asm: str, constraints: str, operands: Sequence[np.ndarray], results: Sequence[np.dtype], pack: int
) -> list[np.ndarray]:
    """Executes a block for every element.

    Args:
        asm: the text, operands as ``$0``.
        constraints: one a register, results first: ``"=r,r,r"``.
        operands: arrays of one shape.
        results: the NumPy types of the results.
        pack: elements an instance of the block processes; those narrower than 32 bits share a register.

    Raises:
        NotImplementedError: for an instruction that nobody registered, a predicate, or a constraint not in `WIDTHS`.
        ValueError: where the constraints do not name as many registers as the operands and results fill.
    """
    letters = [c.strip().lstrip("=&") for c in constraints.split(",")]
    if unknown := [letter for letter in letters if letter not in WIDTHS]:
        raise NotImplementedError(f"inline asm constraints {unknown}: expected one of {sorted(WIDTHS)}")
    block = _Block({f"${i}": WIDTHS[letter] for i, letter in enumerate(letters)})
    n_results = sum(pack // _shared(dtype, pack) for dtype in results)
    inputs = [register for operand in operands for register in _pack(operand, pack)]
    if n_results + len(inputs) != len(letters):
        raise ValueError(
            f"inline asm constraints {constraints!r} name {len(letters)} registers; "
            f"{n_results} results and {len(inputs)} operands were expected"
        )
    block.registers.update({f"${n_results + i}": register for i, register in enumerate(inputs)})
    for statement in _statements(asm):
        block.execute(statement)
    outputs = iter(block.registers[f"${i}"] for i in range(n_results))
    shape = operands[0].shape
    return [_unpack([next(outputs) for _ in range(pack // _shared(d, pack))], d, pack, shape) for d in results]


def _shared(dtype: np.dtype, pack: int) -> int:
    """Elements that share one register."""
    return min(pack, max(1, 32 // (8 * dtype.itemsize)))


def _pack(operand: np.ndarray, pack: int) -> list[Register]:
    """The registers that hold one operand, the first element lowest; zeros fill the last instance."""
    bits, shared = 8 * operand.dtype.itemsize, _shared(operand.dtype, pack)
    flat = np.ascontiguousarray(operand).reshape(-1).view(f"uint{bits}").astype(np.uint64)
    lanes = np.pad(flat, (0, -len(flat) % pack)).reshape(-1, pack)
    return [
        sum((lanes[:, at + k] << np.uint64(bits * k) for k in range(shared)), start=np.uint64(0))
        for at in range(0, pack, shared)
    ]


def _unpack(registers: list[Register], dtype: np.dtype, pack: int, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `_pack`."""
    bits, shared = 8 * dtype.itemsize, _shared(dtype, pack)
    lanes = [register >> np.uint64(bits * k) & _mask(bits) for register in registers for k in range(shared)]
    flat = np.stack(lanes, axis=-1).reshape(-1)[: int(np.prod(shape))]
    return flat.astype(f"uint{bits}").view(dtype).reshape(shape)


def _statements(asm: str) -> list[str]:
    """The statements without comments and without the braces of scopes, none of which begins with a vector operand."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", asm, flags=re.S)
    found = (re.sub(r"^[\s{}]+", "", statement).strip() for statement in text.split(";"))
    return [statement for statement in found if statement]


class _Block:
    """The registers of one block."""

    def __init__(self, widths: dict[str, int]) -> None:
        self.widths = widths
        self.registers: dict[str, Register] = {}

    def execute(self, statement: str) -> None:
        opcode, _, rest = statement.partition(" ")
        if opcode == ".reg":
            return self._declare(rest)
        destination, *sources = re.findall(r"\{[^}]*\}|[^,{}\s]+", rest)
        values = [self._read(source) for source in sources]
        if opcode.startswith("mov."):
            return self._write(destination, self._concatenated(sources[0]))
        for pattern, emulation in _INSTRUCTIONS:
            if pattern.fullmatch(opcode):
                return self._write(destination, np.asarray(emulation(*values), np.uint64))
        raise NotImplementedError(f"inline asm instruction {opcode!r}: add it with register_asm(pattern, emulation)")

    def _declare(self, text: str) -> None:
        kind, names = text.strip().split(None, 1)
        for name in names.split(","):
            stem, _, count = name.strip().rstrip(">").partition("<")
            for one in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                self.widths[one] = int(re.sub(r"\D", "", kind))

    def _names(self, operand: str) -> list[str]:
        return [name.strip() for name in operand.strip("{}").split(",")]

    def _read(self, operand: str) -> Register | tuple[Register, ...]:
        if operand.startswith("{"):
            return tuple(self._one(name) for name in self._names(operand))
        return self._one(operand)

    def _one(self, name: str) -> Register:
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", name):
            return np.uint64(int(name[2:], 16))
        if re.fullmatch(r"-?\d\w*", name):
            return np.uint64(int(name, 0) % (1 << 64))
        if name not in self.registers:
            raise ValueError(f"inline asm reads the register {name!r} before anything was written to it")
        return self.registers[name]

    def _concatenated(self, operand: str) -> Register:
        """``{a, b}`` as one value, the first lowest."""
        value, at = np.uint64(0), 0
        for name in self._names(operand):
            value, at = value | self._one(name) << np.uint64(at), at + self.widths.get(name, 64)
        return value

    def _write(self, operand: str, value: Register) -> None:
        at = 0
        for name in self._names(operand):
            if name == "_":  # a sink as wide as the others
                at += self.widths[next(n for n in self._names(operand) if n != "_")]
                continue
            self.registers[name] = value >> np.uint64(at) & _mask(self.widths[name])
            at += self.widths[name]
