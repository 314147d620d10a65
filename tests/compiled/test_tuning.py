"""The tuning table is read as it is kept, and decides what is launched; the checked-in one is of these kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import triton

from lotion_fx.kernels import tuning
from lotion_fx.kernels.audit import ranking
from lotion_fx.kernels.audit.work import Work
from lotion_fx.kernels.audit.works import catalog
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.targets import TARGETS
from tests.harness.samples import doubled, doubled_kernel

EVIDENCE = Path(__file__).with_name("evidence.json")
CONFIGS = doubled().configs


@pytest.fixture
def kept(monkeypatch):
    """A table in the place of the checked-in one."""
    content: dict = {}
    monkeypatch.setattr(tuning, "table", lambda: content)
    tuning._tuned.cache_clear()
    yield content
    tuning._tuned.cache_clear()


def test_the_tables_first_candidate_is_chosen(kept):
    kept["doubled"] = {"": {"sm_80": [CONFIGS[1].options, CONFIGS[0].options]}}
    assert tuning.choose("doubled", "", 80, CONFIGS) == CONFIGS[1]


def test_without_an_entry_the_first_candidate_is_chosen(kept):
    assert tuning.choose("doubled", "", 80, CONFIGS) == CONFIGS[0]
    assert tuning.choose("doubled", "", 80, CONFIGS[2:]) == CONFIGS[2]


def test_a_device_without_a_target_takes_the_nearest(kept):
    kept["doubled"] = {"": {"sm_120": [CONFIGS[1].options]}}
    with pytest.warns(UserWarning, match="sm_121 is no known target"):
        assert tuning.choose("doubled", "", 121, CONFIGS) == CONFIGS[1]


def test_by_default_the_kernel_itself_is_launched_with_the_choice(kept, monkeypatch):
    monkeypatch.delenv("LOTION_FX_AUTOTUNE", raising=False)
    fn, options = tuning.launchable(doubled_kernel, "doubled", "", 80, CONFIGS)
    assert fn is doubled_kernel
    assert options == {"SIZE": 1024, "num_warps": 4, "num_stages": 1}


def test_a_config_that_is_given_is_taken(kept, monkeypatch):
    monkeypatch.setenv("LOTION_FX_AUTOTUNE", "1")
    kept["doubled"] = {"": {"sm_80": [CONFIGS[1].options]}}
    fn, options = tuning.launchable(doubled_kernel, "doubled", "", 80, CONFIGS, config=CONFIGS[2])
    assert fn is doubled_kernel
    assert options == CONFIGS[2].options


def test_autotuning_times_the_tables_best_few(kept, monkeypatch):
    monkeypatch.setenv("LOTION_FX_AUTOTUNE", "1")
    many = [Config({"SIZE": 2**n}, 4, 1) for n in range(8, 13)]
    kept["doubled"] = {"": {"sm_80": [config.options for config in reversed(many)]}}
    fn, options = tuning.launchable(doubled_kernel, "doubled", "", 80, CONFIGS, key=("n",), writes=("y",))
    assert options == {}
    assert isinstance(fn, triton.runtime.Autotuner)
    assert (fn.keys, fn.restore_value) == (["n"], ["y"])
    fn.nargs = {"x": None, "y": None, "n": 4096}
    assert [config.kwargs["SIZE"] for config in fn.prune_configs({})] == [4096, 2048, 1024]
    # The same launch finds the same tuner, and with it what it timed before.
    assert tuning.launchable(doubled_kernel, "doubled", "", 80, CONFIGS, key=("n",), writes=("y",))[0] is fn


@pytest.mark.gpu
def test_a_device_keeps_one_of_the_best_few(monkeypatch):
    monkeypatch.setenv("LOTION_FX_AUTOTUNE", "1")
    x = torch.arange(2**20, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    fn, options = tuning.launchable(doubled_kernel, "doubled", "", 80, CONFIGS, key=("n",))
    fn[lambda meta: (triton.cdiv(x.numel(), meta["SIZE"]),)](x, y, x.numel(), **options)
    assert torch.equal(y, 2 * x)
    assert fn.best_config.kwargs["SIZE"] in [config.constants["SIZE"] for config in CONFIGS[: tuning.TOP]]


def test_options_are_a_config_there_and_back():
    config = Config({"SIZE": 256, "TILES": 2}, 8, 1)
    assert config.options == {"SIZE": 256, "TILES": 2, "num_warps": 8, "num_stages": 1}
    assert Config.of(config.options) == config


def entries(work: Work, arch: int) -> list[Config]:
    """The candidates that the checked-in table has for a kernel."""
    return list(map(Config.of, tuning.table().get(work.kernel, {}).get(work.shape_class, {}).get(f"sm_{arch}", ())))


@pytest.mark.parametrize("arch", TARGETS)
def test_the_checked_in_table_has_every_kernel_and_no_config_that_is_gone(arch):
    works, command = catalog(arch), f"run: lotion-fx kernels --tune --arch {TARGETS[arch].name}"
    stale = {w.kernel for w in works if any(config not in w.configs for config in entries(w, arch))}
    assert not stale, f"{command}; stale: {sorted(stale)}"
    missing = {work.kernel for work in works if not entries(work, arch)}
    assert not missing, f"{command}; missing: {sorted(missing)}"


def test_the_checked_in_table_is_what_the_evidence_ranks_first():
    """And no more than that: it is installed, and the evidence is not."""
    evidence = json.loads(EVIDENCE.read_text())
    assert tuning.table() == {
        kernel: {name: {arch: ranking.best(of) for arch, of in archs.items()} for name, archs in classes.items()}
        for kernel, classes in evidence.items()
    }
    assert len(tuning.TABLE.read_text()) < 84_000
