"""Each architecture's features are those that the assembler has, and its limits give the occupancy of known cases."""

from __future__ import annotations

import subprocess

import pytest
import torch
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

from lotion_fx.kernels.device import target_of
from lotion_fx.kernels.targets import FEATURES, TARGETS, nearest

# The least PTX that uses a feature.
PTX = {
    "cp.async": "cp.async.cg.shared.global [s], [g], 16;",
    "fp8": "cvt.rn.satfinite.e4m3x2.f32 h, f, f;",
    "e2m1": "cvt.rn.satfinite.e2m1x2.f32 b, f, f;",
    "cvt.rs": "cvt.rs.satfinite.e2m1x4.f32 h, {f, f, f, f}, r;",
    "tma": "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [s], [g, {r, r}], [s];",
    "tcgen05": "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [s], 32;",
    "omma": "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 "
    "{f, f, f, f}, {r, r, r, r}, {r, r}, {f, f, f, f}, r, {h, h}, r, {h, h};",
}


EACH = [pytest.param(arch, marks=() if arch in (80, 100) else pytest.mark.slow) for arch in TARGETS]


def assembles(instruction: str, arch: int, folder) -> bool:
    version = "8.4" if arch < 90 else "8.8"
    source = folder / "feature.ptx"
    source.write_text(
        f""".version {version}
        .target {sm_arch_from_capability(arch)}
        .address_size 64
        .visible .entry feature() {{
            .reg .f32 f; .reg .b32 r, s; .reg .b16 h; .reg .b8 b; .reg .b64 g;
            {instruction}
            ret;
        }}"""
    )
    command = [get_ptxas(arch).path, f"-arch={sm_arch_from_capability(arch)}", str(source), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0 or "not supported" in log or "requires" in log, log  # no mistake in the PTX itself
    return done.returncode == 0


@pytest.mark.parametrize("arch", EACH)
def test_features_are_those_that_assemble(arch, tmp_path):
    found = {feature for feature in FEATURES if assembles(PTX[feature], arch, tmp_path)}
    assert found == {feature for feature in FEATURES if TARGETS[arch].supports(feature)}


def test_an_unknown_feature_is_an_error():
    with pytest.raises(ValueError, match="feature='e2m2' is unknown; known: cp.async, fp8"):
        TARGETS[80].supports("e2m2")


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "resident"),
    [
        # CUDA occupancy calculator
        (80, 8, 32, 0, 8),  # 2048 threads
        (80, 8, 128, 0, 2),
        (80, 4, 255, 0, 2),
        (80, 4, 40, 81 * 1024, 2),
        (80, 4, 40, 82 * 1024, 1),  # and 1 KiB each
        (80, 1, 16, 0, 32),
        (86, 8, 32, 0, 6),  # 1536 threads
        (86, 1, 16, 0, 16),
        (120, 1, 16, 0, 24),
        (90, 4, 168, 100 * 1024, 2),
        (80, 4, 40, 164 * 1024, 0),
    ],
)
def test_residency(arch, warps, registers, shared, resident):
    assert TARGETS[arch].resident(warps, registers, shared) == resident


def test_tensor_memory_limits_residency():
    assert TARGETS[100].resident(4, 32, 0, 512) == 1
    assert TARGETS[100].resident(4, 32, 0, 128) == 4


def test_rates_are_those_of_whole_multiprocessors():
    """A tensor core does a power of two of operations a clock, to two percent as rates and clocks are rounded."""
    for target in TARGETS.values():
        a_clock = target.tensor["bf16"] * 1e3 / target.multiprocessors / target.clock
        nearest_power = 2 ** round(torch.tensor(a_clock).log2().item())
        assert a_clock == pytest.approx(nearest_power, rel=0.02), target.name


def test_another_architecture_takes_the_nearest_older_one_and_says_so():
    for arch, known in ((87, 86), (110, 103), (121, 120), (75, 80)):
        with pytest.warns(UserWarning, match=f"sm_{arch} is no known target; its kernels are chosen as for sm_{known}"):
            assert nearest(arch).arch == known


def test_target_of_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert target_of(torch.device("cuda")).device == "H100 SXM"
