"""Candidates are ranked by what their machine code shows, and what was found is kept beside what was known."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lotion_fx.kernels.audit import ranking
from lotion_fx.kernels.audit.aot import Refused, audit
from lotion_fx.kernels.config import Config
from tests.harness.samples import doubled, product

CONFIGS = doubled().configs


def test_ranking_follows_the_cost_model_and_the_modules_order():
    ranked = ranking.rank([doubled(), doubled(2**26)], 100)
    assert ranked[-1]["config"]["SIZE"] == 256  # narrow loads
    first, second = (sum(e["predicted_us"].values()) for e in ranked[:2])
    assert first <= 1.02 * second
    assert ranked[0]["evidence"][0]["spills"] == 0


def test_ranking_puts_spills_and_refusals_last(monkeypatch):
    """Whatever their time; that machine code shows spills and what is too large is `test_aot`'s."""
    good, spills, refused = CONFIGS
    seen = audit(doubled(), good, 80)

    def shown(work, config, arch):
        if config == refused:
            raise Refused("cannot hold one program")
        return replace(seen, spills=8 * (config == spills))

    monkeypatch.setattr(ranking, "audit", shown)
    monkeypatch.setattr(ranking, "predict", lambda _, config, *rest: SimpleNamespace(us=2.0 if config == good else 1.0))
    ranked = ranking.rank([replace(doubled(), configs=(refused, spills, good))], 80)
    assert [Config.of(entry["config"]) for entry in ranked] == [good, spills, refused]
    assert ranked[-1]["refused"] == "cannot hold one program"


def test_ranking_puts_the_instructions_that_a_kernel_is_for_before_its_time():
    """Four elements a thread, 64-bit loads, are slower than eight."""
    slower = Config({"SIZE": 512}, 4, 1)
    work = replace(doubled(), configs=(CONFIGS[0], slower))
    assert Config.of(ranking.rank([work], 100)[0]["config"]) == CONFIGS[0]
    first, second = ranking.rank([replace(work, requires={100: ("LDG.E.64",)})], 100)
    assert Config.of(first["config"]) == slower
    assert (first["evidence"][0]["lost"], second["evidence"][0]["lost"]) == ([], ["LDG.E.64"])


def test_ranking_puts_wide_accesses_before_time(monkeypatch):
    narrow, wide = CONFIGS[2], CONFIGS[0]
    work = replace(doubled(), configs=(narrow, wide))
    monkeypatch.setattr(ranking, "predict", lambda _, config, *rest: SimpleNamespace(us=2.0 if config is wide else 1.0))
    assert Config.of(ranking.rank([work], 100)[0]["config"]) == narrow
    assert Config.of(ranking.rank([replace(work, wide=0.9)], 100)[0]["config"]) == wide


def test_what_is_written_is_read_back_and_a_class_that_is_gone_is_dropped_for_its_architecture_alone(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(
        json.dumps({"doubled": {"old": {"sm_80": [], "sm_90": [{}]}, "older": {"sm_80": []}}, "other": {"": {}}})
    )
    found = ranking.ranked([doubled()], 80)
    ranking.update(path, found, 80)
    text = path.read_text()
    assert json.loads(text) == {
        "doubled": {"old": {"sm_90": [{}]}, "": {"sm_80": found["doubled"][""]}},
        "other": {"": {}},
    }
    assert sum("predicted_us" in line for line in text.splitlines()) == len(CONFIGS)


def test_the_best_few_are_kept_without_those_that_are_refused():
    entries = [{"config": {"SIZE": size}} for size in range(5)]
    entries[1]["refused"] = "too large"
    assert ranking.best(entries) == [{"SIZE": 0}, {"SIZE": 2}, {"SIZE": 3}]


def test_shapes_that_compile_alike_share_their_evidence():
    (entry,) = ranking.rank([replace(product(k=k), configs=product().configs[:1]) for k in (64, 4096)], 80)
    assert len(entry["evidence"]) == 1
    assert len(entry["predicted_us"]) == 2


def test_shapes_of_one_class_share_their_candidates():
    other = replace(doubled(), configs=CONFIGS[:1])
    with pytest.raises(ValueError, match="doubled: the shapes of shape_class='' have different configs"):
        ranking.rank([doubled(), other], 80)
