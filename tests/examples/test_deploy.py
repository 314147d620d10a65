"""The examples that export: their clients run, and compute what was trained."""

from importlib import import_module

import pytest

from tests.deploy.hf import distance

pytest.importorskip("transformers", "5.24")


@pytest.mark.slow
def test_llama_cpp_generates(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    from lotion_fx.examples import deploy_gguf

    assert len(deploy_gguf.main(str(tmp_path / "model.gguf"), steps=2)) == 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.isinstance.treespec, LeafSpec.:FutureWarning")
def test_onnxruntime_and_openvino_agree(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    from lotion_fx.examples import deploy_onnx

    ours, *theirs = deploy_onnx.main(str(tmp_path / "model.onnx"), steps=2)
    assert all(distance(each, ours) < 1e-6 for each in theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")
def test_the_compiled_file_runs_elsewhere(tmp_path):
    from lotion_fx.examples import deploy_aoti

    ours, theirs = deploy_aoti.main(str(tmp_path), steps=2)
    assert distance(theirs, ours) < 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of libraries that are not ours
@pytest.mark.parametrize("client", ["bitsandbytes", "compressed_tensors", "modelopt", "torchao"])
def test_a_client_reads_what_was_trained(tmp_path, client):
    pytest.importorskip("compressed_tensors" if client == "modelopt" else client)
    assert import_module(f"lotion_fx.examples.deploy_{client}").main(str(tmp_path / "model"))
