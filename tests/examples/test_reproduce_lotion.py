"""The LOTION paper's comparison: its log is gone on from, its arithmetic and its plan are what a hand counts."""

from __future__ import annotations

import json
import math

import pytest
import torch.distributed as dist
from typer.testing import CliRunner

from lotion_fx.examples import fsdp2_lm
from lotion_fx.examples.options import typer
from lotion_fx.examples.reproduce import figures, lotion, plan, results, runs
from lotion_fx.examples.reproduce.recipes import RECIPES, Recipe
from lotion_fx.examples.reproduce.runs import Job, Result, Run
from lotion_fx.examples.reproduce.sharded import Sharded
from lotion_fx.examples.reproduce.sizes import SCALES
from lotion_fx.examples.reproduce.tiny import POINTS, Tiny


class Counted:
    """A bench that trains nothing, counts what it is asked for, and dies in the run of that number."""

    size, steps, step_tokens, device, writes = "tiny", 4, 10, "none", True

    def __init__(self, dies_in: int | None = None) -> None:
        self.done: list[Job] = []
        self.dies_in = dies_in

    def conditions(self, recipe: Recipe) -> str:
        return recipe.fingerprint()

    def agreed(self, value: bool) -> bool:
        return value

    def run(self, job: Job) -> Result:
        if len(self.done) == self.dies_in:
            raise KeyboardInterrupt
        self.done.append(job)
        return Result(2.0, None, 1.0, [(4, 2.0)], 0.1)


def wanted(bench: Counted, methods=("ptq", "lotion"), seeds=2) -> list[Job]:
    return list(runs.jobs(bench, ["int4/tensor", "fp4/tensor"], methods, seeds))


def test_a_killed_sweep_goes_on_and_repeats_nothing(tmp_path):
    log, first, second, third = tmp_path / "runs.jsonl", Counted(dies_in=3), Counted(), Counted()
    with pytest.raises(KeyboardInterrupt):
        runs.run_all(wanted(first), first, log, math.inf)
    with log.open("a") as file:
        file.write('{"size": "ti')  # the line of a killed process
    runs.run_all(wanted(second), second, log, math.inf)
    assert [*first.done, *second.done] == wanted(first)
    assert len(runs.finished(wanted(third), log)) == 8
    runs.run_all(wanted(third), third, log, math.inf)
    assert not third.done


def test_a_changed_recipe_runs_again_and_a_changed_label_does_not(tmp_path, monkeypatch):
    log, bench = tmp_path / "runs.jsonl", Counted()
    runs.run_all(wanted(bench, ("lotion",), 1), bench, log, math.inf)
    monkeypatch.setitem(RECIPES, "lotion", Recipe("another", RECIPES["lotion"].arguments))
    runs.run_all(wanted(bench, ("lotion",), 1), bench, log, math.inf)
    assert len(bench.done) == 2
    monkeypatch.setitem(RECIPES, "lotion", Recipe("another", {"method": "lotion", "strength": 2.0}))
    runs.run_all(wanted(bench, ("lotion",), 1), bench, log, math.inf)
    assert len(bench.done) == 4


def test_no_run_begins_after_the_hours(tmp_path):
    bench = Counted()
    runs.run_all(wanted(bench), bench, tmp_path / "runs.jsonl", -1.0)
    assert not bench.done


# Full precision is 1, 2 and 3: seeds differ by far more than methods do. What is added, in hundredths, by seed:
ADDED = {"ptq": (6, 7, 8), "ste": (4, 4, 4), "lotion": (1, 2, 3)}
# The curve of each, in hundredths above where it ends, at steps 1 to 4; its level is that of other windows
FALLS = {"ptq": (5, 3, 1, 0), "ste": (9, 6, 1, 0), "lotion": (9, 6, 3, 0)}
RUNS = [
    Run(
        "tiny", "int4/tensor", method, seed, "abc", 1 + seed + value / 100, None, 1.0 + seed,
        [[step, 7 + FALLS[method][step - 1] / 100] for step in (1, 2, 3, 4)], 1.0, 4, 10, "", "2.13", "cpu", "now",
    )
    for method, each in ADDED.items()
    for seed, value in enumerate(each)
]  # fmt: skip


def test_what_a_format_adds_is_paired_by_seed():
    found = results.bars(RUNS, "int4/tensor")
    assert list(found) == ["ptq", "ste", "lotion"]
    assert found["ptq"] == pytest.approx((0.07, 0.01 / math.sqrt(3), 3))
    assert found["ste"] == pytest.approx((0.04, 0, 3))
    headers, rows = results.margins_table(RUNS, ["int4/tensor", "nvfp4"])
    assert headers[1:3] == ["PTQ less LOTION", "QAT less LOTION"]
    assert rows == [["int4/tensor", ".0500 ± .0000", ".0200 ± .0058", "", "", ""]]


def test_curves_end_at_the_loss_over_all_windows_and_fall_as_they_did():
    found = results.curves(RUNS, "int4/tensor")
    assert list(found["lotion"]) == [10, 20, 30, 40]
    assert found["lotion"][40] == pytest.approx({0: 0.01, 1: 0.02, 2: 0.03})
    assert found["lotion"][10] == pytest.approx({0: 0.10, 1: 0.11, 2: 0.12})
    assert results.fall(found["lotion"]) == pytest.approx({0: 0.03, 1: 0.03, 2: 0.03})
    assert results.fall(found["ste"], share=0.5) == pytest.approx({0: 0.06, 1: 0.06, 2: 0.06})


