"""`lotion-fx export` and `lotion-fx verify`."""

import json
import warnings

import pytest
import torch

import lotion_fx
from tests.deploy.test_exporting import trained
from tests.runtime import subjects
from tests.runtime.test_cli import run

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoint")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_checkpoint_is_reported_in_training(checkpoint):
    """It comes in eval(), where weights train at rounded values and have no analytic curvature."""
    rows = json.loads(run("report", str(checkpoint), "--fmt", "int4", "--json").stdout)["parameters"]
    assert {row["estimator"] for row in rows if row["format"]} == {"analytic"}


def test_a_checkpoint_is_rounded_exported_laid_out_anew_and_verified(checkpoint, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    told = run("export", str(checkpoint), str(first), "--fmt", "nvfp4/pow2", "--only", "lm", "--json")
    assert told.exit_code == 0, told.output
    packed = json.loads(told.stdout.splitlines()[-1])["packed"]
    plain = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    by_hand = lotion_fx.transform(plain, "nvfp4/pow2", only=lotion_fx.preset("lm"), inner="eager")
    assert set(packed) == set(lotion_fx.quantized(by_hand)) and "lm_head.weight" not in packed
    assert run("export", str(first), str(second)).exit_code == 0
    loaded = lotion_fx.load(second, packed=False)
    for name, weight in lotion_fx.quantized(by_hand).items():
        assert torch.equal(loaded.get_parameter(name), weight.dequantize())
    table = run("verify", str(second), "--source", str(first))
    assert table.exit_code == 0 and "outputs equal" in table.output and "q_proj" in table.output
    assert json.loads(run("verify", str(second), "--source", str(first), "--json").stdout)["is_exact"]
    assert "every checksum holds; --source compares" in run("verify", str(second)).output


def test_another_model_is_told_by_the_exit_code(checkpoint, tmp_path):
    run("export", str(checkpoint), str(tmp_path / "one"), "--fmt", "int4")
    other = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    lotion_fx.export(lotion_fx.transform(other, "int4", inner="eager").eval(), tmp_path / "two")
    result = run("verify", str(tmp_path / "one"), "--source", str(tmp_path / "two"))
    assert result.exit_code == 1 and "DIFFERENT" in result.output and "outputs differ by" in result.output


def test_a_model_is_exported_by_the_name_of_what_returns_it(tmp_path):
    out = tmp_path / "out"
    for source, *options in (["alone", "--fmt", "int4"], ["transformed"]):
        told = run("export", f"tests.runtime.subjects:{source}", str(out), "--json", *options)
        assert told.exit_code == 0, told.output
        assert json.loads(told.stdout)["packed"] == {"0.weight": "int4", "2.weight": "int4"}
        loaded = lotion_fx.load(out, subjects.alone(), packed=False)
        by_hand = subjects.transformed().eval()
        assert torch.equal(loaded(torch.ones(2, 32)), by_hand(torch.ones(2, 32)))


def test_a_layout_that_traces_runs_the_source_s_own_batch(tmp_path):
    """It asked for example_inputs=, which no option of the command gives."""
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    path, source = tmp_path / "model.onnx", "tests.runtime.subjects:transformed_classifier"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnxscript's and torch.onnx's own
        told = run("export", source, str(path), "--layout", "onnx")
    assert told.exit_code == 0 and path.is_file(), told.output
    alone = run("export", "tests.runtime.subjects:transformed", str(path), "--layout", "onnx")
    assert alone.exit_code == 2 and "let SOURCE return (model, batch)" in " ".join(alone.output.split())


def test_user_errors_are_one_line(checkpoint, tmp_path):
    lotion_fx.export(trained(), tmp_path / "export")
    for arguments, message in [
        (["export", str(checkpoint), str(tmp_path / "x")], "it needs a format, such as int4 or nvfp4/pow2"),
        (["export", str(tmp_path / "no"), str(tmp_path / "x"), "--fmt", "int4"], "no Hugging Face checkpoint is there"),
        (
            ["export", str(checkpoint), str(tmp_path / "x"), "--fmt", "int4", "--layout", "zip"],
            "expected one of lotion",
        ),
        (["export", str(tmp_path / "export"), str(tmp_path / "x"), "--fmt", "int4"], "leave them out"),
        (["export", str(tmp_path / "export"), str(tmp_path / "x")], "no config.json to make a model from"),
        (["verify", str(tmp_path / "no.gguf")], "no export of lotion_fx is here"),
        (
            ["verify", __file__],
            "only layout lotion has checksums; name one of the same model by --source",
        ),
        (
            ["verify", str(tmp_path), "--source", str(tmp_path)],
            "no export of layout lotion is there; make one of what was exported",
        ),
        (
            ["verify", str(tmp_path), "--source", "a.py:model"],
            "--source='a.py:model': expected the folder of an export",
        ),
    ]:
        result = run(*arguments)
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
        assert "Traceback" not in result.output
