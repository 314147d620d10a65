"""Models nobody here wrote: gradients, coverage, block axes, evaluation and curvature, each against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from tests.zoo import (
    HOOKED,
    ZOO,
    assert_covered,
    assert_curvature,
    assert_same_gradients,
    block_axes,
    curvature_of,
    mixtral,
    rounded,
    step,
    text,
    trained,
)

every_model = pytest.mark.parametrize("name", ZOO)


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
        with lotion_fx.full_precision(run.model):
            latent = run.model(**run.batch).logits
    run.model.train()
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert (mine - latent).norm() > 1e-3 * latent.norm(), "rounding shows"


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