def test_titles_say_what_the_numbers_say():
    assert figures.along_title(RUNS, "int4/tensor") == "int4/tensor: LOTION falls more than QAT over the last quarter"
    alone = [run for run in RUNS if run.seed == 0]
    assert figures.along_title(alone, "int4/tensor").endswith("fall alike over the last quarter")
    title = figures.bars_title("int4/tensor", results.bars(RUNS, "int4/tensor"))
    assert title == "int4/tensor: PTQ adds 0.0700,\nLOTION 0.0200"


@pytest.mark.parametrize("size", sorted(SCALES))
def test_the_plan_is_what_a_hand_counts(size):
    scale = SCALES[size]
    d, blocks, v, length = scale.model.width, scale.model.depth, scale.model.vocab, scale.model.length
    quantized = blocks * (3 * d * d + d * d + 8 * d * d + 4 * d * d)
    norms = d * (2 * blocks + 1)
    found = plan.plan(scale, gpus=4)
    assert found.quantized == quantized
    assert found.parameters == quantized + 2 * v * d + norms
    tokens = found.steps * scale.sequences * length
    assert tokens == pytest.approx(scale.tokens, rel=1e-3)
    assert found.flops == pytest.approx((6 * (quantized + v * d + norms) + 12 * blocks * d * length) * tokens)
    assert found.hours["H100"] == pytest.approx(found.flops / (4 * 989.4e12 * 0.4 * 3600))
    assert found.memory.weights == pytest.approx(4 * found.parameters / 4 / 2**30)
    assert found.memory.optimizer == pytest.approx(2 * found.memory.gradients)
    rows_and_columns = blocks * (3 * d + d + d + d + 8 * d + d + d + 4 * d)
    assert found.memory.curvature == pytest.approx(8 * rows_and_columns / 2**30)
    full = plan.plan(scale, gpus=4, curvature="full")
    assert full.memory.curvature == pytest.approx(8 * quantized / 2**30)
    assert full.flops == pytest.approx(4 / 3 * found.flops)


def test_a_step_that_cannot_be_shared_out_is_refused():
    with pytest.raises(ValueError, match="256 sequences a step cannot be shared among 3 ranks in batches of 16"):
        plan.plan(SCALES["150m"], gpus=3)


def test_the_sizes_are_what_their_names_say():
    assert plan.plan(SCALES["small"], 1).parameters == pytest.approx(25e6, rel=0.05)
    assert plan.plan(SCALES["150m"], 8).multiplied == pytest.approx(150e6, rel=0.05)
    assert plan.plan(SCALES["300m"], 8).multiplied == pytest.approx(300e6, rel=0.1)


def command(*arguments: str):
    app = typer.Typer()
    app.command()(lotion.main)
    return CliRunner().invoke(app, [*arguments])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "ste,qat"], "unknown method 'qat'"),
        (["--formats", "int4/tensr"], "int4/tensr"),
        (["--size", "7b"], "unknown size '7b'"),
        (["--inner", "fast"], "unknown 'fast'"),
        (["--dry-run"], "--dry-run is of a size for GPUs"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(arguments, said):
    found = command(*arguments)
    assert found.exit_code == 2 and said in " ".join(found.output.replace("│", " ").split())


def test_the_committed_log_makes_the_page(tmp_path):
    page = tmp_path / "page.html"
    found = command("--table", "--report", str(page), "--json", "--figures", str(tmp_path))
    assert found.exit_code == 0, found.output
    assert {row["method"] for row in json.loads(found.stdout)} >= {"ptq", "ste", "lotion"}
    assert page.read_text().count("<img") + page.read_text().count("<svg") >= 3
    assert {path.name for path in tmp_path.glob("lotion_*")} == {
        f"lotion_{name}.{kind}" for name in ("along_training", "integers", "floats") for kind in ("png", "svg")
    }


@pytest.mark.slow
def test_tiny_trains_and_a_fork_shares_the_plain_curve():
    bench = Tiny(steps=20, windows=32, inner="eager")
    ptq, forked = (bench.run(job) for job in runs.jobs(bench, ["int4/tensor"], ["ptq", "round_"], 1))
    assert [step for step, _ in ptq.curve] == list(range(1, POINTS + 1))
    assert forked.curve[:12] == ptq.curve[:12] and forked.curve[-1] != ptq.curve[-1]
    assert ptq.latent < ptq.loss and forked.randomized is None


@pytest.mark.slow
def test_a_large_size_launches_shrunk_on_two_ranks():
    assert '"method": "lotion"' in plan.launch("small")


@pytest.mark.slow
def test_a_killed_run_of_a_large_size_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        whole, killed = (
            Sharded(SCALES["small"].shrunk, None, tmp_path / each, "eager") for each in ("whole", "killed")
        )
        (job,) = runs.jobs(whole, ["int4/tensor"], ["lotion"], 1)
        expected = whole.run(job)
        save, seen = fsdp2_lm.save, []

        def save_and_die(folder, step, *rest):
            save(folder, step, *rest)
            seen.append(step)
            if step == 4:
                raise KeyboardInterrupt

        monkeypatch.setattr(fsdp2_lm, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            killed.run(job)
        found = killed.run(job)
    finally:
        dist.destroy_process_group()
    assert seen == [2, 4, 6, 8]  # no step is done twice
    assert (found.loss, found.latent) == (expected.loss, expected.latent)
    assert found.curve == expected.curve
