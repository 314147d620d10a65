"""The quickstart's own parts: its data, model, arithmetic and table. What it trains is tested elsewhere."""

from __future__ import annotations

import json
import math
import re
import sysconfig
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lotion_fx.cli import build
from lotion_fx.examples import quickstart
from lotion_fx.examples.quickstart_results import Row, gap_recovered, plot, table

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def test_split_is_by_file_and_repeatable():
    files = quickstart.source_files(STDLIB)
    training, validation = quickstart.split_files(files)
    assert not set(training) & set(validation)
    assert sorted(training + validation) == files
    assert quickstart.split_files(files) == (training, validation)
    assert len(validation) == round(0.05 * len(files))


def test_no_validation_file_is_a_copy_of_a_training_file():
    training, validation = quickstart.split_files(quickstart.source_files(STDLIB))
    seen = {path.read_bytes() for path in training}
    assert not [path for path in validation if path.stat().st_size and path.read_bytes() in seen]


def test_source_files_leaves_out_tests_and_installed_packages(tmp_path):
    for name in ("test", "site-packages", "kept"):
        (tmp_path / name).mkdir()
        for i in range(20):
            (tmp_path / name / f"m{i}.py").touch()
    assert {path.parent.name for path in quickstart.source_files(tmp_path)} == {"kept"}


def test_too_few_source_files_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds 0 Python source files"):
        quickstart.source_files(tmp_path)


def test_vocabulary(tmp_path):
    path = tmp_path / "all.py"
    path.write_bytes(bytes(range(256)))
    found = quickstart.tokens([path])
    assert found.dtype == torch.int64
    assert sorted(found.tolist()) == list(range(quickstart.VOCAB))
    path.write_bytes(b"a\n\t\xff~")
    assert quickstart.tokens([path]).tolist() == [ord("a") - 32, 95, 94]


def test_windows_hold_inputs_and_the_next_token():
    text = torch.arange(200)
    window = quickstart.windows(text, torch.tensor([0, 100]))
    assert window.shape == (2, quickstart.CONTEXT + 1)
    assert torch.equal(window[1], torch.arange(100, 101 + quickstart.CONTEXT))


def test_model_shapes_and_initial_loss():
    torch.manual_seed(0)
    model = quickstart.GPT()
    batch = torch.randint(quickstart.VOCAB, (3, quickstart.CONTEXT + 1))
    assert model(batch[:, :-1]).shape == (3, quickstart.CONTEXT, quickstart.VOCAB)
    assert quickstart.next_token_loss(model, batch).item() == pytest.approx(math.log(quickstart.VOCAB), abs=0.3)


def test_model_is_causal():
    torch.manual_seed(0)
    model, ids = quickstart.GPT(), torch.randint(quickstart.VOCAB, (1, quickstart.CONTEXT))
    changed = ids.clone()
    changed[:, 40:] = (ids[:, 40:] + 1) % quickstart.VOCAB
    before, after = model(ids), model(changed)
    assert torch.allclose(before[:, :40], after[:, :40], atol=1e-6)
    assert not torch.allclose(before[:, 40:], after[:, 40:], atol=1e-3)


def test_gap_recovered():
    assert gap_recovered(loss=1.7, ptq=1.8, full=1.6) == pytest.approx(0.5)
    assert gap_recovered(loss=1.8, ptq=1.8, full=1.6) == 0
    assert gap_recovered(loss=1.9, ptq=1.8, full=1.6) < 0
    assert math.isnan(gap_recovered(loss=1.7, ptq=1.6, full=1.6))


def test_table_pairs_each_seed_with_its_full_precision():
    rows = []
    for seed in (0, 1):
        full = 1.6 + 0.3 * seed  # seeds differ by far more than methods do
        rows += [
            Row("full_precision", "fp32", seed, full, None, full, 10.0),
            Row("ptq", "nvfp4", seed, full + 0.2 + 0.02 * seed, 1.9, full, 10.0),
            Row("ptq+descent", "nvfp4", seed, full + 0.1, None, full, 14.0),
            Row("lotion", "nvfp4", seed, full + 0.105, 1.71, 1.7, 12.0),
        ]
    full, ptq, rounded, lotion = ([cell.strip() for cell in re.split(r"  +", line)] for line in
                                  table(rows).splitlines()[2:])  # fmt: skip
    assert full == ["full precision", "1.750", "1.750", "10"]
    assert ptq == ["PTQ", "1.960", "0.2100 ± 0.0100", "1.900", "1.750", "0%", "10"]
    assert rounded == ["PTQ + round_", "1.850", "0.1000 ± 0.0000", "1.750", "52%", "14"]
    assert lotion == ["LOTION", "1.855", "0.1050 ± 0.0000", "1.710", "1.700", "50%", "12"]


def test_a_table_of_one_seed_has_no_errors():
    rows = [Row("full_precision", "fp32", 0, 1.6, None, 1.6, 10.0), Row("ptq", "nvfp4", 0, 1.8, 1.9, 1.6, 10.0)]
    assert "0.2000" in table(rows) and "±" not in table(rows)


def test_batches_for_rounding_are_of_the_training_s_size():
    text = torch.randint(quickstart.VOCAB, (5000,))
    batches = quickstart.calibration(text, seed=3)
    assert len(batches) == quickstart.CALIBRATION
    for inputs, targets in batches:
        assert inputs.shape == targets.shape == (quickstart.BATCH, quickstart.CONTEXT)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    again = quickstart.calibration(text, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(batches[0], again[0], strict=True))
    assert not torch.equal(batches[0][0], quickstart.calibration(text, seed=4)[0][0])


def test_plot(tmp_path):
    curve = [(step, 3.0 - step / 100) for step in range(10, 130, 10)]
    plot({"ptq": [curve], "lotion": [curve, curve]}, 1.5, "nvfp4", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.slow
def test_quick_run_writes_rows_and_curves(tmp_path):
    curves = tmp_path / "curves.png"
    arguments = [
        "quickstart",
        "--quick",
        "--steps",
        "30",
        "--json",
        "--plot",
        str(curves),
        "--report",
        f"{tmp_path}/page.html",
    ]
    result = CliRunner().invoke(build(), arguments, catch_exceptions=False)
    assert result.exit_code == 0
    written = json.loads(result.stdout)
    rounded = ["ptq", "ptq+gptq", "ptq+descent", "ste_scale", "lotion_finish"]
    assert [row["method"] for row in written] == ["full_precision", *rounded]
    assert set(written[0]) == {"method", "fmt", "seed", "loss", "rr", "latent", "seconds"}
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["latent"]) for row in written)
    assert curves.exists()
    page = (tmp_path / "page.html").read_text()
    assert "PTQ + round_" in page and "lotion-fx quickstart --fmt nvfp4 --seeds 1 --steps 30" in page
