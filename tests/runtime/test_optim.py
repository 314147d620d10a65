"""`lotion_fx.optim.AdamW` is `torch.optim.AdamW` plus the hook, whichever of the two makes the term.

The pass's own reference runs in place of the kernel here, so that all but the kernel is what a GPU would see.
"""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx.kernels import adamw_smooth as kernel
from lotion_fx.state import registry
from lotion_fx.term import TakesTerms
from tests.models import LM, counted, ids, lm_loss

TAKEN = {"mlp.0.weight": (40, 16), "mlp.2.weight": (16, 40), "head.weight": (23, 16)}  # of an LM with blocks of 8


@pytest.fixture
def on_cpu(monkeypatch):
    """The pass runs on CPU tensors; lists the weights of each launch."""
    launches = []

    def record(params, *args):
        launches.append([tuple(p.shape) for p in params])
        return original(params, *args)

    original = kernel.adamw_smooth
    monkeypatch.setattr(kernel, "adamw_smooth", record)
    monkeypatch.setattr(lotion_fx.optim.AdamW, "devices", ("cpu",))
    return launches


def make(cls, fmt="int4/8", curvature="fisher", groups=None, model=None, **settings):
    torch.manual_seed(0)
    model = LM() if model is None else model()
    counted(model, fmt, curvature=curvature, inner="eager", strength=3.0)
    params = model.parameters() if groups is None else groups(model)
    return model, cls(params, **{"lr": 1e-2, "weight_decay": 0.1, **settings})


def pair(**settings):
    return make(torch.optim.AdamW, **settings), make(lotion_fx.optim.AdamW, **settings)


def plain(model, optimizer, step):
    optimizer.zero_grad()
    lm_loss(model, ids(seed=step)).backward()
    optimizer.step()


def assert_same(a, b, tolerance=1e-6):
    (model, optimizer), (other, another) = a, b
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p - q).norm() <= tolerance * p.norm(), name
        mine, theirs = optimizer.state[p], another.state[q]
        assert list(mine) == list(theirs)
        assert torch.equal(mine["step"], theirs["step"])
        # Norms, for gradient and term cancel in places; the root, for a square's relative error is twice its base's.
        moments = [(s["exp_avg"], s["exp_avg_sq"].sqrt()) for s in (mine, theirs)]
        for m, n in zip(*moments, strict=True):
            assert (m - n).norm() <= tolerance * m.norm(), name


def clipped(model, optimizer, step):
    optimizer.zero_grad()
    lm_loss(model, ids(seed=step)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2 if step % 2 else 1e3)
    optimizer.step()


def accumulated(model, optimizer, step):
    optimizer.zero_grad()
    for chunk in ids(32, seed=step).split(8):
        (lm_loss(model, chunk) / 4).backward()
    optimizer.step()


def with_closure(model, optimizer, step):
    def closure():
        optimizer.zero_grad()
        loss = lm_loss(model, ids(seed=step))
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0


def with_finish(model, optimizer, step):
    if step == 2:
        lotion_fx.finish(model, term=step % 2 == 0)
    if step == 4:
        lotion_fx.finish(model, term=False)
    plain(model, optimizer, step)


def with_a_penalty(model, optimizer, step):
    optimizer.zero_grad()
    # Not after the first step: there the hook's curvature is of one gradient, the pass's of one with the term.
    (lm_loss(model, ids(seed=step)) + (lotion_fx.penalty(model) if step in (2, 4) else 0)).backward()
    optimizer.step()


def changed_from_outside(model, optimizer, step):
    with torch.no_grad():
        if step == 2:
            model.head.weight *= 3
        if step == 3:
            model.mlp[0].weight.data = model.mlp[0].weight * 2
    plain(model, optimizer, step)


LOOPS = [
    plain,
    clipped,
    accumulated,
    with_closure,
    with_finish,
    with_a_penalty,
    changed_from_outside,
]


