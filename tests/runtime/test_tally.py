"""T, the number of loss terms of a step, is counted once, whatever the backward passes do."""

import pytest
import torch
from torch import nn

import lotion_fx
from lotion_fx.state import registry
from tests.models import LM, counted, ids, lm_loss
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


def term_after(losses, zero, before_backward=False):
    """The term and T after losses, (factor, whether a step follows), whose gradients ``zero`` drops."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = counted(LM(), "int4", inner="aot_eager", decay=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for factor, steps in losses:
        if before_backward:  # forward, then zero, then backward
            loss = factor * lm_loss(model, ids())
            zero(optimizer)
            loss.backward()
        else:
            (factor * lm_loss(model, ids())).backward()
        if steps:
            optimizer.step()
        if not before_backward:
            zero(optimizer)
    return lotion_fx.report(model).term, registry[model.head.weight].smoothing.tally.last_loss_count


DROPPED = [(1.0, True), (1000.0, False), (1.0, True)]


@pytest.mark.parametrize("before_backward", [False, True])
@pytest.mark.parametrize("how", ["in place", "to none", "through data"])
def test_what_was_dropped_leaves_nothing(how, before_backward):
    """A step that is skipped for its size, or a generator's backward pass through a discriminator."""

    def zero(optimizer):
        if how != "through data":
            return optimizer.zero_grad(set_to_none=how == "to none")
        for parameter in optimizer.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.grad.data.zero_()

    plain, count = term_after([(1.0, True)] * 2, zero)
    term, counted_terms = term_after(DROPPED, zero, before_backward=before_backward)
    assert term == pytest.approx(plain, rel=1e-5) and counted_terms == count


def test_what_is_scaled_between_micro_batches_stays():
    model = counted(LM(), "int4", inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    lm_loss(model, ids(8)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    lm_loss(model, ids(6)).backward()
    optimizer.step()
    assert registry[model.head.weight].smoothing.tally.last_loss_count == 14 * 5
