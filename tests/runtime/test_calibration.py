"""`calibrate`: the factors by themselves, on small models, and on the quickstart's trained model.

There what is predicted is what sampled roundings show, on text of the kind that it was trained on. On other text its
gradients are larger, and with them empirical curvature.
"""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx
from lotion_fx.calibration import _fit, _Measured, _own
from lotion_fx.examples import quickstart
from lotion_fx.passes.moments.certificate import Certificate
from lotion_fx.state import names_of
from tests.models import LM
from tests.runtime.expected_cases import affine, enumerated, lm_batch, lm_loss


def test_a_factor_is_the_mean_of_what_was_measured_and_of_the_common_one_weighted_by_their_certainty():
    """Bayes: a measured ratio of known error, around a prior at the common factor of a quarter's relative spread."""
    predicted, common = 2.0, 1.5
    for measured in (1.0, 3.0, 6.0):
        for error in (1e-6, 0.3, 0.75, 5.0, 1e6):
            of_ratio, of_prior = (predicted / error) ** 2, 1 / (0.25 * common) ** 2
            expected = (of_ratio * measured / predicted + of_prior * common) / (of_ratio + of_prior)
            assert _own(predicted, measured, error**2, common) == pytest.approx(expected)
    assert _own(0.0, 3.0, 0.0, common) == common  # nothing predicted, nothing to compare with
    assert _own(predicted, 0.0, 0.0, 0.0) == _own(predicted, 0.0, 0.0, 1e-9)  # no rounding changed the loss


@pytest.mark.parametrize(("measured", "expected"), [(1e3, 8.0), (1e-3, 1 / 8), (-5.0, 1 / 8), (3.0, 3.0)])
def test_a_factor_is_kept_within_its_limits(measured, expected):
    """Also of an increase that noise makes negative: a term of the other sign would push weights off their levels."""
    assert _own(1.0, measured, 0.0, 1.0) == pytest.approx(expected)
    assert _own(0.0, 1.0, 0.0, measured) == pytest.approx(expected)
    increases = _Measured(together=measured, alone={"a": measured}, error2={"a": 0.0})
    assert _fit([Single()], increases) == {"a": pytest.approx(expected)}


class Single:
    """One weight whose increase is 1."""

    def __init__(self) -> None:
        self.weights: dict[str, None] = {"a": None}
        self.certificates = {"a": Certificate("analytic")}

    def predicted(self, names: list[str], factors: dict[str, float]) -> float:
        return sum(factors.get(name, 1.0) for name in names)


def trained_lm(**options) -> nn.Module:
    torch.manual_seed(0)
    model = lotion_fx.transform(LM(), "int4/tensor", inner="aot_eager", calibrate=False, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(40):
        optimizer.zero_grad()
        inputs, targets = lm_batch(step)
        lm_loss(model(inputs), targets).backward()
        optimizer.step()
    return model


def test_calibration_meets_what_was_measured_on_other_batches():
    model = trained_lm()
    batches = [lm_batch(seed) for seed in range(100, 106)]
    factors = lotion_fx.calibrate(model, batches, lm_loss, samples=16, generator=torch.Generator().manual_seed(0))
    assert set(factors) == {"mlp.0.weight", "mlp.2.weight", "head.weight"}
    for moments in ("closed", "off"):
        predicted = measured = 0.0
        for seed in range(200, 206):
            result = lotion_fx.expected_loss(
                model, lm_batch(seed), lm_loss, 16, moments=moments, generator=torch.Generator().manual_seed(seed)
            )
            predicted += (result.total - result.loss).item()
            measured += result.sampled - result.loss.item()
        assert predicted / measured == pytest.approx(1, abs=0.1)


class Interacting:
    """Two weights whose increase is more than the sum of each one's, as `calibrate` asks an estimate for it."""

    def __init__(self) -> None:
        self.weights: dict[str, None] = {"a": None, "b": None}
        self.certificates = dict.fromkeys(self.weights, Certificate("analytic"))

    def predicted(self, names: list[str], factors: dict[str, float]) -> float:
        chosen = [factors.get(name, 1.0) for name in names]
        return sum(chosen) + (math.prod(chosen) if len(chosen) == 2 else 0.0)


def test_calibration_meets_the_increase_of_all_together():
    measured = _Measured(together=5.0, alone={"a": 1.0, "b": 1.0}, error2={"a": 0.0, "b": 0.0})
    factors = _fit([Interacting()], measured)
    assert Interacting().predicted(["a", "b"], factors) == pytest.approx(5, rel=0.05)


def test_calibration_scales_the_step_s_term_and_is_saved():
    model = trained_lm()
    batch = lm_batch(50)
    gradients = []
    for factor in (None, 0.5):
        if factor is not None:
            state = lotion_fx.state_dict(model)
            for saved in state["weights"].values():
                saved["gains"] = [1.0, factor]
            lotion_fx.load_state_dict(model, state)
            assert lotion_fx.state_dict(model)["weights"]["head.weight"]["gains"] == [1.0, factor]
        before = lotion_fx.state_dict(model)
        model.zero_grad()
        lm_loss(model(batch[0]), batch[1]).backward()
        plain = model.head.weight.grad.clone()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        gradients.append(model.head.weight.grad - plain)
        lotion_fx.load_state_dict(model, before)
    torch.testing.assert_close(gradients[1], gradients[0] / 2)
    assert gradients[0].norm() > 0


def test_calibration_leaves_exact_terms_and_waits_its_turn():
    model = affine([3, 2], True, 0)
    batch = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    lotion_fx.transform(model, "int4/tensor", inner="aot_eager", loss_fn=F.mse_loss)
    assert lotion_fx.calibrate(model, [batch], F.mse_loss, every=2) != {}
    assert lotion_fx.expected_loss(model, batch, F.mse_loss).certificates["0.weight"].kind == "exact"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    done = []
    for _ in range(4):
        lotion_fx.training_loss(model, batch).backward()
        optimizer.step()
        done.append(bool(lotion_fx.calibrate(model, [batch], F.mse_loss, every=2)))
    assert done == [False, True, False, True]


def test_calibration_leaves_the_user_s_strength_and_what_it_cannot_redo():
    model = affine([3, 2], True, 0)
    batch = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    lotion_fx.transform(model, "int4/tensor", inner="eager", strength=3.0)
    assert lotion_fx.calibrate(model, [batch], F.mse_loss)["0.weight"] == pytest.approx(1, abs=0.8)
    result = lotion_fx.expected_loss(model, batch, F.mse_loss)  # in the stream, where it is exact
    exact = enumerated(model, *batch, "int4/tensor")
    assert float(result.terms["0.weight"]) == pytest.approx(3 * (exact - result.loss).item(), rel=1e-9)
    before = lotion_fx.state_dict(model)["weights"]["0.weight"]["gains"]
    for bad in ([], [batch, "nonsense"]):
        with pytest.raises(ValueError):
            lotion_fx.calibrate(model, bad, F.mse_loss)
    assert lotion_fx.state_dict(model)["weights"]["0.weight"]["gains"] == before


def test_weights_on_their_levels_keep_their_factors():
    """Rounding them tells nothing: all of them after `round_`, or some."""
    model, given = trained_lm(), [lm_batch(50)]
    weights = names_of(model)
    for weight in weights:
        weight.gains = (2.0, 3.0)
    moving = "head.weight"
    latent = model.get_parameter(moving).detach().clone()
    lotion_fx.round_(model, given, lm_loss)
    assert lotion_fx.calibrate(model, given, lm_loss) == {}
    assert {weight.gains for weight in weights} == {(2.0, 3.0)}
    with torch.no_grad():
        model.get_parameter(moving).copy_(latent)
    found = lotion_fx.calibrate(model, given, lm_loss, generator=torch.Generator().manual_seed(0))
    assert set(found) == {moving} and 1 / 3 < found[moving] < 3
    assert {weights[weight]: weight.gains == (2.0, 3.0) for weight in weights if weight.selected} == {
        name: name != moving for name in lotion_fx.quantized(model)
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"samples": 1}, "at least 2 roundings"),
        ({"every": 0}, "number of optimizer steps"),
        ({"batches": []}, "at least one batch"),
    ],
)
def test_bad_calibrations_are_named(arguments, message):
    model = lotion_fx.transform(affine([3, 2], True, 0), "int4", inner="eager")
    batches = arguments.pop("batches", [(torch.randn(5, 3).double(), torch.randn(5, 2).double())])
    with pytest.raises(ValueError, match=message):
        lotion_fx.calibrate(model, batches, F.mse_loss, **arguments)


