"""CAGE: the straight-through gradient with a pull beside it, against a training written by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx.schedule import METHODS, Schedule
from tests.models import LM, MLP, ids, lm_loss
from tests.runtime.steps import one_step

STEPS, LR = 10, 1e-2


def rounded(w):
    """int4 with a float scale a row: -7 to 7 times its absmax / 7."""
    scale = w.abs().amax(1, keepdim=True) / 7
    return (w / scale).round() * scale


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 20, generator=generator, dtype=torch.float64)


def by_hand(model, pull, silent):
    """Adam (Kingma & Ba, algorithm 1) on straight-through gradients, then the decoupled pull; in float64."""
    up, down = (nn.Parameter(linear.weight.detach().clone()) for linear in (model.up, model.down))
    moments = {w: (torch.zeros_like(w), torch.zeros_like(w)) for w in (up, down)}
    for step in range(STEPS):
        held = [(w + (rounded(w) - w).detach()) for w in (up, down)]
        loss = F.linear(F.gelu(F.linear(batch(step), held[0])), held[1]).square().mean()
        grads = torch.autograd.grad(loss, (up, down))
        ramp = max(0.0, (step - silent) / (STEPS - silent))
        with torch.no_grad():
            for w, grad in zip((up, down), grads, strict=True):
                first, second = moments[w]
                first.lerp_(grad, 0.1)
                second.lerp_(grad**2, 0.01)
                hat = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.99 ** (step + 1))
                w -= LR * hat[0] / (hat[1].sqrt() + 1e-8) + LR * pull * ramp * (w - rounded(w))
    return up, down


@pytest.mark.parametrize(
    "options, pull, silent",
    [
        ({"method": "cage", "steps": STEPS}, 10.0, 8),
        ({"schedule": (("ste", 0.3), ("cage", 0.7)), "steps": STEPS, "pull": 4.0}, 4.0, 3),
    ],
)
def test_it_is_adam_on_straight_through_gradients_and_a_pull(options, pull, silent):
    torch.manual_seed(0)
    model = MLP(bias=False).double()
    expected = by_hand(model, pull, silent)
    without = by_hand(model, 0.0, silent)
    lotion_fx.transform(model, "int4/channel", inner="aot_eager", **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=(0.9, 0.99))
    for step in range(STEPS):
        one_step(model, optimizer, lambda m, step=step: m(batch(step)).square().mean())
    for weight, known, other in zip((model.up.weight, model.down.weight), expected, without, strict=True):
        torch.testing.assert_close(weight, known, rtol=1e-9, atol=1e-12)
        assert (known - other).abs().max() > 1e-4, "the pull is seen"


def test_the_pull_is_silent_and_then_grows():
    schedule = Schedule(METHODS["cage"], 20)
    assert [schedule.ramp(step) if schedule.phase(step).pulls else 0.0 for step in range(20)] == pytest.approx(
        [0.0] * 16 + [0.0, 0.25, 0.5, 0.75]
    )


def test_each_group_pulls_at_its_own_rate():
    """Nothing moves at a rate of 0, and nothing but quantized weights is pulled."""
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager", schedule=(("cage", 1.0),), steps=4)
    own = [model.head.weight, model.norm.weight]
    rest = [p for p in model.parameters() if not any(p is mine for mine in own)]
    optimizer = torch.optim.SGD([{"params": own, "lr": 0.1}, {"params": rest}], lr=0.0)
    one_step(model, optimizer, lambda m: lm_loss(m, ids()))  # the ramp's 0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    distance = before["head.weight"] - lotion_fx.rounding.rtn(before["head.weight"], lotion_fx.resolve("int4"), 1)
    one_step(model, optimizer, lambda m: 0.0 * lm_loss(m, ids()))
    for name, parameter in model.named_parameters():
        moved = before[name] - 0.1 * 10 * 0.25 * distance if name == "head.weight" else before[name]
        torch.testing.assert_close(parameter, moved, rtol=0, atol=1e-7, msg=name)


def test_a_loop_by_hand_has_no_rate():
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager", method="cage", steps=9)
    lm_loss(model, ids()).backward()
    with pytest.raises(ValueError, match="pulls 'mlp.0.weight' by a share of the learning rate.*torch.optim"):
        lotion_fx.apply_term(model.parameters())


def test_a_shard_is_pulled_as_the_whole_is(tmp_path):
    """In blocks that shards keep, and in one that they cut."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for fmt in ("nvfp4", "int4/tensor"):
            found = []
            for is_sharded in (False, True):
                torch.manual_seed(0)
                model = lotion_fx.transform(LM(), fmt, inner="eager", schedule=(("cage", 1.0),), steps=4)
                if is_sharded:
                    fully_shard(model)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                for step in range(3):
                    one_step(model, optimizer, lambda m, step=step: lm_loss(m, ids(seed=step)))
                found.append([getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()])
            for one, other in zip(*found, strict=True):
                torch.testing.assert_close(one, other)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("pull", ["a", -1.0, float("inf")])
def test_a_bad_pull_is_refused(pull):
    with pytest.raises((TypeError, ValueError), match="pull=.*a finite number, 0 or more"):
        lotion_fx.transform(LM(), method="cage", steps=9, pull=pull)


def test_it_asks_for_the_number_of_steps():
    with pytest.raises(ValueError, match="method='cage' has phases.*pass steps="):
        lotion_fx.transform(LM(), method="cage")
