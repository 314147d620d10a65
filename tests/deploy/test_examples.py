"""The examples that deploy, each with its client."""

from importlib import import_module

import pytest

pytest.importorskip("transformers", "5.24")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of libraries that are not ours
@pytest.mark.parametrize("client", ["bitsandbytes", "compressed_tensors", "modelopt", "torchao"])
def test_a_client_reads_what_was_trained(tmp_path, client):
    pytest.importorskip("compressed_tensors" if client == "modelopt" else client)
    assert import_module(f"lotion_fx.examples.deploy_{client}").main(str(tmp_path / "model"))
