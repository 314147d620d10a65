"""T, the number of loss terms of a step, is counted once, whatever the backward passes do."""

import pytest
import torch
from torch import nn

import lotion_fx
from lotion_fx.state import registry
from tests.models import LM, ids, lm_loss
from tests.runtime.steps import one_step


def test_terms_add_up_over_forwards_and_backwards():
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager")
    smoothing = registry[model.head.weight].smoothing
    ((lm_loss(model, ids(8)) + lm_loss(model, ids(6))) / 2).backward()  # two forwards, one backward
    assert smoothing.tally.loss_count == (8 + 6) * 5
    (lm_loss(model, ids(4)) / 3).backward()
    assert smoothing.tally.loss_count == (8 + 6 + 4) * 5
    head_left_out = [p for p in model.parameters() if p is not model.head.weight]
    optimizer = torch.optim.SGD(head_left_out, lr=0.1)
    optimizer.step()
    for _ in range(3):
        one_step(model, optimizer, lambda m: lm_loss(m, ids(8)))
        assert smoothing.tally.last_loss_count == 40


def test_a_backward_that_raised_does_not_stop_the_count():
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def fail(_):
        raise RuntimeError("out of memory")

    handle = model.mlp[0].weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        lm_loss(model, ids(2)).backward()
    handle.remove()
    for batch in (8, 6):
        one_step(model, optimizer, lambda m, batch=batch: lm_loss(m, ids(batch)))
        assert registry[model.head.weight].smoothing.tally.last_loss_count >= batch * 5
    assert registry[model.head.weight].smoothing.tally.last_loss_count == 30


class Checkpointed(nn.Module):
    """A block that runs again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)


@pytest.mark.parametrize("regions", [False, True])
def test_what_checkpointing_recomputes_is_counted_once(regions):
    model = Checkpointed()
    lotion_fx.transform(model, "int4", inner="aot_eager", regions=[model.block] if regions else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    one_step(model, optimizer, lambda m: m(torch.randn(10, 16)).square().mean())
    assert lotion_fx.state_dict(model)["phases"][0]["terms"] == 10
