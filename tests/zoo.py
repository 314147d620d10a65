"""Models nobody here wrote, one step of each, and what plain PyTorch makes of the same."""

import copy
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx.numerics import rounding
from lotion_fx.passes.attach.part import Part
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
ONE_LAYER = {"num_hidden_layers": 1}  # that layers share a frame's code, llama, mixtral and gpt2 show
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FORMAT = lotion_fx.resolve("nvfp4")


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(DECODER | options)))


def tied_llama():
    return llama(tie_word_embeddings=True, **ONE_LAYER)


def qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER | ONE_LAYER, head_dim=8))


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
    config = transformers.BertConfig(**SIZES | ONE_LAYER, **NO_DROPOUT, max_position_embeddings=64, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def vit():
    sizes = {name: size for name, size in (SIZES | ONE_LAYER).items() if name != "vocab_size"}
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


@dataclass
class Trained:
    """A model after one step, with what an untouched copy made of the same batch."""

    model: nn.Module
    plain: nn.Module
    batch: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor | None]


def step(model, batch, plain=None, *, lr=1e-2, context=None, transformed=None, **options) -> Trained:
    """Transforms a model, takes one step, and runs the batch through a plain copy, what is frozen rounded by hand."""
    plain = plain or copy.deepcopy(model)
    with torch.no_grad():
        for name, axis in block_axes(plain).items():
            weight = plain.get_parameter(name)
            weight.copy_(weight if weight.requires_grad else rounding.rtn(weight, FORMAT, axis))
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
    return dense(weight.curvature.ema, Part.whole(weight.layout)).double()


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


def fresh(make=llama):
    torch._dynamo.reset()
    torch.manual_seed(0)
    return make()
