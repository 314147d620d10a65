"""`quantize`: what a packed model computes is what `eval()` does, and it is an ordinary module in all else."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx
from lotion_fx.deploy.packed_model import hold
from lotion_fx.kernels.packed import FEW
from tests.models import LM, MLP, ids

FORMATS = ("nvfp4", "mxfp4", "int4", "nf4", "fp4", "int8", "mxfp8", "int4/tensor")


class Net(nn.Module):
    """A convolution, a transposed product, a recurrent layer, stacked experts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 16, 3, padding=1)
        self.across = nn.Parameter(torch.randn(16, 24) * 0.2)
        self.experts = nn.Parameter(torch.randn(3, 24, 24) * 0.2)
        self.rnn = nn.GRU(24, 16, batch_first=True)
        self.register_buffer("shift", torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).transpose(1, 2) + self.shift
        x = sum(F.linear(x @ self.across, self.experts[i]) for i in range(3))
        return self.rnn(x)[0]


def transformed(model, fmt="nvfp4", *inputs, **options):
    model = lotion_fx.transform(model, fmt=fmt, inner="eager", **options).eval()
    with torch.no_grad():
        model(*inputs)
    return model


def language_model(fmt="nvfp4", tied=False, **options):
    return transformed(LM(tied), fmt, ids(), only={"token.weight": ...}, **options)


def same_by_summation(got, want, bound=2e-6):
    return (got.double() - want.double()).norm() <= bound * want.double().norm()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
@torch.no_grad()
def test_it_computes_what_eval_does(fmt, tied):
    model = language_model(fmt, tied)
    packed = lotion_fx.quantize(model)
    assert torch.equal(packed(ids()), model(ids()))  # many rows: dequantized
    assert same_by_summation(packed(ids(2, 4)), model(ids(2, 4)))
    assert torch.equal(
        packed.token(ids()),
        lotion_fx.quantized(model)["token.weight"].dequantize()[ids()],
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_weights_trained_in_16_bits_keep_their_dtype(dtype):
    model = transformed(MLP().to(dtype), "int4", torch.randn(3, 20, dtype=dtype))
    packed = lotion_fx.quantize(model)
    x = torch.randn(40, 20, dtype=dtype)
    assert packed.up.weight.dtype == dtype and torch.equal(packed(x), model(x))
    assert same_by_summation(packed(x[:2]), model(x[:2]), 4 * torch.finfo(dtype).eps)


@torch.no_grad()
def test_any_module_s_weights_are_dequantized_where_they_are_read():
    x = torch.randn(2, 8, 5)
    model = transformed(Net(), "int4", x)
    weights = lotion_fx.quantized(model)
    assert {"conv.weight", "across", "experts", "rnn.weight_ih_l0"} <= set(weights)
    packed = lotion_fx.quantize(model)
    assert isinstance(packed, Net) and isinstance(packed.conv, nn.Conv1d) and isinstance(packed.rnn, nn.GRU)
    for name, weight in weights.items():
        path, _, attribute = name.rpartition(".")
        value = getattr(packed.get_submodule(path), attribute)
        assert torch.equal(value, weight.dequantize()) and value.stride() == model.get_parameter(name).stride()
    plain = Net().requires_grad_(False)  # by which torch's recurrent kernels choose their way
    plain.load_state_dict({**model.state_dict(), **{name: weight.dequantize() for name, weight in weights.items()}})
    assert torch.equal(packed(x), plain(x))
    assert same_by_summation(packed(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(packed))(x), packed(x))


def test_the_transformed_model_is_left_as_it_was():
    model = language_model()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    packed = lotion_fx.quantize(model)
    assert model.training and not packed.training and type(model.head) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in packed.parameters()) and all(p.requires_grad for p in model.parameters())
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not own & {t.untyped_storage().data_ptr() for t in packed.state_dict().values()}
    with pytest.raises(ValueError, match="not under lotion_fx"):
        lotion_fx.quantized(packed)
    lotion_fx.penalty(model)  # it still trains


def test_classes_and_ties_are_kept_and_only_integers_are_held():
    packed = lotion_fx.quantize(language_model("int4", tied=True))
    assert isinstance(packed.head, nn.Linear) and isinstance(packed.token, nn.Embedding)
    assert {name for name, _ in packed.named_parameters()} == {"norm.weight", "norm.bias", "mlp.0.bias", "mlp.2.bias"}
    for each in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.to(torch.bfloat16)):
        assert each.head.weight_packed is each.token.weight_packed
        assert all(not b.is_floating_point() or not b.numel() for b in each.buffers())


