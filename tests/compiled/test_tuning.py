"""The tuning table is read, made and kept as its readers expect."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import triton

from lotion_fx.kernels import tuning
from lotion_fx.kernels.audit import ranking, table
from lotion_fx.kernels.targets import TARGETS
from lotion_fx.kernels.work import Config, Work
from tests.harness.samples import doubled, doubled_kernel, product

CONFIGS = doubled().configs


@pytest.fixture
def kept(monkeypatch):
    """A table in the place of the checked-in one."""
    content: dict = {}
    monkeypatch.setattr(tuning, "table", lambda: content)
    tuning._tuned.cache_clear()
    yield content
    tuning._tuned.cache_clear()


def entry(config: Config, **more: object) -> dict:
    return {"config": asdict(config), **more}


def test_the_tables_first_candidate_is_chosen(kept):
    kept["doubled"] = {"": {"sm_80": [entry(CONFIGS[1]), entry(CONFIGS[0])]}}
    assert tuning.choose("doubled", "", 80, CONFIGS) == CONFIGS[1]


def test_without_an_entry_the_modules_first_config_is_chosen(kept, monkeypatch):
    assert tuning.choose("doubled", "", 80, CONFIGS) == CONFIGS[0]
    monkeypatch.setitem(sys.modules, "lotion_fx.kernels.sample", SimpleNamespace(CONFIGS=CONFIGS[2:]))
    assert tuning.choose("sample/rtn", "", 80) == CONFIGS[2]


def test_a_device_without_a_target_takes_the_nearest(kept):
    kept["doubled"] = {"": {"sm_120": [entry(CONFIGS[1])]}}
    with pytest.warns(UserWarning, match="sm_121 is no known target"):
        assert tuning.choose("doubled", "", 121, CONFIGS) == CONFIGS[1]


def test_refused_candidates_are_never_chosen(kept):
    kept["doubled"] = {"": {"sm_80": [entry(CONFIGS[1], refused="too large")]}}
    assert tuning.choose("doubled", "", 80, CONFIGS) == CONFIGS[0]


def test_by_default_the_kernel_itself_is_launched_with_the_choice(kept, monkeypatch):
    monkeypatch.delenv("LOTION_FX_AUTOTUNE", raising=False)
    fn, options = tuning.launchable(doubled_kernel, "doubled", "", 80, CONFIGS)
    assert fn is doubled_kernel
    assert options == {"SIZE": 1024, "num_warps": 4, "num_stages": 1}


def test_autotuning_times_the_tables_best_few(kept, monkeypatch):
    monkeypatch.setenv("LOTION_FX_AUTOTUNE", "1")
    many = [Config({"SIZE": 2**n}, 4, 1) for n in range(8, 13)]
    kept["doubled"] = {"": {"sm_80": [entry(config) for config in reversed(many)]}}
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


def test_ranking_follows_the_cost_model_and_the_modules_order():
    ranked = ranking.rank([doubled(), doubled(2**26)], 100)
    assert ranked[-1]["config"]["constants"]["SIZE"] == 256  # narrow loads
    first, second = (sum(e["predicted_us"].values()) for e in ranked[:2])
    assert first <= 1.02 * second
    assert ranked[0]["evidence"][0]["spills"] == 0


def test_ranking_puts_spills_lost_instructions_and_refusals_last():
    spills, refused = Config({"BM": 256, "BN": 256, "BK": 32}, 4, 2), Config({"BM": 256, "BN": 256, "BK": 64}, 8, 4)
    work = replace(product(), configs=(refused, spills, *product().configs))
    ranked = ranking.rank([work], 80)
    assert Config(**ranked[-1]["config"]) == refused
    assert "cannot hold one program" in ranked[-1]["refused"]
    assert Config(**ranked[-2]["config"]) == spills


def test_ranking_puts_the_instructions_that_a_kernel_is_for_before_its_time():
    """Four elements a thread, 64-bit loads, are slower than eight."""
    slower = Config({"SIZE": 512}, 4, 1)
    work = replace(doubled(), configs=(CONFIGS[0], slower))
    assert Config(**ranking.rank([work], 100)[0]["config"]) == CONFIGS[0]
    first, second = ranking.rank([replace(work, requires={100: ("LDG.E.64",)})], 100)
    assert Config(**first["config"]) == slower
    assert (first["evidence"][0]["lost"], second["evidence"][0]["lost"]) == ([], ["LDG.E.64"])


def test_ranking_puts_wide_accesses_before_time(monkeypatch):
    narrow, wide = CONFIGS[2], CONFIGS[0]
    work = replace(doubled(), configs=(narrow, wide))
    monkeypatch.setattr(ranking, "predict", lambda _, config, *rest: SimpleNamespace(us=2.0 if config is wide else 1.0))
    assert Config(**ranking.rank([work], 100)[0]["config"]) == narrow
    assert Config(**ranking.rank([replace(work, wide=0.9)], 100)[0]["config"]) == wide


def test_tuning_drops_classes_that_are_gone_for_its_architecture_alone(kept):
    kept["doubled"] = {"old": {"sm_80": [], "sm_90": [entry(CONFIGS[0])]}, "older": {"sm_80": []}}
    kept["other"] = {"": {"sm_80": []}}
    tuned = ranking.tune([doubled()], 80)
    assert set(tuned) == {"doubled", "other"}
    assert {name: set(archs) for name, archs in tuned["doubled"].items()} == {"old": {"sm_90"}, "": {"sm_80"}}


def test_shapes_that_compile_alike_share_their_evidence():
    (entry,) = ranking.rank([replace(product(k=k), configs=product().configs[:1]) for k in (64, 4096)], 80)
    assert len(entry["evidence"]) == 1
    assert len(entry["predicted_us"]) == 2


def test_shapes_of_one_class_share_their_candidates():
    other = replace(doubled(), configs=CONFIGS[:1])
    with pytest.raises(ValueError, match="doubled: the shapes of shape_class='' have different configs"):
        ranking.rank([doubled(), other], 80)


def test_what_is_written_is_read_back(kept):
    tuned = ranking.tune([doubled()], 80)
    text = ranking.written(tuned)
    assert json.loads(text) == tuned
    assert sum("predicted_us" in line for line in text.splitlines()) == len(CONFIGS)
    kept.update(json.loads(text))
    assert tuning.choose("doubled", "", 80) in CONFIGS


def entries(work: Work, arch: int) -> list[Config]:
    """The candidates that the checked-in table has for a kernel."""
    ranked = tuning.table().get(work.kernel, {}).get(work.shape_class, {}).get(TARGETS[arch].name, ())
    return [Config(**entry["config"]) for entry in ranked]


@pytest.mark.parametrize("arch", TARGETS)
def test_the_checked_in_table_has_no_config_that_is_gone(arch):
    stale = {w.kernel for w in table.catalog(arch) if any(config not in w.configs for config in entries(w, arch))}
    assert not stale, f"run: lotion-fx kernels --tune --arch {TARGETS[arch].name}; stale: {sorted(stale)}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_the_checked_in_table_has_every_kernel(arch):
    missing = {work.kernel for work in table.catalog(arch) if not entries(work, arch)}
    assert not missing, f"run: lotion-fx kernels --tune --arch {TARGETS[arch].name}; missing: {sorted(missing)}"
