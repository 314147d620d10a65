"""What is read from machine code, on kernels whose code is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import triton
import triton.language as tl

from lotion_fx.kernels.audit import aot
from lotion_fx.kernels.audit.aot import Refused, audit, width
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.targets import TARGETS
from tests.harness.samples import doubled, product

SLOW = pytest.mark.slow


@pytest.mark.parametrize("arch", [80, 100])
def test_a_streaming_kernel_moves_128_bits_a_thread_and_runs_each_instruction_once(arch):
    work = doubled()
    evidence = audit(work, work.configs[0], arch)
    assert evidence.vector128 == 1
    assert evidence.opcodes["LDG.E.128"] == evidence.opcodes["STG.E.128"] == 1
    assert not evidence.loop
    # All but the endless loop behind the end.
    assert sum(evidence.once.values()) == evidence.sass - 1
    assert (evidence.spills, evidence.local, evidence.shared, evidence.occupancy) == (0, 0, 0, 1)


def test_two_elements_a_thread_are_a_narrow_load():
    evidence = audit(doubled(), doubled().configs[2], 80)
    assert evidence.vector128 == 0
    assert evidence.opcodes["LDG.E"] == 1


@pytest.mark.parametrize(
    ("arch", "instruction"),
    [
        (80, "HMMA.16816"),
        (100, "UTCHMMA"),
        pytest.param(90, "HGMMA", marks=SLOW),
        pytest.param(120, "HMMA", marks=SLOW),
    ],
)
def test_a_matrix_product_and_its_loop(arch, instruction):
    work = product()
    evidence = audit(work, work.configs[0], arch)
    assert not evidence.lost(work.requires[arch])
    assert any(name.startswith(instruction) for name in evidence.special)
    # Of 128 x 128 x 64 products: 16 x 8 x 16 for a warp by HMMA, 64 x 128 x 16 by HGMMA, 128 x 128 x 16 by UTCHMMA.
    each = {80: 128, 120: 128, 90: 8, 100: 4}[arch]
    assert sum(n for name, n in evidence.loop.items() if name.startswith(instruction)) == each
    # 16-byte copies of both tiles, two of them ahead: the loop has one.
    assert sum(n for name, n in evidence.loop.items() if name.startswith("LDGSTS")) == (128 * 64 * 2 * 2) // (128 * 16)


def test_spilled_bytes_are_those_of_the_local_loads_and_stores():
    evidence = audit(product(), Config({"BM": 256, "BN": 256, "BK": 32}, 4, 2), 80)
    local = {name: n for name, n in evidence.opcodes.items() if name.startswith(("LDL", "STL"))}
    assert evidence.local == sum(local.values()) > 0
    # Registers are spilled one by one or several at a time.
    assert evidence.spills == sum(n * width(name) // 8 for name, n in local.items())


@triton.jit
def divided_kernel(x, y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, tl.div_rn(tl.load(x + i), tl.load(x + SIZE + i)))


def test_a_division_slow_path_is_not_counted_as_executed():
    work = replace(doubled(), fn=divided_kernel, signature={"x": "*fp32", "y": "*fp32"}, aligned=())
    evidence = audit(work, Config({"SIZE": 128}), 80)
    # The subroutine alone takes more than half of the code.
    assert sum(evidence.once.values()) < evidence.sass / 2
    assert not evidence.loop


def test_a_missing_type_is_named():
    work = replace(doubled(), signature={"x": "*fp8e4nv", "y": "*fp8e4nv", "n": "i32"})
    with pytest.raises(Refused, match=r"doubled \[SIZE=1024 warps=4 stages=1\] for sm_80: type fp8e4nv not supported"):
        audit(work, work.configs[0], 80)


@triton.jit
def coded_kernel(x, y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    code = tl.inline_asm_elementwise(
        "{ .reg .b8 t; cvt.rn.satfinite.e2m1x2.f32 t, $1, $1; cvt.u32.u8 $0, t; }",
        "=r,r",
        [tl.load(x + i)],
        tl.uint32,
        True,
        1,
    )
    tl.store(y + i, code)


def test_a_missing_instruction_is_named():
    work = replace(doubled(), fn=coded_kernel, signature={"x": "*fp32", "y": "*u32"}, aligned=())
    config = Config({"SIZE": 128})
    with pytest.raises(Refused, match="cvt.*e2m1x2.* not supported"):
        audit(work, config, 90)
    assert any("E2M1" in name for name in audit(work, config, 100).special)


def test_a_program_too_large_for_a_multiprocessor_is_refused():
    with pytest.raises(Refused, match="cannot hold one program of .* bytes of shared memory"):
        audit(product(), Config({"BM": 128, "BN": 256, "BK": 128}, 8, 4), 86)


def test_shapes_that_compile_alike_share_one_compilation(monkeypatch):
    audit(product(), product().configs[0], 80)
    monkeypatch.setattr(aot, "_compiled", None)
    audit(product(8192, 8192, 8192), product().configs[0], 80)


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [
        ("LDG.E", 32),
        ("LDG.E.128", 128),
        ("LDG.E.U8.CONSTANT", 8),
        ("LDG.E.U16", 16),
        ("LDGSTS.E.BYPASS.LTC128B.128", 128),
        ("STG.E.64", 64),
        ("LDG.E.ENL2.256", 256),
        ("LDSM.16.M88.4", 128),
        ("LDSM.16.MT88", 32),
    ],
)
def test_width(opcode, bits):
    assert width(opcode) == bits


@pytest.mark.parametrize("arch", [arch if arch in (80, 100) else pytest.param(arch, marks=SLOW) for arch in TARGETS])
def test_every_target_is_one_that_compiles(arch):
    assert audit(doubled(), doubled().configs[0], arch).registers > 0
