"""Models nobody here wrote: gradients, coverage, block axes, evaluation and curvature, each against plain PyTorch."""

import copy
import functools
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx.numerics import rounding
from lotion_fx.state import registry
from lotion_fx.update import dense

transformers = pytest.importorskip("transformers")

VOCAB, WIDTH, INNER = 96, 32, 48
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FORMAT = lotion_fx.resolve("nvfp4")

# -------------------------------------------------------------------------------------------------------------- the zoo


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, **options))


def tied_llama():
    return llama(tie_word_embeddings=True)


def qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER, head_dim=8))


def mixtral():
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**DECODER, num_local_experts=4))
    model.set_experts_implementation("batched_mm")  # grouped_mm does not compile on CPU
    return model


def gpt2():
    sizes = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64}
    none = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 1}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **none))
    model.loss_type = "ForCausalLM"  # else a logging call breaks the graph
    return model


def bert():
    config = transformers.BertConfig(**SIZES, **NO_DROPOUT, max_position_embeddings=64, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def vit():
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    config = transformers.ViTConfig(**sizes, **NO_DROPOUT, image_size=16, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config)


class ConvNet(nn.Module):
    """Every kind of convolution: plain, grouped, depthwise, pointwise, transposed, transposed and grouped."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.pointwise = nn.Conv2d(16, 20, 1, stride=2)
        self.up = nn.ConvTranspose2d(20, 12, 2, stride=2)
        self.grouped_up = nn.ConvTranspose2d(12, 8, 3, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, pixel_values, labels):
        x = self.depthwise(F.gelu(self.grouped(F.relu(self.norm(self.stem(pixel_values))))))
        x = self.grouped_up(F.gelu(self.up(F.gelu(self.pointwise(x)))))
        logits = self.head(x.mean((2, 3)))
        return transformers.modeling_outputs.ImageClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


def text(seed=1):
    """Token ids whose labels are ignored at every fourth position."""
    ids = torch.randint(2, VOCAB, (2, 12), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, ::4] = -100
    return {"input_ids": ids, "labels": labels}


def sentences():
    return {"input_ids": text()["input_ids"], "labels": torch.tensor([0, 2])}


def images():
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 2, 1, 1])}


ZOO = {
    "llama": (llama, text),
    "tied_llama": (tied_llama, text),
    "qwen3": (qwen3, text),
    "mixtral": (mixtral, text),
    "gpt2": (gpt2, text),
    "bert": (bert, sentences),
    "vit": (vit, images),
    "convnet": (ConvNet, images),
}
every_model = pytest.mark.parametrize("name", ZOO)


@dataclass
class Trained:
    """A model after one step, with what an untouched copy made of the same batch."""

    model: nn.Module
    plain: nn.Module
    batch: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor | None]


def step(model, batch, plain=None, *, lr=1e-2, context=None, transformed=None, **options) -> Trained:
    """Transforms a model, takes one step, and runs the batch through an untouched copy too."""
    plain = plain or copy.deepcopy(model)
    options.setdefault("inner", "aot_eager")
    model = lotion_fx.transform(model, FORMAT, **options).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for each in (model, plain.train()):
        with context() if context else torch.autocast("cpu", enabled=False):
            loss = each(**batch).loss
        loss.backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    return Trained(model, plain, batch, gradients)


@functools.cache
def trained(name: str) -> Trained:
    torch._dynamo.reset()
    torch.manual_seed(0)
    make, batch = ZOO[name]
    return step(make(), batch())


def block_axes(model: nn.Module) -> dict[str, int]:
    """Each weight that is to be quantized, with the dimension it contracts, told from the kind of its module."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    axes: dict[str, int] = {}
    for prefix, module in model.named_modules():
        for attribute, weight in module.named_parameters(prefix, recurse=False):
            if id(weight) not in tables and weight.dim() > 1 and (axis := _axis(module, attribute)) is not None:
                axes[attribute] = axis
    return axes


def _axis(module: Any, name: str) -> int | None:
    if isinstance(module, transformers.pytorch_utils.Conv1D):
        return 0  # [in, out]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return 0  # [in, out / groups, k, k]
    if isinstance(module, nn.modules.conv._ConvNd):
        return 3 if module.groups == module.in_channels else 1  # [out, in / groups, k, k]
    if name.endswith("experts.gate_up_proj"):
        assert module.gate_up_proj.shape == (4, 2 * INNER, WIDTH)
        return 2  # [expert, out, in]
    if name.endswith("experts.down_proj"):
        assert module.down_proj.shape == (4, WIDTH, INNER)
        return 2
    return 1 if isinstance(module, nn.Linear) or name.endswith("mlp.gate.weight") else None


def rounded(model: nn.Module) -> nn.Module:
    """A plain deep copy whose weights were rounded by hand."""
    plain = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, axis in block_axes(plain).items():
            weight = plain.get_parameter(name)
            weight.copy_(rounding.rtn(weight, FORMAT, axis))
    return plain


def assert_same_gradients(run: Trained, tolerance: float = 1e-5) -> None:
    """Every parameter, to the tolerance of its own norm; a gradient that is zero in theory, of the whole norm."""
    theirs = {name: p.grad for name, p in run.plain.named_parameters()}
    assert run.gradients.keys() == theirs.keys()
    total = torch.stack([grad.norm() for grad in theirs.values() if grad is not None]).norm()
    for name, grad in theirs.items():
        mine = run.gradients[name]
        assert (mine is None) == (grad is None), name
        if grad is not None:
            assert (mine - grad).norm() <= tolerance * torch.maximum(grad.norm(), 1e-4 * total), name


def assert_covered(model: nn.Module) -> None:
    """The report has a row for each parameter, the expected ones are quantized and analytic, the others say why not."""
    report, axes = lotion_fx.report(model), block_axes(model)
    assert {row.name for row in report.rows} == {name for name, _ in model.named_parameters()}
    assert {row.name: row.block_axis for row in report.rows if row.format} == axes
    for row in report.rows:
        if row.name in axes:
            assert (row.estimator, row.reason, row.format) == ("analytic", "", "nvfp4"), row
            assert row.term > 0, row
        else:
            assert row.reason and row.estimator is None, row


# -------------------------------------------------------------------------------------------------- what every one does


@every_model
def test_gradients_of_the_loss_are_unchanged(name):
    assert_same_gradients(trained(name))


@every_model
def test_every_parameter_is_explained(name):
    model = trained(name).model
    assert len(block_axes(model)) > 5
    assert_covered(model)


@every_model
def test_embeddings_norms_and_biases_stay_out(name):
    model = trained(name).model
    reasons = {row.name: row.reason for row in lotion_fx.report(model).rows if not row.format}
    for prefix, module in model.named_modules():
        for full_name, parameter in module.named_parameters(prefix, recurse=False):
            if isinstance(module, nn.Embedding):
                assert "embedding" in reasons[full_name]
            elif parameter.dim() < 2:
                assert reasons[full_name] == "fewer than two dimensions"
    if name in ("tied_llama", "gpt2"):
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        table = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
        assert reasons[table] == "embedding, tied to a contraction"


@every_model
def test_evaluation_runs_at_weights_rounded_by_hand(name):
    run = trained(name)
    with torch.no_grad():
        mine, theirs = (model(**run.batch).logits for model in (run.model.eval(), rounded(run.model)))
        latent = copy.deepcopy(run.model)(**run.batch).logits
    run.model.train()
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert (mine - latent).norm() > 1e-3 * latent.norm(), "rounding shows"


# -------------------------------------------------------------------------------------------------------- the curvature


def hooked_curvature(plain: nn.Module, batch, names) -> dict[str, torch.Tensor]:
    """``h = T / N * outer(sum g^2, sum x^2)`` of each layer in float64, from hooks. T is the number of labels."""
    plain = copy.deepcopy(plain).double().train()
    plain.zero_grad()
    inputs, outputs = {}, {}

    def keep(module, args, output):
        inputs[module] = args[0].detach().flatten(0, -2)
        output.register_hook(lambda grad: outputs.__setitem__(module, grad.flatten(0, -2)))

    layers = {name: plain.get_submodule(name.removesuffix(".weight")) for name in names}
    for layer in layers.values():
        layer.register_forward_hook(keep)
    plain(**{key: x.double() if x.is_floating_point() else x for key, x in batch.items()}).loss.backward()
    labels = batch["labels"]
    terms = (labels[:, 1:] if labels.dim() > 1 else labels).ne(-100).sum()  # a causal model shifts its labels
    curvatures = {}
    for name, layer in layers.items():
        g, x = outputs[layer].square().sum(0), inputs[layer].square().sum(0)
        h = terms / len(inputs[layer]) * torch.outer(g, x)
        curvatures[name] = h.T if isinstance(layer, transformers.pytorch_utils.Conv1D) else h
    return curvatures


def curvature_of(model: nn.Module, name: str) -> torch.Tensor:
    """The estimate after a first step, from the state."""
    weight = registry[model.get_parameter(name)]
    assert weight is not None and weight.curvature.ema is not None
    return dense(weight.curvature.ema, weight.layout, (0, weight.shape[0])).double()


def assert_curvature(run: Trained, names, tolerance: float = 1e-4) -> None:
    for name, h in hooked_curvature(run.plain, run.batch, names).items():
        error = (curvature_of(run.model, name) - h).norm() / h.norm()
        assert error < tolerance, (name, error)


HOOKED = {
    "llama": ["lm_head.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"],
    "gpt2": ["transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.weight"],
    "bert": ["classifier.weight", "bert.pooler.dense.weight", "bert.encoder.layer.0.attention.self.query.weight"],
    "mixtral": ["lm_head.weight", "model.layers.0.self_attn.o_proj.weight"],
}


@pytest.mark.parametrize("name", HOOKED)
def test_factored_curvature_is_what_hooks_compute(name):
    run = trained(name)
    assert run.batch["labels"].ne(-100).all() == (name == "bert"), "the others ignore some labels"
    assert_curvature(run, HOOKED[name])


def test_full_curvature_of_experts_is_the_sum_over_tokens():
    """In the last layer a token's loss reaches the weights through its own position alone."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    run = step(mixtral(), text(), curvature="full")
    names = [f"model.layers.1.mlp.{n}" for n in ("experts.gate_up_proj", "experts.down_proj", "gate.weight")]
    logits = run.plain.double()(input_ids=run.batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    labels = run.batch["labels"][:, 1:].flatten()
    kept = labels.ne(-100)
    losses = F.cross_entropy(logits[kept], labels[kept], reduction="none") / kept.sum()
    weights = [run.plain.get_parameter(name) for name in names]
    h = [torch.zeros_like(weight) for weight in weights]
    for loss in losses:
        for total, grad in zip(h, torch.autograd.grad(loss, weights, retain_graph=True), strict=True):
            total += kept.sum() * grad**2
    for name, expected in zip(names, h, strict=True):
        assert (curvature_of(run.model, name) - expected).norm() < 1e-4 * expected.norm(), name


# ------------------------------------------------------------------------------------------------ the ways people train


def fresh(make=llama):
    torch._dynamo.reset()
    torch.manual_seed(0)
    return make()


def test_gradient_checkpointing():
    model = fresh()
    plain = copy.deepcopy(model)
    # transformers 5.23 renamed it and warns.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    plain.config.use_cache = model.config.use_cache = False  # else a logging call breaks the graph
    run = step(model, text(), plain)
    assert_same_gradients(run)
    assert_covered(run.model)
    assert_curvature(run, HOOKED["llama"])


def test_autocast():
    run = step(fresh(), text(), context=lambda: torch.autocast("cpu", torch.bfloat16))
    assert_same_gradients(run, 0.02)
    assert_covered(run.model)
    assert_curvature(run, HOOKED["llama"], 0.05)


@pytest.mark.parametrize("frozen", [("q_proj",), ("lm_head",), ("lm_head", "mlp", "o_proj")], ids="+".join)
def test_frozen_weights_have_no_term(frozen):
    model = fresh()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    run = step(model, text())
    assert_same_gradients(run)
    report = lotion_fx.report(model)
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value) and model.get_parameter(name).grad is None
        row = report[name]
        assert row.format == "nvfp4" and row.estimator is None and row.reason and row.term is None, row
    trainable = [n for n in block_axes(model) if n not in before]
    assert trainable and all(report[n].estimator == "analytic" and report[n].term > 0 for n in trainable)
    assert_curvature(run, [n for n in trainable if "k_proj" in n or "down_proj" in n])


class Adapted(nn.Module):
    """A frozen linear layer with a trained low-rank correction."""

    def __init__(self, base: nn.Linear, rank: int = 4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def test_low_rank_adapters():
    model = fresh().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj, layer.mlp.up_proj = Adapted(layer.self_attn.q_proj), Adapted(layer.mlp.up_proj)
    run = step(model, text())
    assert_same_gradients(run)
    rows = {row.name: row for row in lotion_fx.report(model).rows}
    adapters = [name for name in rows if name.endswith((".a.weight", ".b.weight"))]
    assert len(adapters) == 8 and all(rows[name].estimator == "analytic" for name in adapters)
    assert rows["model.layers.0.self_attn.q_proj.base.weight"].term is None
    assert_curvature(run, adapters)


class LSTMClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def test_an_lstm_is_reached_by_no_graph():
    model = fresh(LSTMClassifier)
    x, labels = torch.randn(4, 6, 16), torch.tensor([0, 1, 2, 0])
    plain = copy.deepcopy(model)
    lotion_fx.transform(model, FORMAT, inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for each in (model, plain):
        F.cross_entropy(each(x), labels).backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    gradient = model.lstm.weight_ih_l0.grad.clone()
    with pytest.warns(UserWarning, match="no compiled graph contains lstm.weight_ih_l0, lstm.weight_hh_l0"):
        optimizer.step()
    rows = {row.name: row for row in lotion_fx.report(model).rows}
    for name in ("lstm.weight_ih_l0", "lstm.weight_hh_l0"):
        assert rows[name].estimator == "fisher" and rows[name].reason == "reached by no compiled graph"
        assert rows[name].format == "nvfp4" and rows[name].term > 0
    # Dynamo skips the whole frame that calls an LSTM, and with it the layers around.
    assert rows["head.weight"].estimator in ("analytic", "fisher") and rows["lstm.bias_ih_l0"].format is None
    squares = 4 * gradient.square()  # T = 4 labels
    expected = torch.outer(squares.sum(1), squares.sum(0)) / squares.sum()
    torch.testing.assert_close(curvature_of(model, "lstm.weight_ih_l0").float(), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()  # said once
    by_hand = copy.deepcopy(model).eval()
    with torch.no_grad():
        for weight in (by_hand.lstm.weight_ih_l0, by_hand.lstm.weight_hh_l0, by_hand.head.weight):
            weight.copy_(rounding.rtn(weight, FORMAT, 1))
        torch.testing.assert_close(model.eval()(x), by_hand(x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_llama_under_inductor():
    run = step(fresh(), text(), inner="inductor")
    assert_same_gradients(run, 1e-4)
    assert_covered(run.model)
    assert_curvature(run, HOOKED["llama"])
    with torch.no_grad():
        mine, theirs = (model(**run.batch).logits for model in (run.model.eval(), rounded(run.model)))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