@pytest.mark.parametrize("fmt", ["int4/8", "nvfp4"])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_the_pass_equals_torch_and_the_hook(loop, fmt, on_cpu):
    a, b = pair(fmt=fmt)
    for step in range(6):
        loop(*a, step)
        loop(*b, step)
        assert_same(a, b)
    without_term = 2 if loop is with_finish else 0
    taken = [shape for name, shape in TAKEN.items() if fmt != "nvfp4" or shape[1] % 16 == 0]
    assert on_cpu == [taken] * (6 - without_term)


def test_a_strong_term_is_in_the_equality(on_cpu):
    """What the tests above hold equal would differ without the term, and from another second-moment."""
    (model, optimizer), (other, another) = make(lotion_fx.optim.AdamW), make(lotion_fx.optim.AdamW)
    registry[other.head.weight].gains = (0.0, 0.0)
    for step in range(2):
        plain(model, optimizer, step)
        plain(other, another, step)
    assert (model.head.weight - other.head.weight).norm() > 1e-3 * model.head.weight.norm()


@pytest.mark.parametrize("settings", [{"maximize": True}, {"lr": torch.tensor(1e-2)}, {"fused": True}, {"eps": 1e-2}])
def test_settings_of_adamw(settings, on_cpu):
    a, b = pair(**settings)
    for step in range(4):
        plain(*a, step)
        plain(*b, step)
    assert_same(a, b)
    assert on_cpu == [list(TAKEN.values())] * 4


def test_groups_and_schedules_differ(on_cpu):
    def groups(model):
        head = {"params": [model.head.weight], "lr": 3e-2, "betas": (0.8, 0.95), "weight_decay": 0.0}
        return [head, {"params": [p for p in model.parameters() if p is not model.head.weight]}]

    a, b = pair(groups=groups)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8) for _, optimizer in (a, b)]
    for step in range(5):
        for one, schedule in zip((a, b), schedules, strict=True):
            one[0].mlp[2].weight.requires_grad_(step != 2)  # takes one step less than the rest of its group
            plain(*one, step)
            schedule.step()
    assert_same(a, b)
    both = [[(23, 16)], [(40, 16), (16, 40)]]
    assert on_cpu == [*both, *both, [(23, 16)], [(40, 16)], *both, *both]


@pytest.mark.parametrize("fused", [True, None])
def test_a_grad_scaler_is_divided_out_and_an_overflow_skipped(fused, on_cpu):
    a, b = pair(fmt="nvfp4", fused=fused)
    scalers = [torch.amp.GradScaler("cpu", init_scale=3.0 * 2**12, growth_interval=2) for _ in range(2)]
    for step in range(7):
        for (model, optimizer), scaler in zip((a, b), scalers, strict=True):
            optimizer.zero_grad()
            loss = lm_loss(model, ids(seed=step)) * (float("inf") if step in (0, 3) else 1.0)
            scaler.scale(loss).backward()
            if step % 3 == 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
            scaler.step(optimizer)
            scaler.update()
        if step:
            assert_same(a, b)
    assert a[1].state[a[0].head.weight]["step"] == 5
    assert len(on_cpu) == 5  # those that are left out have no term


def test_bfloat16_is_within_its_rounding(on_cpu):
    (model, optimizer), (other, another) = pair(model=lambda: LM().bfloat16())
    plain(model, optimizer, 0)
    plain(other, another, 0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert q.dtype == another.state[q]["exp_avg"].dtype == torch.bfloat16
        moments = (
            [s["exp_avg"].double(), s["exp_avg_sq"].double().sqrt()] for s in (optimizer.state[p], another.state[q])
        )
        for a, b in zip([p.double(), *next(moments)], [q.double(), *next(moments)], strict=True):
            assert (a - b).norm() <= 2**-8 * a.norm()
    assert len(on_cpu) == 1


def test_bfloat16_moments_of_float32_weights(on_cpu):
    model, optimizer = make(lotion_fx.optim.AdamW)
    exact, reference = make(torch.optim.AdamW)
    plain(model, optimizer, 0)
    plain(exact, reference, 0)
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].bfloat16()
    weight, twin = model.head.weight, exact.head.weight
    weight.grad, twin.grad = (twin.grad.clone() for _ in range(2))
    for p in (*model.parameters(), *exact.parameters()):
        p.grad = p.grad if p is weight or p is twin else None
    optimizer.step()
    reference.step()
    assert weight.dtype == torch.float32 and optimizer.state[weight]["exp_avg"].dtype == torch.bfloat16
    torch.testing.assert_close(
        optimizer.state[weight]["exp_avg"].float(), reference.state[twin]["exp_avg"], rtol=0.02, atol=1e-4
    )
    torch.testing.assert_close(weight, twin, rtol=1e-2, atol=1e-3)
    assert on_cpu[-1] == [(23, 16)]