@torch.no_grad()
def test_copies_and_files_hold_the_same_model(tmp_path):
    model = language_model()
    packed, x = lotion_fx.quantize(model), ids()
    want = packed(x)
    assert torch.equal(copy.deepcopy(packed)(x), want) and torch.equal(pickle.loads(pickle.dumps(packed))(x), want)
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    other = lotion_fx.quantize(language_model())
    assert not torch.equal(other(x), want)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), want)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_safetensors_hold_it(tmp_path, tied):
    safetensors = pytest.importorskip("safetensors.torch")
    packed, x = lotion_fx.quantize(language_model(tied=tied)), ids()
    safetensors.save_model(packed, str(tmp_path / "model.safetensors"))
    other = lotion_fx.quantize(language_model(tied=tied))
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), packed(x))


def test_a_state_dict_of_another_format_is_refused():
    """nf4's codes and scales have int4's sizes."""
    saved = lotion_fx.quantize(language_model("nf4")).state_dict()
    with pytest.raises(RuntimeError, match="'head.weight' was saved in nf4, and here is int4"):
        lotion_fx.quantize(language_model("int4")).load_state_dict(saved)


@torch.no_grad()
def test_another_dtype_is_one_cast_of_the_exact_weight():
    model = language_model("int4")
    exact = lotion_fx.quantized(model)["head.weight"].dequantize()
    packed = lotion_fx.quantize(model)
    before = copy.deepcopy(packed.head.weight_packed)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        packed.to(dtype)
        assert torch.equal(packed.head.weight, exact.to(dtype)) and packed(ids()).dtype == dtype
    packed.float()
    assert torch.equal(packed.head.weight, exact)
    assert all(torch.equal(a, b) for a, b in zip(before.buffers(), packed.head.weight_packed.buffers(), strict=True))


@torch.no_grad()
def test_autocast_computes_in_its_dtype():
    packed, x = lotion_fx.quantize(language_model()), ids(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        few, many = packed.head(torch.randn(3, 16)), packed.head(torch.randn(FEW + 1, 16))
    assert few.dtype == many.dtype == torch.bfloat16 and packed(x).dtype == torch.float32


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch 2.11's own, in its load
def test_it_is_compiled_whole_and_exported_with_a_free_batch():
    packed = lotion_fx.quantize(language_model(tied=True))
    assert torch.equal(torch.compile(packed, backend="aot_eager", fullgraph=True)(ids()), packed(ids()))
    exported = torch.export.export(packed, (ids(),), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    for batch in (2, 9):
        assert torch.equal(exported.module()(ids(batch)), packed(ids(batch)))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(ids(3)), packed(ids(3)))


def test_gradients_pass_through_packed_weights_to_what_is_trained_beside():
    model = transformed(MLP(), "int4", torch.randn(3, 20))
    packed = lotion_fx.quantize(model)
    packed.up.bias.requires_grad_()
    x = torch.randn(2, 20, requires_grad=True)
    packed(x).sum().backward()
    plain = MLP()
    plain.load_state_dict({**model.state_dict(), **{k: w.dequantize() for k, w in lotion_fx.quantized(model).items()}})
    y = x.detach().clone().requires_grad_()
    plain(y).sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-6)
    assert torch.allclose(packed.up.bias.grad, plain.up.bias.grad, atol=1e-6)


@pytest.mark.parametrize(
    "fmt, bits", [("nvfp4", 4.5), ("mxfp4", 4.25), ("int4", 5.0), ("int4/bf16", 4.5), ("int4/fp16", 4.5)]
)
def test_its_size_is_the_format_s(fmt, bits):
    model = transformed(nn.Sequential(nn.Linear(512, 256, bias=False)), fmt, torch.randn(1, 512))
    held = sum(b.numel() * b.element_size() for b in lotion_fx.quantize(model).buffers())
    assert abs(8 * held / (512 * 256) - bits) <= 0.02 * bits


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("fmt", ["int4/bf16", "int4/fp16"])
def test_scales_of_16_bits_stay_in_16_bits(fmt, rows):
    model = transformed(nn.Linear(512, 64), fmt, x := torch.randn(rows, 512))
    packed = lotion_fx.quantize(model)
    weight = lotion_fx.quantized(model)["weight"].dequantize()
    assert torch.equal(packed.weight, weight) and packed.weight_packed.scales.dtype == torch.int16
    assert torch.allclose(packed(x), F.linear(x, weight, model.bias), atol=1e-5)
    assert torch.equal(packed.to(torch.bfloat16).weight, weight.bfloat16())


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="not under lotion_fx"):
        lotion_fx.quantize(MLP())
    with pytest.raises(TypeError, match="model=3"):
        lotion_fx.quantize(3)
    with pytest.raises(ValueError, match="no forward has told yet"):
        lotion_fx.quantize(lotion_fx.transform(Net(), inner="eager"))


