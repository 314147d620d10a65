"""`suggest` finds the best choice of weights for 8 bits, at costs that are those of the expected loss."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx.numerics import rounding
from lotion_fx.state import registry
from lotion_fx.suggestion import Choice, _best, wide_of
from tests.models import LM, MLP, ids
from tests.runtime.steps import curvature, inputs_and_gradients


class Deep(nn.Module):
    """Six linear layers of sizes that fill no room evenly, some far more sensitive than others."""

    sizes = (8, 24, 40, 16, 56, 32, 5)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(self.sizes))
        with torch.no_grad():
            for layer, scale in zip(self.layers, (3.0, 0.5, 2.0, 1.0, 0.2, 4.0), strict=True):
                layer.weight.mul_(scale)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(64, 8, generator=generator), torch.randn(64, 5, generator=generator)


def costs_by_hand(model, fmt):
    """1/2 sum h sigma^2 of each weight, h by hooks in float64."""
    model, (x, y) = copy.deepcopy(model).double(), [part.double() for part in batch()]
    seen = inputs_and_gradients(model, lambda m: F.mse_loss(m(x), y))
    found = {}
    for index, layer in enumerate(model.layers):
        h = curvature(*seen[layer], "full", len(y))
        variance = rounding.variance(layer.weight.detach(), lotion_fx.resolve(fmt), 1)
        found[f"layers.{index}.weight"] = 0.5 * float((h * variance).sum())
    return found


@pytest.mark.parametrize(("fmt", "wide"), [("int4/8", "int8/8"), ("nvfp4", "mxfp8_e4m3")])
@pytest.mark.parametrize("bits", [4.0, 4.3, 5.0, 6.1, 7.2, 8.0])
def test_it_is_the_best_of_all_choices(fmt, wide, bits):
    model = Deep()
    narrow, broad = costs_by_hand(model, fmt), costs_by_hand(model, wide)
    size = {name: model.get_parameter(name).numel() for name in narrow}
    best = min(
        (sum(broad[n] if n in kept else narrow[n] for n in narrow), kept)
        for count in range(len(narrow) + 1)
        for kept in itertools.combinations(narrow, count)
        if sum(size[n] * (8 if n in kept else 4) for n in narrow) <= bits * sum(size.values())
    )
    found = lotion_fx.suggest(model, batch(), F.mse_loss, bits=bits, fmt=fmt)
    assert found.before == pytest.approx(sum(narrow.values()), rel=1e-4)
    assert found.after == pytest.approx(best[0], rel=1e-4)
    assert dict(found.only) == dict.fromkeys(best[1], wide)
    assert found.bits <= bits and found.bits == pytest.approx(
        sum(size[n] * (8 if n in best[1] else 4) for n in narrow) / sum(size.values())
    )


def test_what_it_predicts_is_what_the_expected_loss_of_the_model_so_transformed_is():
    model, data = Deep().double(), [part.double() for part in batch()]  # a difference of two losses
    found = lotion_fx.suggest(model, data, F.mse_loss, bits=5.5, fmt="int4/8")
    for only, predicted in (({}, found.before), (found.only, found.after)):
        made = lotion_fx.transform(copy.deepcopy(model), "int4/8", only=only, curvature="full", inner="aot_eager")
        expected = lotion_fx.expected_loss(made, data, F.mse_loss, moments="off")
        assert predicted == pytest.approx(float((expected.total - expected.loss).detach()), rel=1e-5)


def test_a_plain_model_stays_plain_and_a_transformed_one_is_taken_as_it_is():
    model = Deep()
    before = copy.deepcopy(model.state_dict())
    found = lotion_fx.suggest(model, batch(), F.mse_loss, fmt="int4/8", only={"layers.0.*": None})
    assert all(registry[p] is None for p in model.parameters()) and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert next(iter(found.only)) == "layers.0.*" and found.only["layers.0.*"] is None
    assert "layers.0.weight" not in {choice.name for choice in found.choices}
    made = lotion_fx.transform(
        copy.deepcopy(model), "int4/8", only={"layers.0.*": None}, curvature="full", inner="aot_eager"
    )
    again = lotion_fx.suggest(made, batch(), F.mse_loss)
    assert again.after == pytest.approx(found.after) and again.bits == found.bits
    fresh = {row.name: row.format for row in lotion_fx.report(follow(model, again)).rows}
    assert fresh["layers.0.weight"] is None and {fresh[c.name] for c in again.choices} == {"int4/8", "int8/8"}


def follow(model, suggestion):
    return lotion_fx.transform(copy.deepcopy(model), "nvfp4", only=suggestion.only, inner="aot_eager")


def test_embeddings_and_norms_are_no_choice():
    found = lotion_fx.suggest(
        LM(), (ids(), ids(seed=1)), lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten())
    )
    assert {choice.name for choice in found.choices} == {"mlp.0.weight", "mlp.2.weight", "head.weight"}
    assert found.after <= found.before and "head.weight" in str(found) and "bits on average" in str(found)


def test_the_search_is_exact_where_greed_is_not():
    four, eight = lotion_fx.resolve("int4"), lotion_fx.resolve("int8")
    sizes, gains = (10, 9, 9), (11.0, 9.5, 9.4)
    choices = [Choice(str(i), s, (four, eight), (g, 0.0)) for i, (s, g) in enumerate(zip(sizes, gains, strict=True))]
    assert _best(choices, 18 * 4) == {"1", "2"} and _best(choices, 10 * 4) == {"0"} and _best(choices, 0) == set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = torch.randint(1, 50, (9,), generator=generator).tolist()
        gains = torch.rand(9, generator=generator).tolist()
        choices = [
            Choice(str(i), s, (four, eight), (g, 0.0)) for i, (s, g) in enumerate(zip(sizes, gains, strict=True))
        ]
        choices.sort(key=lambda c: c.gain / c.extra, reverse=True)
        room = 4 * sum(sizes) / 3
        kept = _best(choices, room)
        best = max(
            sum(c.gain for c in subset)
            for count in range(10)
            for subset in itertools.combinations(choices, count)
            if sum(c.extra for c in subset) <= room
        )
        assert sum(c.extra for c in choices if c.name in kept) <= room
        assert sum(c.gain for c in choices if c.name in kept) == pytest.approx(best)


def test_relatives_of_eight_bits():
    found = {
        fmt: wide_of(lotion_fx.resolve(fmt)).name for fmt in ("int4", "int3/128", "int4/tensor", "nf4", "fp4", "int8")
    }
    assert found == {"int4": "int8", "int3/128": "int8/128", "int4/tensor": "int8/tensor", "nf4": "int8"} | {
        "fp4": "fp8",
        "int8": "int8",
    }
    for fmt in ("nvfp4", "mxfp4", "mxfp6", "mxfp4/floor"):
        assert wide_of(lotion_fx.resolve(fmt)).name == "mxfp8_e4m3"


BAD = [
    (dict(bits="5"), TypeError, "bits='5', of type str: expected an average number of bits"),
    (dict(bits=None), TypeError, "bits=None"),
    (
        dict(bits=3.0),
        ValueError,
        "bits=3.0: the formats take 4 on average already; ask for more, or for a narrower format",
    ),
    (dict(fmt="int44"), ValueError, "fmt='int44'"),
    (dict(only="int4"), TypeError, "only='int4': expected a mapping"),
    (dict(loss_fn="mse"), ValueError, "loss_fn='mse'"),
    (dict(model=[MLP()]), TypeError, "expected an nn.Module, not list"),
    (dict(batch=5), ValueError, "batch: expected"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[bad[2] for bad in BAD])
def test_bad_arguments_are_named(arguments, error, message):
    arguments = {"model": Deep(), "batch": batch(), "loss_fn": F.mse_loss} | arguments
    with pytest.raises(error, match=message):
        lotion_fx.suggest(**arguments)


def test_a_weight_of_eight_bits_already_gains_nothing():
    """Its gain a bit was a division by 0 when it was shown."""
    x, y = torch.randn(8, 20), torch.arange(8) % 7
    found = lotion_fx.suggest(MLP(), (x, y), F.cross_entropy, bits=7.9, fmt="int4", only={"up.weight": "int8"})
    assert {c.name: c.extra for c in found.choices}["up.weight"] == 0 and "up.weight" in str(found)
