"""The gate passes on the tree, and fails on a spill, a lost instruction, a rise of registers that really are there."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import triton
import triton.language as tl

from lotion_fx.kernels.audit import table
from lotion_fx.kernels.audit.work import Work
from lotion_fx.kernels.audit.works import catalog
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.targets import TARGETS
from tests.compiled import gate
from tests.harness.samples import doubled, product

ARCHS = (80, 100)


def baseline_of(work: Work, arch: int) -> gate.Baseline:
    return gate.updated([(work, work.configs[0], arch)], {})


def faults(work: Work, arch: int, config: Config, baseline: gate.Baseline) -> str:
    return "\n".join(gate.faults(work, config, arch, baseline))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("work", [doubled(), product()], ids=lambda work: work.kernel)
def test_an_unchanged_kernel_passes(work, arch):
    assert not faults(work, arch, work.configs[0], baseline_of(work, arch))


@pytest.mark.parametrize("arch", [80, pytest.param(100, marks=pytest.mark.slow)])
def test_a_planted_spill_fails(arch):
    work = product()
    # 256 x 256 sums on 4 warps are 512 registers a thread. On sm_100 they pass through registers at the end.
    config = Config({"BM": 256, "BN": 256, "BK": 32}, 4, 2)
    assert "spills" in faults(work, arch, config, {})
    assert "spills" not in faults(work, arch, work.configs[0], {})


@triton.jit
def product_without_dot(x, w, y, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K):
        left, right = tl.load(x + m * K + k), tl.load(w + n * K + k)
        total += left[:, None].to(tl.float32) * right[None].to(tl.float32)
    tl.store(y + m[:, None] * N + n[None], total.to(tl.bfloat16))


@pytest.mark.parametrize(("arch", "instruction"), [(80, "HMMA"), (100, "UTCHMMA")])
def test_a_planted_lost_instruction_fails(arch, instruction):
    work = replace(product(), fn=product_without_dot)
    assert f"has no {instruction} instruction" in faults(work, arch, Config({"BM": 32, "BN": 32, "BK": 1}, 4), {})


@triton.jit
def doubled_late(x, y, n, SIZE: tl.constexpr):
    """As `doubled_kernel`, but holds the tile of four programs before it stores the first."""
    i = tl.program_id(0) * 4 * SIZE + tl.arange(0, SIZE)
    a, b, c, d = tl.load(x + i), tl.load(x + SIZE + i), tl.load(x + 2 * SIZE + i), tl.load(x + 3 * SIZE + i)
    total = a + b + c + d
    tl.store(y + i, a * total)
    tl.store(y + SIZE + i, b * total)
    tl.store(y + 2 * SIZE + i, c * total)
    tl.store(y + 3 * SIZE + i, d * total)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_planted_rise_of_registers_fails(arch):
    work = doubled()
    config, baseline = work.configs[0], baseline_of(work, arch)
    assert "registers" in faults(replace(work, fn=doubled_late), arch, config, baseline)


def test_narrow_loads_and_less_occupancy_fail():
    work = doubled()
    baseline = baseline_of(work, 80)
    assert "vector128 1.0 -> 0.0" in faults(work, 80, work.configs[2], baseline)  # two elements a thread
    assert "occupancy" in faults(work, 80, Config({"SIZE": 16384}, 4, 1), baseline)


def test_a_planted_narrow_load_fails_without_a_baseline():
    """Two elements a thread, of a kernel that is held to wide ones."""
    work = replace(doubled(), wide=0.9)
    assert "moves 128 bits by 0.000 of its accesses, expected 0.9" in faults(work, 80, work.configs[2], {})
    assert "128 bits" not in faults(work, 80, work.configs[0], {})


def test_a_kernel_without_an_entry_fails():
    work, new = doubled(), replace(doubled(), shape="another")
    assert "is not in the baseline" in faults(new, 80, work.configs[0], baseline_of(work, 80))


def test_a_kernel_that_does_not_compile_fails():
    work = replace(doubled(), signature={"x": "*fp8e4nv", "y": "*fp8e4nv", "n": "i32"})
    assert "type fp8e4nv not supported" in faults(work, 80, work.configs[0], {})


def test_what_is_written_is_read_back():
    baseline = {"torch 1, triton 1, ptxas 1": {"b": {"registers": 1}, "a": {"registers": 2}}, "torch 2": {"a": {}}}
    assert json.loads(gate.written(baseline)) == baseline
    assert len(gate.written(baseline).splitlines()) == 9


def test_other_versions_are_named_and_held_to_the_absolute_rules():
    work = product()
    baseline = {"torch 1.0, triton 1.0, ptxas 1.0": {gate.key(work, 80): {"registers": 1}}}
    assert gate.versions(80) in (gate.without_baseline([80], baseline) or "")
    assert not faults(work, 80, work.configs[0], baseline)
    assert gate.without_baseline([80], baseline_of(work, 80)) is None


def representative(arch: int) -> list[Work]:
    """One shape of each module's first kernel."""
    first: dict[str, Work] = {}
    for work in catalog(arch):
        first.setdefault(work.kernel.split("/")[0], work)
    return list(first.values())


def check(works: list[Work], arch: int) -> None:
    baseline = gate.load()
    found = [fault for work in works for fault in gate.faults(work, table.choose(work, arch), arch, baseline)]
    assert not found, "\n".join(found)
    if sentence := gate.without_baseline([arch], baseline):
        pytest.skip(sentence)


@pytest.mark.parametrize("arch", ARCHS)
def test_some_kernels_of_the_tree_pass(arch):
    check(representative(arch), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_all_kernels_of_the_tree_pass(arch):
    check(catalog(arch), arch)
