"""The cost model's parts, each on a case where one resource alone decides and its time is known by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lotion_fx.kernels.audit.aot import Evidence
from lotion_fx.kernels.audit.cost import ACHIEVABLE, CACHE, LATENCY, START, executed, predict, roofline
from lotion_fx.kernels.audit.work import Work
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.targets import TARGETS

A100 = TARGETS[80]
CONFIG = Config({}, 4, 1)
WAVE = 108 * 16  # programs that an A100 holds


def work(programs: int, moved: int, minimum: int, flops: int = 0) -> Work:
    return Work(
        kernel="sample",
        shape="",
        fn=None,
        signature={},
        constants={},
        configs=(CONFIG,),
        programs=lambda config: programs,
        bytes=lambda config: moved,
        minimum_bytes=minimum,
        tensor_flops={"bf16": flops},
    )


def evidence(resident: int = 16, once: dict[str, int] | None = None, loop: dict[str, int] | None = None) -> Evidence:
    once, loop = once or {}, loop or {}
    return Evidence(
        arch=80,
        warps=4,
        registers=32,
        spills=0,
        local=0,
        shared=0,
        tensor_memory=0,
        resident=resident,
        occupancy=resident / 16,
        vector128=1.0,
        opcodes={**once, **loop},
        once=once,
        loop=loop,
    )


def test_memory_takes_bytes_over_what_can_be_had_of_the_bandwidth():
    # 2 x 16 bytes a thread are 64 KiB in flight on each multiprocessor, more than it needs.
    prediction = predict(work(WAVE, 0, 10**9), CONFIG, evidence(once={"LDG.E.128": 2}), A100)
    assert prediction.us - START == pytest.approx(1e9 / (2039e3 * ACHIEVABLE), rel=0.01)
    assert prediction.bound_by == "memory"


def test_few_loads_in_flight_wait_for_memory():
    one = evidence(resident=1, once={"LDG.E": 1})  # 128 threads of 4 bytes on each of 108
    prediction = predict(work(108, 0, 10**7), CONFIG, one, A100)
    assert prediction.us - START == pytest.approx(1e7 / (108 * 128 * 4 / LATENCY), rel=0.01)
    assert prediction.bound_by == "latency"


def test_loads_of_a_loop_wait_together_across_its_stages():
    loop = evidence(resident=1, loop={"LDGSTS.E.BYPASS.128": 1})
    few, many = (predict(work(108, 0, 10**8), Config({}, 4, stages), loop, A100).us - START for stages in (2, 4))
    assert few == pytest.approx(3 * many, rel=0.01)


def test_loads_into_registers_wait_for_one_iteration_at_a_time():
    loop = evidence(resident=1, loop={"LDG.E.128": 1})
    moved = work(108, 0, 10**8)
    assert predict(moved, Config({}, 4, 4), loop, A100) == predict(moved, CONFIG, loop, A100)


def test_bytes_read_again_cost_the_cache():
    prediction = predict(work(WAVE, 10**9, 0), CONFIG, evidence(), A100)
    assert prediction.us - START == pytest.approx(1e9 / (108 * CACHE * 1.41e3), rel=0.01)
    assert prediction.bound_by == "cache"


def test_products_take_flops_over_the_rate():
    prediction = predict(work(WAVE, 0, 0, flops=312 * 10**9), CONFIG, evidence(), A100)
    assert prediction.us - START == pytest.approx(1000)
    assert prediction.bound_by == "tensor"
    assert prediction.share_of_roofline == pytest.approx(1000 / (1000 + START))


@pytest.mark.parametrize(
    ("opcode", "a_clock", "pipe"),
    # lanes of an A100's multiprocessor over the 32 of a warp
    [
        ("FFMA", 2, "fp32"),
        ("LOP3.LUT", 2, "int32"),
        ("MUFU.EX2", 0.5, "special"),
        ("SHFL.BFLY", 1, "shared"),
        ("LDS.128", 0.25, "shared"),
        ("UMOV", 4, "issue"),
    ],
)
def test_instructions_take_their_pipes_cycles(opcode, a_clock, pipe):
    prediction = predict(work(108, 0, 0), CONFIG, evidence(resident=1, once={opcode: 1000}), A100)
    assert prediction.bound_by == pipe
    assert prediction.us - START == pytest.approx(4 * 1000 / a_clock / 1410)


def test_a_loops_instructions_count_as_often_as_it_runs():
    found = evidence(once={"MOV": 3}, loop={"FFMA": 2, "MOV": 1})
    assert executed(found, 10) == {"MOV": 13, "FFMA": 20}


def test_one_program_too_many_takes_a_wave_of_its_own():
    products = work(WAVE, 0, 0, flops=WAVE * 10**8)
    one_more = work(WAVE + 1, 0, 0, flops=(WAVE + 1) * 10**8)
    full = predict(products, CONFIG, evidence(), A100).us - START
    # The last one has a multiprocessor to itself, which had 16 before.
    assert predict(one_more, CONFIG, evidence(), A100).us - START == pytest.approx(full * 17 / 16)


@pytest.mark.parametrize("resident", [1, 2, 16])
def test_what_does_not_overlap_is_a_programs_share(resident):
    programs = 108 * resident
    both = work(programs, 0, programs * 10**5, flops=programs * 10**8)  # memory and products
    memory, products = programs * 1e5 / (2039e3 * ACHIEVABLE), programs * 1e8 / 312e6
    us = predict(both, CONFIG, evidence(resident, {"LDG.E.128": 12}), A100).us - START
    assert us == pytest.approx(max(memory, products) + min(memory, products) / resident, rel=0.01)


def test_the_roofline_is_the_larger_of_both():
    assert roofline(work(1, 0, 2039 * 10**6), A100) == pytest.approx(1000)
    assert roofline(work(1, 0, 2039 * 10**6, flops=624 * 10**9), A100) == pytest.approx(2000)


def test_products_of_a_type_without_an_instruction_run_as_bf16():
    fp4 = replace(work(1, 0, 0), tensor_flops={"fp4": 312 * 10**9})
    assert roofline(fp4, A100) == pytest.approx(1000)
    assert roofline(fp4, TARGETS[100]) == pytest.approx(312e9 / 9000e6)
