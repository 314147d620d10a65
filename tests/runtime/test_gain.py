"""What is believed of a noisily observed factor."""

import math

import pytest
import torch

from lotion_fx.gain import WALK, Gains, Predictions, walked


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
        gains = Gains(1)
        gains.shift(math.log(1 / scale))
        tensor = lambda x: torch.tensor([x], dtype=torch.float64)  # noqa: E731
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


@pytest.mark.parametrize("grown", [1, 16])
def test_a_prediction_that_falls_alone_moves_the_factor_before_it_is_observed(grown):
    """It grows with the truth at first and then halves nine times, as squared residuals do, and the truth stays."""
    gain, predictions, draw, found = Gains(1), Predictions(), torch.Generator().manual_seed(0), []
    plain, scalar = Gains(1), lambda x: torch.tensor([x], dtype=torch.float64)
    for turn in range(-3, 9):
        predicted, truth = (grown ** (turn / 3), 3.0 * grown ** (turn / 3)) if turn < 0 else (0.5**turn, 3.0)
        gain.shift(-predictions.told([("weight", predicted)]))
        found.append([math.log(float(each.mean) * predicted / truth) for each in (gain, plain)])
        noise = 0.2 * truth * float(torch.randn((), generator=draw))
        for each in (gain, plain):
            each.observe(scalar(truth + noise), scalar(predicted), scalar((0.2 * truth) ** 2))
    assert max(abs(ours) for ours, _ in found[5:]) < 0.35
    assert max(without for _, without in found[5:]) < -0.3  # a factor of 2 each turn


def test_a_truth_that_falls_with_its_prediction_is_followed_down():
    gain, predictions, scalar = Gains(1), Predictions(), lambda x: torch.tensor([x], dtype=torch.float64)
    for turn in range(12):
        size = 0.7**turn
        gain.shift(-predictions.told([("weight", size)]))
        gain.observe(scalar(size), scalar(size), scalar((0.2 * size) ** 2))
        if turn > 4:
            assert abs(math.log(float(gain.mean))) < 0.35


def test_nearly_all_must_fall_from_their_peaks_and_falling_is_told_once():
    predictions, names = Predictions(), "abcdefgh"
    assert predictions.told((name, 1.0) for name in names) == 0
    assert predictions.told((name, 2.0) for name in names) == 0  # they grow
    assert predictions.told((name, 0.02) for name in names[:4]) == 0  # experts without tokens
    assert predictions.told((name, 1.0) for name in names[4:]) == pytest.approx(math.log(0.5))
    assert predictions.told([("late", 8.0)]) == 0
    assert predictions.told((name, 0.5) for name in names) == pytest.approx(math.log(0.5), rel=1e-12)
    assert predictions.told([("late", 4.0)]) == 0  # it came when half was gone, so that all are down at a quarter
    assert predictions.fallen == pytest.approx(math.log(0.25))
    assert predictions.told((name, 5.0) for name in [*names, "late"]) == 0  # grown beyond, and down again from there
    assert predictions.told((name, 2.5) for name in [*names, "late"]) == pytest.approx(math.log(0.5), rel=1e-12)


def test_predictions_told_one_by_one_are_those_told_together():
    """As where each weight has its own optimizer; one falls far in each round, another grows."""
    together, apart, moved = Predictions(), Predictions(), [0.0, 0.0]
    draw = torch.Generator().manual_seed(0)
    logs = torch.zeros(5)
    for _ in range(12):
        logs += 0.7 * torch.randn(5, generator=draw) - 0.2
        told = list(zip("abcde", logs.exp().tolist(), strict=True))
        moved[0] += together.told(told)
        moved[1] += sum(apart.told([one]) for one in told)
        assert apart.fallen == pytest.approx(together.fallen) and moved[1] == pytest.approx(moved[0])
        assert apart.known == together.known
    assert together.fallen < -0.5


def errors_after(steps, truth_at, walk, runs=40):
    """Mean error of the logarithm after an observation with an error of 30 % at each of these steps."""
    errors, draw, scalar = [], torch.Generator().manual_seed(0), lambda x: torch.tensor([x], dtype=torch.float64)
    for _ in range(runs):
        gain, before = Gains(1), 0
        for step in steps:
            truth, before, since = truth_at(step), step, before
            noisy = truth * (1 + 0.3 * float(torch.randn((), generator=draw)))
            gain.observe(scalar(noisy), scalar(1.0), scalar((0.3 * truth) ** 2), walk=walk(since, step))
        errors.append(abs(math.log(float(gain.mean) / truth)))
    return sum(errors) / runs


def test_a_factor_that_training_moves_early_is_followed_and_one_late_is_averaged():
    doubling, late = [2**k for k in range(8)], [10_000 + 200 * k for k in range(8)]
    plain = lambda before, now: WALK  # noqa: E731
    assert errors_after(doubling, math.sqrt, walked) < 0.8 * errors_after(doubling, math.sqrt, plain)
    assert errors_after(late, lambda _: 1.0, walked) < 0.15
    assert walked(200, 400) == pytest.approx(walked(2000, 4000), rel=1e-2) and walked(10_000, 10_200) == WALK