# ---------------------------------------------------------------------------------------------------- the quickstart

BATCHES, SAMPLES = 6, 5


@pytest.fixture(scope="module", params=["nvfp4", "int4", "int4/tensor"])
def trained(request):
    """A model after the quickstart's 600 steps, and random batches of the text."""
    training, _ = quickstart.split_files(quickstart.source_files(Path(sysconfig.get_paths()["stdlib"])))
    text = quickstart.tokens(training)
    torch.manual_seed(0)
    model = lotion_fx.transform(quickstart.GPT(), request.param, inner="aot_eager")
    quickstart.fit(model, 0, 600, text, lambda step: None)
    starts = torch.randint(
        len(text) - quickstart.CONTEXT, (2 * BATCHES, quickstart.BATCH), generator=torch.Generator().manual_seed(0)
    )
    return model, [(w[:, :-1], w[:, 1:]) for w in (quickstart.windows(text, at) for at in starts)]


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def compared(model: nn.Module, batches: list[tuple[Tensor, Tensor]], moments: str) -> tuple[dict[str, float], float]:
    """Predicted over measured increase, for each weight alone and for all together, over several batches."""
    alone: dict[str, list[float]] = {}
    together = [0.0, 0.0]
    for seed, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(seed)
        result = lotion_fx.expected_loss(model, batch, loss_fn, SAMPLES, moments=moments, generator=generator)
        assert result.sampled is not None
        together[0] += (result.total - result.loss).item()
        together[1] += result.sampled - result.loss.item()
        for name, (predicted, measured, _) in result.alone.items():
            sums = alone.setdefault(name, [0.0, 0.0])
            sums[0] += predicted
            sums[1] += measured
    return {name: predicted / measured for name, (predicted, measured) in alone.items()}, together[0] / together[1]


@pytest.mark.slow
def test_the_quickstart_s_expected_loss_is_what_is_measured(trained):
    model, batches = trained
    alone, together = compared(model, batches[:3], "closed")
    print("predicted over measured:", f"{together:.3f}", {name: round(ratio, 2) for name, ratio in alone.items()})
    assert len(alone) == 9
    assert all(0.5 < ratio < 1.5 for ratio in alone.values()), alone
    assert 0.65 < together < 1.35
    lotion_fx.calibrate(model, batches[:BATCHES], loss_fn, samples=SAMPLES, generator=torch.Generator().manual_seed(1))
    for moments in ("closed", "off"):
        _, together = compared(model, batches[BATCHES:], moments)
        print("calibrated, on other batches:", moments, f"{together:.3f}")
        assert 0.9 < together < 1.1