def saved(model, optimizer):
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), lotion_fx.state_dict(model)], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("with_ours", [True, False])
@pytest.mark.parametrize("first", ["torch", "lotion_fx"])
def test_a_state_goes_from_either_to_either(first, with_ours, on_cpu):
    classes = [torch.optim.AdamW, lotion_fx.optim.AdamW]
    model, optimizer = make(classes[first == "lotion_fx"], fmt="nvfp4")
    for step in range(2):
        plain(model, optimizer, step)
    runs = [make(cls, fmt="nvfp4", lr=0.5) for cls in classes]
    for other, another in runs:
        weights, steps, lotion = saved(model, optimizer)
        other.load_state_dict(weights)
        another.load_state_dict(steps)
        if with_ours:
            lotion_fx.load_state_dict(other, lotion)
        for step in range(2, 4):
            plain(other, another, step)
    assert_same(*runs)
    assert runs[0][1].param_groups[0]["lr"] == 1e-2
    assert runs[0][1].state_dict().keys() == runs[1][1].state_dict().keys()
    if with_ours:
        for step in range(2, 4):
            plain(model, optimizer, step)
        assert_same((model, optimizer), runs[1])


@pytest.mark.parametrize("settings", [{"curvature": "factored"}, {"fmt": "int4/64"}], ids=["curvature", "short blocks"])
def test_what_the_pass_cannot_take_has_its_term_from_the_hook(settings, on_cpu):
    a, b = pair(**settings)
    for step in range(3):
        plain(*a, step)
        plain(*b, step)
    assert not on_cpu
    for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True):
        assert torch.equal(p, q)


REFUSED = {
    "one scale for a channel": {"fmt": "int4/channel"},
    "one scale for a tensor": {"fmt": "int4/tensor"},
    "blocks of no power of two": {"fmt": "int4/6"},
    "amsgrad": {"amsgrad": True},
    "foreach": {"foreach": True},
    "fused=False": {"fused": False},
    "differentiable": {"differentiable": True},
    "tensors as betas": {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "capturable": True},
    "float64": {"model": lambda: LM().double()},
}


@pytest.mark.parametrize("settings", [*REFUSED.values(), {}], ids=[*REFUSED, "taken"])
def test_the_pass_refuses(settings, on_cpu):
    model, optimizer = make(lotion_fx.optim.AdamW, **settings)
    for name in TAKEN:
        weight = model.get_parameter(name)
        weight.grad = torch.zeros_like(weight)
        assert optimizer.can_take(weight, registry[weight]) is (not settings)
        weight.grad = torch.zeros_like(weight).T.contiguous().T
        assert not optimizer.can_take(weight, registry[weight])


def test_a_weight_blocked_along_another_dimension_is_not_taken(on_cpu):
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 24))

        def forward(self, x):
            return x @ self.weight

    a, b = (make(cls, model=Transposed) for cls in (torch.optim.AdamW, lotion_fx.optim.AdamW))
    x = torch.randn(9, 16)
    for model, optimizer in (a, b):
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(model(x), torch.zeros(9, 24)).backward()
            optimizer.step()
    assert not on_cpu and torch.equal(a[0].weight, b[0].weight)


def test_on_a_cpu_it_is_torch_and_the_hook_bit_for_bit():
    a, b = pair(fmt="nvfp4")
    for step in range(3):
        plain(*a, step)
        plain(*b, step)
    for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_gradient_stays_as_it_is(on_cpu):
    model, optimizer = make(lotion_fx.optim.AdamW)
    for step in range(2):
        optimizer.zero_grad()
        lm_loss(model, ids(seed=step)).backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters()}
        versions = {name: p._version for name, p in model.named_parameters()}
        optimizer.step()
        for name in TAKEN:
            assert torch.equal(model.get_parameter(name).grad, before[name])
            assert model.get_parameter(name)._version > versions[name], "autograd must see that the weight changed"


