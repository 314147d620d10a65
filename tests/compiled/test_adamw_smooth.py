"""The machine code of AdamW's pass with the term: no spills, and weights and moments move by 128 bits a thread."""

import re

import pytest

from lotion_fx.kernels.adamw_smooth import CONFIGS, FACTORS
from lotion_fx.kernels.audit.aot import audit, width
from lotion_fx.kernels.audit.models import MIDDLE
from lotion_fx.kernels.audit.weight_works import adamw_smooth, adamw_works
from lotion_fx.kernels.audit.work import Work

ARCHS = [80, 100, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (86, 89, 90, 103, 120))]
NAMES = ["nvfp4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mxfp4", "int4"))]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_all_weights_gradients_and_moments_move_by_128_bits(name: str, dtype: str, arch: int) -> None:
    config, size, two_level = CONFIGS[0], {"fp32": 4, "bf16": 2}[dtype], name == "nvfp4"
    evidence = audit(adamw_smooth(MIDDLE, name, dtype), config, arch)
    assert evidence.spills == evidence.local == 0
    assert evidence.vector128 >= 0.9
    once, loop = (
        {op: n for op, n in part.items() if re.match(r"LDG|STG|REDG?\.|ATOM", op)}
        for part in (evidence.once, evidence.loop)
    )
    # Instructions a thread for each of w, g, m and v in a tile.
    each = config.constants["TILE"] * size // (config.num_warps * 32 * 16)
    assert all(width(op) == 128 for op in loop)
    assert sum(n for op, n in loop.items() if op.startswith("LDG")) == 4 * each
    assert sum(n for op, n in loop.items() if op.startswith("STG")) == sum(loop.values()) - 4 * each == 3 * each
    # The rest are one program's entries in the tables, the same for all its threads and tiles.
    loads = sum(n for op, n in once.items() if op.startswith("LDG"))
    assert loads == 1 + 6 + len(FACTORS) + two_level
    assert sum(once.values()) == loads + two_level


@pytest.mark.parametrize("work", adamw_works(80), ids=lambda work: work.shape)
def test_the_tables_are_next_to_nothing_among_the_bytes(work: Work) -> None:
    """And the rest is what `torch._fused_adamw_` moves."""
    model, dtype, _ = work.shape.split()
    elements = {
        "150M": 12 * (4 * 768 * 768 + 2 * 768 * 3072),
        "8B": 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 4096 * 14336),
    }
    elements["70B"] = 80 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 8192 * 28672)
    fused = elements[model] * 7 * {"fp32": 4, "bf16": 2}[dtype]
    assert fused < work.minimum_bytes < work.bytes(CONFIGS[0]) < 1.001 * fused
