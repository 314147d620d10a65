"""PEFT in both orders: the base is trained against at its rounded values, adapters stay, what is merged is rounded."""

import pytest
import torch

import lotion_fx

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
IDS = torch.randint(3, 64, (4, 8), generator=torch.Generator().manual_seed(0))


def base():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    return transformers.LlamaForCausalLM(config)


def adapted(model):
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))


def round_all(model):
    """A plain model's projections rounded by hand."""
    fmt = lotion_fx.resolve("int4")
    for name, weight in model.named_parameters():
        if ("_proj" in name or "lm_head" in name) and "lora" not in name:
            weight.data.copy_(lotion_fx.rounding.rtn(weight.detach(), fmt, 1))
    return model


def train(model):
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("order", ["transformed last", "transformed first"])
def test_a_lora_is_trained_against_the_base_that_is_deployed(order):
    plain = adapted(round_all(base()))  # QLoRA by hand
    if order == "transformed last":
        model = lotion_fx.transform(adapted(base()), "int4")
    else:
        model = adapted(lotion_fx.transform(base(), "int4"))
    assert train(model) == pytest.approx(train(plain), rel=1e-5)
    rows = lotion_fx.report(model).rows
    assert not [row.name for row in rows if "lora" in row.name and row.format]
    assert len([row for row in rows if row.format == "int4"]) == 8
    model.eval(), plain.eval()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)

    latent = base()  # to which the deltas are added, for merging works on the weights as they are
    merged = model.merge_and_unload()
    with torch.no_grad():
        for name, weight in latent.named_parameters():
            weight.copy_(merged.get_parameter(name))
    assert not torch.equal(latent.model.layers[0].mlp.down_proj.weight, base().model.layers[0].mlp.down_proj.weight)
    del model  # what was transformed may be gone
    torch.testing.assert_close(logits(merged.eval()), logits(round_all(latent).eval()), rtol=1e-4, atol=1e-5)