def test_the_absmax_of_the_pass_before_is_used(on_cpu):
    """Neither computed anew nor, after a change from outside (see the loops), used when stale."""
    model, optimizer = make(lotion_fx.optim.AdamW, fmt="nvfp4")
    plain(model, optimizer, 0)
    weight = model.head.weight
    known = optimizer._amax_of(weight)
    assert known is optimizer._amax_of(weight) and known == weight.abs().amax()
    with torch.no_grad():
        weight[3, 3] = 9.0
    assert optimizer._amax_of(weight) == 9.0
    plain(model, optimizer, 1)
    assert optimizer._amax_of(weight) == weight.abs().amax()


def test_a_step_that_raised_leaves_no_term_behind(on_cpu):
    model, optimizer = make(lotion_fx.optim.AdamW)
    plain(model, optimizer, 0)
    handle = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plain(model, optimizer, 1)
    handle.remove()
    lotion_fx.finish(model, term=False)
    before = len(on_cpu)
    plain(model, optimizer, 2)
    assert len(on_cpu) == before and not optimizer.terms


def test_copies_and_pickles(on_cpu):
    model, optimizer = make(lotion_fx.optim.AdamW)
    plain(model, optimizer, 0)
    for another in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(another) is lotion_fx.optim.AdamW and not another.terms
        # Of the optimizer's own: a copy's parameters are no model's of ours.
        assert str(another.state_dict()["state"]) == str(dict(enumerate(optimizer.state.values())))


def test_torch_still_asks_init_group_for_what_to_update():
    """A canary: the one private method of torch's that `optim` overrides."""
    assert isinstance(lotion_fx.optim.AdamW([torch.zeros(1)]), TakesTerms)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    lists = [[] for _ in range(6)]
    optimizer._init_group(optimizer.param_groups[0], *lists)
    assert [len(one) for one in lists] == [1, 1, 1, 1, 0, 1]
    # Dynamo wraps it once more where it saw an optimizer.
    assert "_init_group" in inspect.unwrap(torch.optim.Adam.step).__code__.co_names


def test_a_subclass_of_parameter_is_not_taken(on_cpu):
    class Own(nn.Parameter):
        pass

    model, _ = make(lotion_fx.optim.AdamW)
    for cls in (nn.Parameter, Own):
        weight = cls(torch.zeros(2, 8))
        weight.grad = torch.zeros(2, 8)
        optimizer = lotion_fx.optim.AdamW([weight])
        assert optimizer.can_take(weight, registry[model.head.weight]) is (cls is nn.Parameter)


def test_curvature_of_another_optimizer_s_steps_goes_on(on_cpu):
    """As under torch's: its average holds what SGD's steps saw, and the second moment takes over in the step after."""
    runs = []
    for cls in (torch.optim.AdamW, lotion_fx.optim.AdamW):
        model, optimizer = make(cls)
        plain(model, torch.optim.SGD(model.parameters(), lr=1e-2), 0)
        for step in range(1, 4):
            plain(model, optimizer, step)
        runs.append((model, optimizer))
    assert_same(*runs)
    assert len(on_cpu) == 2


def test_a_loaded_group_decides(on_cpu):
    model, optimizer = make(lotion_fx.optim.AdamW)
    weight = model.head.weight
    weight.grad = torch.zeros_like(weight)
    assert optimizer.can_take(weight, registry[weight])
    state = optimizer.state_dict()
    state["param_groups"][0]["foreach"] = True
    optimizer.load_state_dict(state)
    assert not optimizer.can_take(weight, registry[weight])
    late = nn.Parameter(torch.zeros(2, 8))
    late.grad = torch.zeros_like(late)
    optimizer.add_param_group({"params": [late], "foreach": None})
    assert optimizer.can_take(late, registry[weight])
