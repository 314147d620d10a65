"""Layout "onnx": what onnxruntime dequantizes, and what it and OpenVINO compute, is what was trained."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from tests.deploy.hf import distance, logits, make, rows, under
from tests.models import MLP

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

BOUND = 1e-6  # of outputs: sums of float32 in another order
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),  # torch.onnx's own
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),  # onnxscript's own, of several kinds
]


def by_onnxruntime(path, *inputs, **entries):
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    for name, value in entries.items():
        options.add_session_config_entry(name.replace("__", "."), value)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {each.name: x.numpy() for each, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, given)[0])


def by_openvino(path, *inputs):
    openvino = pytest.importorskip("openvino")
    # Both are needed: the defaults compute in bf16 where there is an instruction, and round activations to 8 bits.
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    return torch.from_numpy(openvino.Core().compile_model(str(path), "CPU", exact)([x.numpy() for x in inputs])[0])


def under_plain(model, x, fmt, **options):
    torch.manual_seed(0)
    lotion_fx.transform(model.eval(), fmt, inner="eager", **options)
    with torch.no_grad():
        return model, model(x)


def operators(path):
    return [node.op_type for node in onnx.load(str(path)).graph.node]


@pytest.mark.parametrize(
    ("fmt", "operator"),
    [
        ("int2", "MatMulNBits"),
        ("int4", "MatMulNBits"),
        ("int4/128", "MatMulNBits"),
        ("int4/96", "MatMulNBits"),
        ("int4/tensor", "MatMulNBits"),
        ("int8", "MatMulNBits"),
        ("int8/16", "MatMulNBits"),
        ("nf4/32", "MatMulBnb4"),
        ("fp8", "DequantizeLinear"),
        ("fp8/tensor", "DequantizeLinear"),
        ("mxfp8", "DequantizeLinear"),
        ("mxfp8_e5m2", "DequantizeLinear"),
    ],
)
def test_what_onnxruntime_computes_is_what_eval_does(tmp_path, fmt, operator):
    x = torch.randn(5, 320)
    width = 48 if operator == "MatMulNBits" else 64  # others take no short last block: OpenVINO, or MatMulBnb4
    model = nn.Sequential(nn.Linear(320, width), nn.GELU(), nn.Linear(width, 96, bias=False))
    model, expected = under_plain(model, x, fmt)
    told = lotion_fx.export(model, tmp_path / "model.onnx", "onnx", example_inputs=(x,))
    assert len(told.packed) == 2 and operators(told.path).count(operator) == 2
    assert distance(by_onnxruntime(told.path, x), expected) < BOUND
    if operator != "MatMulBnb4":  # which OpenVINO has not
        assert distance(by_openvino(told.path, x), expected) < BOUND
    dense = [tuple(each.dims) for each in onnx.load(str(told.path)).graph.initializer if each.data_type == 1]
    assert (width, 320) not in dense


@pytest.mark.parametrize("fmt", ["int4", "int2", "int8"])
def test_odd_sizes_and_last_blocks_that_are_short(tmp_path, fmt):
    x = torch.randn(4, 20)
    model, expected = under_plain(MLP(), x, fmt)
    told = lotion_fx.export(model, tmp_path / "model.onnx", "onnx", example_inputs=(x,), dynamic_shapes=({0: "batch"},))
    assert len(told.packed) == 2
    assert distance(by_onnxruntime(told.path, x), expected) < BOUND
    with torch.no_grad():
        assert distance(by_onnxruntime(told.path, x.repeat(3, 1) * 2), model(x.repeat(3, 1) * 2)) < BOUND


def test_a_session_that_asks_for_8_bit_activations_does_not_get_them(tmp_path):
    x = torch.randn(4, 64)
    model, expected = under_plain(nn.Linear(64, 64), x, "int4")
    told = lotion_fx.export(model, tmp_path / "model.onnx", "onnx", example_inputs=(x,))
    found = by_onnxruntime(told.path, x, session__qdq_matmulnbits_accuracy_level="4")
    assert distance(found, expected) < BOUND


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.table = nn.Conv2d(32, 16, 3), nn.Embedding(40, 16)

    def forward(self, x, ids):
        return self.conv(x).mean((2, 3)) + F.linear(self.table(ids), self.table.weight[:16])


def test_what_no_product_takes_is_dequantized_for_it_or_dense(tmp_path):
    x, ids = torch.randn(2, 32, 5, 5), torch.tensor([3, 1])
    for fmt, packed in (("int4", 2), ("int8", 2), ("fp8", 2)):
        model = lotion_fx.transform(Convolutional().eval(), fmt, inner="eager", only=lotion_fx.preset("all"))
        with torch.no_grad():
            expected = model(x, ids)
        told = lotion_fx.export(model, tmp_path / "model.onnx", "onnx", example_inputs=(x, ids))
        assert len(told.packed) == packed
        assert distance(by_onnxruntime(told.path, x, ids), expected) < BOUND
    model = nn.Sequential(nn.Conv1d(32, 16, 1), nn.Flatten(), nn.Linear(16, 8))
    model, _ = under_plain(model, x[:, :, 0, :1], "int2")
    told = lotion_fx.export(model, tmp_path / "model.onnx", "onnx", example_inputs=(x[:, :, 0, :1],))
    assert list(told.packed) == ["2.weight"] and "ONNX dequantizes no int2" in told.dense["0.weight"]


@pytest.mark.parametrize(
    ("fmt", "message"),
    [
        ("nvfp4", "FLOAT4E2M1 has no kernel there.*train with int2, int4, int8, nf4 or mxfp8"),
        ("int3", "MatMulNBits of onnxruntime has 2, 4 or 8 bits"),
        ("int4/24", "blocks of a power of two from 16; train with int4/32"),
        ("nf4/48", "blocks of a power of two from 16; train with nf4"),
        ("nf4", "its length of 20 is no multiple of a block of 32, which products in nf4 need"),
    ],
)
def test_a_format_without_a_place_is_refused(tmp_path, fmt, message):
    model, _ = under_plain(MLP(), torch.randn(2, 20), fmt)
    with pytest.raises(ValueError, match=message):
        lotion_fx.export(model, tmp_path / "model.onnx", "onnx", example_inputs=(torch.randn(2, 20),))
    assert not any(tmp_path.iterdir())


def test_example_inputs_are_asked_for(tmp_path):
    model, _ = under_plain(MLP(), torch.randn(2, 20), "int4")
    with pytest.raises(ValueError, match="layout='onnx' traces the model: pass example_inputs="):
        lotion_fx.export(model, tmp_path / "model.onnx", "onnx")
    with pytest.raises(TypeError, match="expected a tuple of arguments"):
        lotion_fx.export(model, tmp_path / "model.onnx", "onnx", example_inputs=torch.randn(2, 20))


def test_weights_of_16_bits_are_refused(tmp_path):
    x = torch.randn(2, 20, dtype=torch.bfloat16)
    model, _ = under_plain(MLP().to(torch.bfloat16), x, "int4")
    with pytest.raises(ValueError, match="no place for any weight.*its products are in bfloat16"):
        lotion_fx.export(model, tmp_path / "model.onnx", "onnx", example_inputs=(x,))


def test_a_changed_code_is_seen(tmp_path, monkeypatch):
    from lotion_fx.deploy.layouts import onnx_weights

    x = torch.randn(2, 20)
    model, _ = under_plain(MLP(), x, "int4")
    blocks = onnx_weights._blocks
    monkeypatch.setattr(onnx_weights, "_blocks", lambda w, n: (lambda b, s: (b, s.roll(1)))(*blocks(w, n)))
    with pytest.raises(ValueError, match="reads another 'up.weight' than was trained"):
        lotion_fx.export(model, tmp_path / "model.onnx", "onnx", example_inputs=(x,))


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["int2", "int4", "int8", "nf4", "mxfp8"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mixtral"])
def test_the_table_of_onnxruntime_and_openvino(tmp_path, kind, fmt):
    model, ids = under(make(kind), fmt), rows()
    told = lotion_fx.export(model, tmp_path / "model.onnx", "onnx", example_inputs={"input_ids": ids})
    assert all("experts" in name for name in told.dense)
    assert distance(by_onnxruntime(told.path, ids), logits(model, ids)) < BOUND
    if fmt != "nf4":
        assert distance(by_openvino(told.path, ids), logits(model, ids)) < BOUND
