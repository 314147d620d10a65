"""`expected_loss` on the quickstart's trained model: what it predicts is what sampled roundings show.

On text of the kind that it was trained on. On other text its gradients are larger, and with them empirical curvature.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx
from lotion_fx.examples import quickstart

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
