"""The machine code of AdamW's pass with the term: no spills, and weights and moments move by 128 bits a thread."""

import re

import pytest

from lotion_fx.kernels.adamw_smooth import CONFIGS, FACTORS, works
from lotion_fx.kernels.aot import audit, width

ARCHS = [80, 120, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (86, 90, 100, 103))]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("shape", ["8B fp32 nvfp4", "8B bf16 nvfp4", "8B fp32 int4"])
def test_all_weights_gradients_and_moments_move_by_128_bits(shape: str, arch: int) -> None:
    (work,) = (work for work in works(arch) if work.shape == shape)
    config, size = CONFIGS[0], 2 if "bf16" in shape else 4
    evidence = audit(work, config, arch)
    assert evidence.spills == evidence.local == 0
    each = (
        config.constants["TILE"] * size // (config.num_warps * 32 * 16)
    )  # instructions a thread for each of w, g, m, v
    moves = {op: n for op, n in evidence.opcodes.items() if re.match("LDG|STG|RED|ATOM", op)}
    loads = {op: n for op, n in moves.items() if op.startswith("LDG")}
    stores = {op: n for op, n in moves.items() if op.startswith("STG")}
    assert sum(n for op, n in loads.items() if width(op) == 128) == 4 * each
    assert sum(n for op, n in stores.items() if width(op) == 128) == sum(stores.values()) == 3 * each
    two_level = "nvfp4" in shape
    # The rest are one program's entries in the tables, the same for all its threads.
    assert sum(loads.values()) == 4 * each + 1 + 6 + len(FACTORS) + two_level
    assert sum(moves.values()) == sum(loads.values()) + sum(stores.values()) + two_level


@pytest.mark.parametrize("work", works(80), ids=lambda work: work.shape)
def test_the_tables_are_a_hundredth_of_the_bytes(work) -> None:
    """And the rest is what `torch._fused_adamw_` moves."""
    model, dtype, _ = work.shape.split()
    elements = {
        "150M": 12 * (4 * 768 * 768 + 2 * 768 * 3072),
        "8B": 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 4096 * 14336),
    }
    elements["70B"] = 80 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 8192 * 28672)
    fused = elements[model] * 7 * {"fp32": 4, "bf16": 2}[dtype]
    assert fused < work.minimum_bytes < 1.0001 * fused
    assert fused < work.bytes(CONFIGS[0]) < 1.013 * fused
