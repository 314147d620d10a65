"""Inductor's kernels are described with the programs, iterations and bytes that they will have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import triton

from lotion_fx.kernels.audit import table
from lotion_fx.kernels.emit import inductor_work
from lotion_fx.kernels.emit.emitted import Emitted
from lotion_fx.kernels.targets import TARGETS
from tests.harness.samples import doubled_kernel
from tests.harness.versions import needs_emission

SIGNATURE = {"in_ptr0": "*fp32", "out_ptr0": "*fp32", "xnumel": "i32", "r0_numel": "i32", "XBLOCK": "constexpr"}


def tuner(*configs: triton.Config) -> SimpleNamespace:
    """What Inductor makes of a kernel's source, as far as it is read."""
    return SimpleNamespace(
        fn=doubled_kernel,
        configs=list(configs),
        triton_meta={
            "signature": SIGNATURE,
            "constants": {},
            "configs": [{(0,): [["tt.divisibility", 16]], (2,): [["tt.divisibility", 16]]}],
        },
        inductor_meta={"grid_type": "Grid1D", "kernel_num_gb": 0.25},
    )


def test_a_looped_reduction():
    loop = triton.Config({"XBLOCK": 4, "R0_BLOCK": 2048}, num_warps=8, num_stages=1)
    work = inductor_work._work("step", "triton_red_fused_amax_3", tuner(loop), {"xnumel": 30, "r0_numel": 7900})
    (config,) = work.configs
    assert (work.kernel, work.shape) == ("emitted/step/red_fused_amax_3", "30x7900")
    assert (work.programs(config), work.iterations(config)) == (8, 4)
    assert work.bytes(config) == work.minimum_bytes == 250_000_000
    assert work.aligned == ("in_ptr0", "xnumel")


def test_the_lengths_are_a_launchs_last_numbers():
    numbers = inductor_work._numbers(SIGNATURE, ", 8192, 768")
    assert numbers == {"xnumel": 8192, "r0_numel": 768}


@pytest.mark.slow
@needs_emission
@pytest.mark.parametrize("arch", TARGETS)
def test_every_kernel_of_a_training_step_is_listed(arch):
    """Forward, backward and step, which hold nothing that spills."""
    found = table.rows([arch], "emitted/*")
    assert {row["kernel"].split("/")[1] for row in found} == {"forward", "backward", "step"}
    for row in found:
        assert row["spills"] == 0, row
        assert row["predicted_us"] > 0


@needs_emission
def test_a_launch_of_another_length_is_another_shape(monkeypatch):
    source = """
async_compile.triton('triton_poi_fused_0', '''code''', device_str='cuda')
    triton_poi_fused_0.run(buf0, reinterpret_tensor(buf1, (4, 4), (4, 1), 0), 64, 16, stream=stream0)
    triton_poi_fused_0.run(buf2, buf3, 64, 16, stream=stream0)
    triton_poi_fused_0.run(buf2, buf3, 128, 16, stream=stream0)
"""
    loaded = SimpleNamespace(triton_poi_fused_0=tuner(triton.Config({"XBLOCK": 64}, num_warps=4, num_stages=1)))
    monkeypatch.setattr(inductor_work.PyCodeCache, "load", lambda code: loaded)
    works = inductor_work._works(Emitted("forward", source, 0, 0), 80)
    assert [work.shape for work in works] == ["64x16", "128x16"]