def test_sharded_weights_are_refused(monkeypatch):
    model = language_model()
    monkeypatch.setattr("lotion_fx.deploy.packed_model.DTensor", nn.Parameter)
    with pytest.raises(ValueError, match="model: 'token.weight' is sharded"):
        lotion_fx.quantize(model)


# --------------------------------------------------------------------------------------------------------- transformers


def zoo():
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=61)
    return {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, num_key_value_heads=2)),
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**small)),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**small, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=61, n_positions=32)
        ),
    }


@pytest.mark.parametrize(
    "name", ["bert", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "gpt2", "mixtral"))]
)
@torch.no_grad()
def test_transformers_models_compute_and_generate_the_same(name):
    torch.manual_seed(0)
    tokens = torch.randint(61, (3, 8))
    model = transformed(zoo()[name](), "nvfp4", tokens)
    packed = lotion_fx.quantize(model)
    assert isinstance(packed, type(model)) and packed.dtype == torch.float32
    want, got = model(tokens)[0], packed(tokens)[0]
    assert same_by_summation(got, want, 1e-5)
    if name != "bert":
        options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(packed.generate(tokens[:1], **options), model.generate(tokens[:1], **options))


def test_levels_that_nobody_registered_are_unpacked_by_what_they_are(monkeypatch):
    """As in a process that loads an export: the name is unknown there, or another's."""
    fmt = lotion_fx.register_format("packed_model_levels", lotion_fx.codebook([-2.0, -0.5, 0.0, 0.75, 3.0], block=8))
    torch.manual_seed(0)
    model = lotion_fx.transform(nn.Linear(16, 8), fmt, inner="eager").eval()
    x = torch.randn(2, 16)
    expected = model(x)
    weights, plain = lotion_fx.quantized(model), nn.Linear(16, 8)
    plain.load_state_dict(model.state_dict())
    monkeypatch.setattr(lotion_fx.numerics.formats, "_REGISTERED", {})
    hold(plain, weights)
    assert torch.equal(plain(x), expected)


class OwnList(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 8))
        self.mixing = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return super().forward(x) @ self.mixing


def test_what_a_container_owns_itself_stays_dense_and_is_told():
    torch.manual_seed(0)
    model = lotion_fx.transform(OwnList(), "int4", inner="eager").eval()
    x = torch.randn(40, 8)
    expected = model(x)
    with pytest.warns(UserWarning, match="'mixing' of a OwnList of its own stays dense"):
        packed = lotion_fx.quantize(model)
    assert len(packed) == 1 and torch.equal(packed(x), expected)


class Scripted(nn.Module):
    """A part of it is scripted, which no pass rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 8)
        self.scripted = torch.jit.script(nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.scripted(torch.relu(self.first(x)))))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_part_stays_as_it_is(tmp_path):
    x = torch.randn(4, 32)
    model = transformed(Scripted(), "int4/bf16", x)
    packed = lotion_fx.quantize(model)
    torch.testing.assert_close(packed(x), model(x))
    assert torch.equal(packed.scripted.weight, model.scripted.weight) and model.scripted.weight.requires_grad
    lotion_fx.export(model, tmp_path, layout="lotion")
    assert lotion_fx.verify(tmp_path, model, x)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_a_hook_computes_is_computed_in_the_copy(norm):
    """What the hook has left in the module has a graph, and no tensor with one can be copied."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), norm(nn.Linear(32, 8)))
    lotion_fx.transform(model, "int4", inner="aot_eager", method="ptq").eval()
    x = torch.randn(4, 32)
    torch.testing.assert_close(model(x), lotion_fx.quantize(model)(x), rtol=1e-5, atol=1e-5)
