"""What is believed of a noisily observed factor."""

import math

import pytest
import torch

from lotion_fx.gain import Gain, Gains, Predictions


def observed(true, error, count, seed=0):
    """Beliefs after so many observations of a factor, each with that relative error."""
    draw, gains = torch.Generator().manual_seed(seed), Gains(1)
    predicted = torch.tensor([0.02], dtype=torch.float64)
    for _ in range(count):
        noise = true * error * predicted * torch.randn(1, generator=draw, dtype=torch.float64)
        gains.observe(true * predicted + noise, predicted, (true * error * predicted) ** 2)
    return float(gains.mean), float(gains.error)


@pytest.mark.parametrize("true", [1 / 512, 0.1, 1.0, 16.0, 850.0])
def test_what_is_seen_well_is_believed_after_a_few(true):
    mean, error = observed(true, 0.1, 4)
    assert abs(mean / true - 1) < 3 * error / mean and error / mean < 0.25


@pytest.mark.parametrize("true", [1 / 512, 1.0, 4.0])
def test_what_is_seen_badly_is_averaged(true):
    found = [observed(true, 1.0, 64, seed) for seed in range(8)]
    assert abs(sum(mean for mean, _ in found) / 8 / true - 1) < 0.35
    assert all(abs(mean / true - 1) < 1 for mean, _ in found)


def test_noise_alone_leaves_the_expectation_near_one():
    draw, gains = torch.Generator().manual_seed(0), Gains(1)
    one = torch.ones(1, dtype=torch.float64)
    for _ in range(8):
        gains.observe(one + 50 * torch.randn(1, generator=draw, dtype=torch.float64), one, 2500 * one)
    assert 0.3 < float(gains.mean) < 5


def test_the_scale_of_a_loss_cancels():
    """Of c L, measured and predicted are c and c^2 times as large: where 1 is expected c times elsewhere, so is the
    outcome."""
    outcomes = []
    for scale in (1.0, 1000.0):
        gains = Gain()
        gains.shift(math.log(1 / scale))
        tensor = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
        gains.observe(tensor(0.03 * scale), tensor(0.02 * scale**2), tensor((0.02 * scale) ** 2))
        outcomes.append(float(gains.mean) * scale)
    assert outcomes[0] == pytest.approx(outcomes[1], rel=0.03)  # to the step of the grid


def test_a_factor_that_jumps_is_followed():
    gains, one = Gains(1), torch.ones(1, dtype=torch.float64)
    for true in [1.0] * 8 + [300.0] * 3:
        gains.observe(true * one, one, (0.1 * true) ** 2 * one)
    assert float(gains.mean) == pytest.approx(300, rel=0.2)


@pytest.mark.parametrize("told", [(math.nan, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, math.inf, 1.0), (1.0, 1.0, math.nan)])
def test_what_says_nothing_changes_nothing(told):
    gains = Gains(2)
    before = gains.density.clone()
    gains.observe(*(torch.tensor([x, 1.0], dtype=torch.float64) for x in told))
    assert torch.equal(gains.density[0], before[0]) and not torch.equal(gains.density[1], before[1])
    assert gains.density.isfinite().all()


def test_a_negative_measurement_is_a_small_factor():
    gains, one = Gains(1), torch.ones(1, dtype=torch.float64)
    for _ in range(4):
        gains.observe(-0.5 * one, one, 0.01 * one)
    assert 0 <= float(gains.mean) < 0.1


@pytest.mark.parametrize("followed", [0.0, 0.5, 1.0])
def test_how_far_the_truth_follows_its_prediction_is_learned(followed):
    """The prediction halves before each observation, the truth falls by a power of that."""
    gain, draw, found = Gain(), torch.Generator().manual_seed(0), []
    scalar = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
    for turn in range(9):
        predicted, truth = 0.5**turn, 3 * 0.5 ** (followed * turn)
        if turn:
            gain.follow(math.log(0.5))
        found.append(math.log(float(gain.mean) * predicted / truth))
        noise = 0.2 * truth * float(torch.randn((), generator=draw))
        gain.observe(scalar(truth + noise), scalar(predicted), scalar((0.2 * truth) ** 2))
    assert max(abs(error) for error in found[5:]) < 0.35  # before it is observed; a factor of 2 each turn
    if followed == 0:
        plain = Gains(1)
        for turn in range(8):
            plain.observe(*(scalar([x]) for x in (3.0, 0.5**turn, 0.36)))
        assert math.log(3.0 / (float(plain.mean) * 0.5**8)) > 0.5


def test_one_gain_alone_is_believed_as_several_are():
    """Where the prediction stays, shares make no difference."""
    one, several = Gain(), Gains(1)
    for told in ((2.0, 1.0, 0.04), (1.7, 1.0, 0.09)):
        one.observe(*(torch.tensor(x, dtype=torch.float64) for x in told))
        several.observe(*(torch.tensor([x], dtype=torch.float64) for x in told))
    assert float(one.mean) == pytest.approx(float(several.mean), rel=1e-12)
    assert float(one.error) == pytest.approx(float(several.error), rel=1e-12)


def test_nearly_all_must_fall_and_falling_is_told_once():
    predictions, names = Predictions(), "abcdefgh"
    assert predictions.told((name, 2.0) for name in names) == 0
    assert predictions.told((name, 0.02) for name in names[:4]) == 0  # experts without tokens
    assert predictions.told((name, 1.0) for name in names[4:]) == pytest.approx(math.log(0.5))
    assert predictions.told((name, 1.5) for name in names) == 0  # grown since
    assert predictions.told([("late", 8.0)]) == 0
    assert predictions.told((name, 0.5) for name in names) == pytest.approx(math.log(0.5), rel=1e-12)
    assert predictions.told([("late", 4.0)]) == 0  # it came when half was gone, so that all are down at a quarter
    assert predictions.fallen == pytest.approx(math.log(0.25))
