"""`verify`: an export against the model that was trained."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx.deploy.layouts import lotion
from tests.deploy.test_exporting import trained
from tests.models import MLP, VOCAB


def test_an_export_is_what_was_trained(tmp_path):
    model, tokens = trained(), torch.randint(VOCAB, (4, 6))
    lotion_fx.export(model, tmp_path / "model")
    found = lotion_fx.verify(tmp_path / "model", model, tokens)
    assert found.is_exact and found.outputs == (0.0, 0.0) and not model.training
    assert {w.name for w in found.weights} == set(lotion_fx.quantized(model))
    assert "outputs equal" in str(found) and "DIFFERENT" not in str(found)


def test_a_model_that_trained_on_is_another(tmp_path):
    model, tokens = trained(), torch.randint(VOCAB, (4, 6))
    lotion_fx.export(model, tmp_path / "model")
    changed = next(iter(lotion_fx.quantized(model)))
    with torch.no_grad():
        model.get_parameter(changed)[0].neg_()
    found = lotion_fx.verify(tmp_path / "model", model, tokens)
    assert not found.is_exact and found.outputs[0] > 0
    assert [w.is_equal for w in found.weights] == [w.name != changed for w in found.weights]
    assert "DIFFERENT" in str(found) and "outputs differ by" in str(found)


def test_a_bias_that_differs_is_told(tmp_path):
    model = lotion_fx.transform(MLP(), "int4", inner="eager").eval()
    lotion_fx.export(model, tmp_path / "model")
    assert lotion_fx.verify(tmp_path / "model", model).is_exact
    with torch.no_grad():
        model.up.bias[0].add_(1)
    found = lotion_fx.verify(tmp_path / "model", model)
    assert not found.is_exact and found.others == ("up.bias",) and all(w.is_equal for w in found.weights)
    assert "up.bias" in str(found)


def test_contexts_that_change_the_forward_do_not_change_the_comparison(tmp_path):
    model, tokens = trained(), torch.randint(VOCAB, (4, 6))
    lotion_fx.export(model, tmp_path / "model")
    with lotion_fx.full_precision(model):
        assert lotion_fx.verify(tmp_path / "model", model, tokens).outputs == (0.0, 0.0)
    with pytest.raises(ValueError, match="batch: outputs .* are empty or no finite numbers"):
        lotion_fx.verify(tmp_path / "model", model, tokens[:0])


def test_each_weight_s_part_of_the_loss_is_told(tmp_path):
    """Realized: against a plain model with that weight alone rounded by hand."""
    torch.manual_seed(0)
    model = lotion_fx.transform(MLP(), "int3", inner="aot_eager")
    batch = torch.randn(64, 20), torch.randn(64, 7)
    F.mse_loss(model(batch[0]), batch[1]).backward()
    lotion_fx.export(model, tmp_path / "model")
    found = {w.name: w for w in lotion_fx.verify(tmp_path / "model", model, batch, F.mse_loss).weights}
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, weight in lotion_fx.quantized(model).items():
        plain = MLP()
        plain.load_state_dict(own)
        plain.requires_grad_(False)
        before = F.mse_loss(plain(batch[0]), batch[1])
        plain.get_parameter(name).data = weight.dequantize()
        assert found[name].realized == pytest.approx(float(F.mse_loss(plain(batch[0]), batch[1]) - before), abs=1e-6)
        assert found[name].expected > 0
    assert all(torch.equal(p, own[name]) for name, p in model.named_parameters()) and model.training


def test_a_forward_that_changes_its_inputs_is_compared_on_what_was_given(tmp_path):
    class Scaled(MLP):
        def forward(self, x):
            return super().forward(x.mul_(0.25))

    model = lotion_fx.transform(Scaled(), "int4", inner="aot_eager")
    batch = torch.randn(64, 20), torch.randn(64, 7)
    F.mse_loss(model(batch[0].clone()), batch[1]).backward()
    lotion_fx.export(model, tmp_path / "model")
    given = batch[0].clone(), batch[1]
    found = lotion_fx.verify(tmp_path / "model", model, given, F.mse_loss)
    assert found.outputs == (0.0, 0.0) and torch.equal(given[0], batch[0])
    latent, alone = MLP(), MLP()
    for name, weight in lotion_fx.quantized(model).items():
        latent.load_state_dict(dict(model.named_parameters()))
        alone.load_state_dict({**dict(model.named_parameters()), name: weight.dequantize()})
        losses = [F.mse_loss(each(batch[0] * 0.25), batch[1]).item() for each in (latent, alone)]
        realized = next(w.realized for w in found.weights if w.name == name)
        assert realized == pytest.approx(losses[1] - losses[0], abs=1e-6)


def test_what_is_no_export_or_is_damaged_is_refused(tmp_path):
    model = trained()
    with pytest.raises(ValueError, match="no export of lotion_fx is here"):
        lotion_fx.verify(tmp_path, model)
    with pytest.raises(ValueError, match="no export of lotion_fx is here"):
        lotion_fx.verify(tmp_path / "nothing.bin", model)
    lotion_fx.export(model, tmp_path / "model")
    (tmp_path / "model" / lotion.FILE).write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged: it has 1 bytes"):
        lotion_fx.verify(tmp_path / "model", model)


def exported(model, path, fmt="int2/16", **options):
    model = lotion_fx.transform(model, fmt, inner="eager", **options).eval()
    lotion_fx.export(model, path)
    return model


def layers(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), *more)


def test_an_export_is_read_by_what_it_tells_itself(tmp_path):
    """By the formats of the model that it was compared with, what differed was called exact, or damaged."""
    exported(layers(), tmp_path / "model")
    kept = lotion_fx.transform(layers(), "int2/16", inner="eager", only={"1.weight": None})
    assert lotion_fx.verify(tmp_path / "model", kept).others == ("1.weight",)
    finer = lotion_fx.transform(layers(), "int4/16", inner="eager")
    found = lotion_fx.verify(tmp_path / "model", finer)
    assert not found.is_exact and [w.is_equal for w in found.weights] == [False, False]


@pytest.mark.parametrize("is_longer", [True, False])
def test_what_only_one_has_is_different(tmp_path, is_longer):
    exported(layers(nn.Linear(16, 4)) if is_longer else layers(), tmp_path / "model")
    other = lotion_fx.transform(layers() if is_longer else layers(nn.Linear(16, 4)), "int2/16", inner="eager")
    found = lotion_fx.verify(tmp_path / "model", other)
    assert not found.is_exact and "2.bias" in found.others
    assert ("2.weight" in found.others) is is_longer
    assert [w.name for w in found.weights if not w.is_equal] == ([] if is_longer else ["2.weight"])


@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_is_another_than_untied(tmp_path, is_tied):
    def made(ties):
        model = layers()
        model[1].weight = model[0].weight if ties else nn.Parameter(model[0].weight.detach().clone())
        return model

    exported(made(is_tied), tmp_path / "model")
    other = lotion_fx.transform(made(not is_tied), "int2/16", inner="eager").eval()
    assert not lotion_fx.verify(tmp_path / "model", other).is_exact


def test_arguments_that_do_not_fit_are_told(tmp_path):
    model = exported(layers(), tmp_path / "model")
    with pytest.raises(ValueError, match=r"batch: expected \(inputs, targets\) with loss_fn, got NoneType"):
        lotion_fx.verify(tmp_path / "model", model, loss_fn=F.mse_loss)
    with pytest.raises(TypeError, match="path=None"):
        lotion_fx.verify(None, model)
    with pytest.raises(TypeError, match="path=None"):
        lotion_fx.load(None)


def test_outputs_are_of_the_model_that_load_gives(tmp_path):
    """Cast to bfloat16 with its rotary frequencies, which no state holds, a model runs otherwise than as loaded."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    model = exported(transformers.LlamaForCausalLM(config).bfloat16(), tmp_path / "model", "mxfp4")
    given = {"input_ids": torch.randint(96, (3, 12))}
    with torch.no_grad():
        loaded = lotion_fx.load(tmp_path / "model", packed=False)(**given).logits.double()
        apart = float((loaded - model(**given).logits.double()).abs().max())
    found = lotion_fx.verify(tmp_path / "model", model, given)
    assert found.is_exact and found.outputs[0] == apart > 0


def test_a_class_that_transformers_lacks_is_compared_by_a_copy(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Own(transformers.LlamaForCausalLM):
        """`load` is given it by its user."""

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    model = exported(Own(config), tmp_path / "model", "mxfp4")
    found = lotion_fx.verify(tmp_path / "model", model, {"input_ids": torch.randint(64, (2, 8))})
    assert found.is_exact and found.outputs == (0.0, 0.0)
