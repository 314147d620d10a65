"""Our state rides in the optimizer's: a resumed run goes on bit for bit, with no line added."""

import copy
import io
import re
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

import lotion_fx
from lotion_fx.riding import KEY
from tests.models import LM, ids, lm_loss
from tests.runtime.steps import one_step

STEPS, HALF = 6, 3


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def built(model=None, make=adam, **options):
    torch.manual_seed(0)
    model = lotion_fx.transform(LM() if model is None else model(), "int4", inner="aot_eager", **options)
    return model, make(model)


def run(model, optimizer, steps):
    for step in steps:
        one_step(model, optimizer, lambda m, step=step: lm_loss(m, ids(seed=step)))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_goes_on(resumed, optimizer, whole, steps=range(HALF, STEPS)):
    """Runs what is left, and compares with the run that was not interrupted, bit for bit."""
    run(resumed, optimizer, steps)
    for (name, mine), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert lotion_fx.report(resumed).to_dict() == lotion_fx.report(whole).to_dict()


def check_resume(**options):
    whole, optimizer = built(**options)
    run(whole, optimizer, range(STEPS))
    first, optimizer = built(**options)
    run(first, optimizer, range(HALF))
    saved = through_a_file({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    resumed, optimizer = built(**options)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert_goes_on(resumed, optimizer, whole)


@pytest.mark.parametrize(
    "kind, finish", [("factored", 0.7), ("factored", 0.2), ("full", None), ("fisher", 0.7), ("ggn", 0.7)]
)
def test_a_plain_loop_resumes_bit_for_bit(kind, finish):
    """In the middle of a finishing phase, and before one."""
    check_resume(curvature=kind, finish=finish, steps=STEPS if finish else None)


@pytest.mark.parametrize("kind", ["factored", "fisher"])
def test_so_does_a_bf16_model_whose_optimizer_casts_all_that_it_loads(kind):
    check_resume(model=lambda: LM().bfloat16(), curvature=kind)


OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "foreach": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, foreach=True),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3),
    "ours": lambda m: lotion_fx.optim.AdamW(m.parameters(), lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_under_any_optimizer(name):
    """Fisher curvature is read off an optimizer's second moment, or is a state of our own under one that has none."""
    check_resume(make=OPTIMIZERS[name], curvature="fisher" if name in ("sgd", "ours") else "factored")


@pytest.mark.parametrize("make", [adam, OPTIMIZERS["sgd"]])
def test_an_optimizer_never_meets_what_rides_in_its_state(make):
    model, optimizer = built(make=make)
    run(model, optimizer, range(2))
    plain, before = make(LM()), set()
    lm_loss(model, ids()).backward()
    optimizer.register_step_pre_hook(
        lambda opt, *_: before.update(*opt.state.values())
    )  # after those of all optimizers
    assert KEY in optimizer.state_dict()["state"][3]
    get_optimizer_state_dict(model, optimizer)  # which leaves its names in the optimizer's state
    assert any(KEY in state for state in optimizer.state.values())
    optimizer.step()
    assert KEY not in before
    for parameter in plain.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    plain.step()
    assert set().union(*optimizer.state.values()) == set().union(*plain.state.values())
    # A parameter without moments of its own gets no entry: Adam would take it for one that has them.
    model.mlp.append(nn.Linear(16, 16))
    optimizer.add_param_group({"params": list(model.mlp[-1].parameters())})
    state = optimizer.state_dict()
    if make is adam:
        assert not [s for s in state["state"].values() if set(s) == {KEY}]
    again = make(LM())
    again.add_param_group({"params": list(nn.Linear(16, 16).parameters())})
    again.load_state_dict(state)


def test_a_state_is_read_without_this_package_s_weights():
    """A plain model goes on from it."""
    model, optimizer = built()
    run(model, optimizer, range(2))
    plain = LM()
    plain.load_state_dict(model.state_dict())
    other = adam(plain)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    one_step(plain, other, lambda m: lm_loss(m, ids()))


def test_loaded_before_the_model_is_transformed():
    whole, optimizer = built(finish=0.7, steps=STEPS)
    run(whole, optimizer, range(STEPS))
    first, optimizer = built(finish=0.7, steps=STEPS)
    run(first, optimizer, range(HALF))
    resumed = LM()
    other = adam(resumed)
    resumed.load_state_dict(first.state_dict())
    other.load_state_dict(optimizer.state_dict())
    lotion_fx.transform(resumed, "int4", inner="aot_eager", finish=0.7, steps=STEPS)
    assert_goes_on(resumed, other, whole)


def test_what_is_loaded_by_hand_wins():
    first, optimizer = built()
    run(first, optimizer, range(HALF))
    state = copy.deepcopy(optimizer.state_dict())
    run(first, optimizer, range(HALF, STEPS))
    by_hand = lotion_fx.state_dict(first)
    for order in (0, 1):
        model, other = built()
        loads = [lambda m=model: lotion_fx.load_state_dict(m, by_hand), lambda o=other: o.load_state_dict(state)]
        for load in reversed(loads) if order else loads:
            load()
        assert lotion_fx.state_dict(model)["phases"][0]["steps"] == STEPS


def without_ours(state):
    state = copy.deepcopy(state)
    for each in state["state"].values():
        each.pop(KEY, None)
    return state


def test_a_resume_without_it_is_told_once():
    first, optimizer = built()
    run(first, optimizer, range(2))
    model, other = built()
    other.load_state_dict(without_ours(optimizer.state_dict()))
    with pytest.warns(UserWarning, match="holds nothing of lotion_fx for 'mlp.0.weight' and 2 more.*load_state_dict"):
        run(model, other, range(1))
    run(model, other, range(1))
    # Nor is anything said of a state loaded by hand, of an optimizer that begins, or of training without a term.
    model, other = built()
    other.load_state_dict(without_ours(optimizer.state_dict()))
    lotion_fx.load_state_dict(model, lotion_fx.state_dict(first))
    run(model, other, range(1))
    model, other = built()
    other.load_state_dict(other.state_dict())
    run(model, other, range(1))
    model, other = built(method="ptq")
    other.load_state_dict(without_ours(optimizer.state_dict()))
    run(model, other, range(1))


def test_one_of_another_transform_is_told_and_left_out():
    first, optimizer = built()
    run(first, optimizer, range(2))
    for options, told in [({"curvature": "full"}, "curvature='factored'.*'full'"), ({"fmt": "int3"}, "int4")]:
        torch.manual_seed(0)
        model = lotion_fx.transform(LM(), **{"fmt": "int4", "inner": "aot_eager", **options})
        other = adam(model)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            other.load_state_dict(optimizer.state_dict())
        assert len(said) == 1 and "gathered anew" in str(said[0].message), [str(w.message) for w in said]
        assert lotion_fx.state_dict(model)["weights"]["head.weight"]["ema"] is None, told
        run(model, other, range(1))


LATE = {"schedule": (("lotion", 0.5), ("ste_scale", 0.5)), "steps": STEPS}


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize(
    "before, after, told",
    [
        ({}, {"method": "ste"}, "in phase 'lotion'.*in phase 'ste'"),
        ({"method": "ste"}, {}, "in phase 'ste'.*in phase 'lotion'"),
        ({}, LATE | {"steps": HALF + 1}, "in phase 'lotion'.*in phase 'ste_scale'"),
        (LATE, LATE, ""),  # between its phases
        ({"method": "ptq"}, {}, ""),  # one plain training is the beginning of several
    ],
)
def test_a_resume_in_another_phase_is_told(before, after, told, by_hand):
    first, optimizer = built(**before)
    run(first, optimizer, range(HALF))
    state, ours = through_a_file(optimizer.state_dict()), lotion_fx.state_dict(first)
    resumed, optimizer = built(**after)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if by_hand:
            lotion_fx.load_state_dict(resumed, ours)
        optimizer.load_state_dict(state)
    messages = [str(each.message) for each in caught]
    assert len(messages) == bool(told), messages
    assert not told or re.search(f"saved after {HALF} steps {told}", messages[0])


def test_parameters_in_another_order_are_told():
    """Stateless SGD has nothing of its own to mix up, and the shapes are equal."""

    def square(order):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 20))
        model = lotion_fx.transform(net, "int4", inner="aot_eager")
        return model, torch.optim.SGD([{"params": [model[place].weight]} for place in order], 1e-3)

    first, optimizer = square((0, 2, 4))
    for _ in range(3):
        first(torch.ones(4, 20)).square().mean().backward()
        optimizer.step()
    model, other = square((4, 2, 0))
    with pytest.warns(UserWarning, match=r"saved with parameters in another order for '4.weight' and 1 more"):
        other.load_state_dict(optimizer.state_dict())
    saved, found = lotion_fx.state_dict(first), lotion_fx.state_dict(model)
    assert torch.equal(found["weights"]["2.weight"]["ema"], saved["weights"]["2.weight"]["ema"])
    assert all(found["weights"][name]["ema"] is None for name in ("0.weight", "4.weight"))
    assert lotion_fx.report(model).steps == 3


def test_a_copy_of_model_and_optimizer_goes_on_as_they_do():
    model, optimizer = built()
    run(model, optimizer, range(HALF))
    optimizer.state_dict()
    copied, other = copy.deepcopy((model, optimizer))
    run(model, optimizer, range(HALF, STEPS))
    assert_goes_on(copied, other, model)


# ------------------------------------------------------------------------------------------------ torch's checkpoints


class Grouped(nn.Module):
    """A grouped convolution, whose curvature has a factorization for each group, and an unmistakable head."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(23, 16)
        self.conv = nn.Conv1d(16, 24, 3, padding=1, groups=4)
        self.head = nn.Linear(24, 23)

    def forward(self, batch):
        return self.head(F.gelu(self.conv(self.token(batch).mT)).mT)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*(TypedStorage|barrier).*:UserWarning")
@pytest.mark.parametrize("kind, flatten", [("factored", False), ("factored", True), ("fisher", True)])
def test_a_distributed_checkpoint_holds_it(one_process, tmp_path, kind, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    whole, optimizer = built(Grouped, curvature=kind)
    run(whole, optimizer, range(STEPS))
    first, optimizer = built(Grouped, curvature=kind)
    run(first, optimizer, range(HALF))
    state = {"model": first.state_dict(), "optimizer": get_optimizer_state_dict(first, optimizer, options=options)}
    dist.checkpoint.save(state, checkpoint_id=tmp_path / "saved")
    resumed, optimizer = built(Grouped, curvature=kind)
    state = {"model": resumed.state_dict(), "optimizer": get_optimizer_state_dict(resumed, optimizer, options=options)}
    dist.checkpoint.load(state, checkpoint_id=tmp_path / "saved")
    resumed.load_state_dict(state["model"])
    set_optimizer_state_dict(resumed, optimizer, state["optimizer"], options=options)
    assert_goes_on(resumed, optimizer, whole)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch")
@pytest.mark.parametrize("full", [False, True])
def test_a_sharded_model_resumes_in_the_middle_of_its_finishing_phase(one_process, full):
    def make():
        torch.manual_seed(0)
        model = LM()
        lotion_fx.transform(model, "int4", inner="aot_eager", regions=[model.mlp, model.head], finish=0.7, steps=STEPS)
        fully_shard(model.mlp)
        fully_shard(model)
        return model, adam(model)

    whole, optimizer = make()
    run(whole, optimizer, range(STEPS))
    first, optimizer = make()
    run(first, optimizer, range(HALF))
    options = StateDictOptions(full_state_dict=full)
    state = get_optimizer_state_dict(first, optimizer, options=options)
    weights = get_model_state_dict(first, options=options)
    resumed, optimizer = make()
    set_model_state_dict(resumed, weights, options=options)
    set_optimizer_state_dict(resumed, optimizer, state, options=options)
    run(resumed, optimizer, range(HALF, STEPS))
    for (name, mine), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine.to_local(), theirs.to_local()), name
    assert lotion_fx.state_dict(resumed)["phases"][0]["phase"] == "finish"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_flattened_state_is_set_into_a_new_optimizer(one_process):
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    whole, optimizer = built()
    run(whole, optimizer, range(HALF))
    state = through_a_file(get_optimizer_state_dict(whole, optimizer, options=options))
    resumed, other = built()
    resumed.load_state_dict(whole.state_dict())
    set_optimizer_state_dict(resumed, other, state, options=options)
    run(whole, optimizer, range(HALF, STEPS))
    assert_goes_on(resumed, other, whole)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*torch.jit.*deprecated.*:DeprecationWarning")
def test_zero_redundancy_optimizers_hold_it(one_process):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def make(model):
        return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)

    whole, optimizer = built(make=make)
    run(whole, optimizer, range(STEPS))
    first, optimizer = built(make=make)
    run(first, optimizer, range(HALF))
    optimizer.consolidate_state_dict()
    resumed, other = built(make=make)
    resumed.load_state_dict(first.state_dict())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_goes_on(resumed, other, whole)


def test_a_checkpoint_s_first_step_of_a_new_optimizer_is_none_of_the_training():
    model, optimizer = built()
    get_optimizer_state_dict(model, optimizer)
    assert lotion_fx.state_dict(model)["phases"][0]["steps"] == 0
    assert not lotion_fx.state_dict(model)["weights"]["head.weight"]["steps"]


def sgd(model):
    return torch.optim.SGD(model.parameters(), 1e-2)


@pytest.mark.parametrize("make", [adam, sgd])
def test_an_empty_state_that_is_loaded_after_steps_is_told_of(make):
    """A search for a learning rate begins anew, who wants fresh moments does not: nothing is lost, and it is said."""
    model, optimizer = built(make=make, finish=0.5, steps=STEPS)
    before, ours = copy.deepcopy((model.state_dict(), optimizer.state_dict())), lotion_fx.state_dict(model)
    run(model, optimizer, range(STEPS))
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.warns(
        UserWarning, match="loaded an empty state, and lotion_fx goes on in phase 'finish' after 6 steps"
    ):
        optimizer.load_state_dict(before[1])
    optimizer.load_state_dict(before[1])
    assert lotion_fx.report(model).phase == "finish"
    model.load_state_dict(before[0])
    lotion_fx.load_state_dict(model, ours)
    run(model, optimizer, range(STEPS))
    assert all(map(torch.equal, model.parameters(), expected))


@pytest.mark.parametrize("make", [adam, sgd])
def test_accelerate_loads_an_optimizer_with_its_own_state(make):
    """A new one's in mid-training, and one's that was just resumed."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    whole, optimizer = built(make=make, finish=0.5, steps=STEPS)
    run(whole, optimizer, range(HALF))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    resumed, other = built(make=make, finish=0.5, steps=STEPS)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    run(whole, optimizer, range(HALF, STEPS))
    assert_goes_on(resumed, accelerator.prepare(other), whole)
    accelerator.prepare(make(whole))
    assert lotion_fx.report(whole).phase == "finish"


def test_what_was_loaded_is_saved_again():
    """As a checkpoint is converted, before any step."""
    whole, optimizer = built()
    run(whole, optimizer, range(HALF))
    other, loaded = built()
    other.load_state_dict(whole.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed, last = built()
    resumed.load_state_dict(other.state_dict())
    last.load_state_dict(copy.deepcopy(loaded.state_dict()))
    run(whole, optimizer, range(HALF, STEPS))
    assert_goes_on(resumed, last, whole)


def momentum_for_some(model):
    first, *rest = model.parameters()
    return torch.optim.SGD([{"params": [first, rest[3]], "momentum": 0.9}, {"params": [*rest[:3], *rest[4:]]}], 1e-2)


def test_weights_without_a_state_beside_some_with_one():
    check_resume(make=momentum_for_some)


def test_lbfgs_is_resumed():
    """Whose state is its first parameter's."""

    def train(model, optimizer, steps):
        for step in steps:

            def closure(step=step):
                optimizer.zero_grad()
                loss = lm_loss(model, ids(seed=step))
                loss.backward()
                return loss

            optimizer.step(closure)

    def make(model):
        return torch.optim.LBFGS(model.parameters(), 0.1, max_iter=2)

    whole, optimizer = built(make=make)
    train(whole, optimizer, range(HALF))
    resumed, other = built(make=make)
    resumed.load_state_dict(whole.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(whole, optimizer, range(HALF, STEPS))
    train(resumed, other, range(HALF, STEPS))
    for (name, mine), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_distributed_checkpoints_of_an_optimizer_without_any_state(one_process):
    """Read in mid-training, which is no step of it."""
    whole, optimizer = built(make=sgd)
    run(whole, optimizer, range(HALF))
    optimizer.zero_grad()
    state = through_a_file(get_optimizer_state_dict(whole, optimizer))
    assert lotion_fx.state_dict(whole)["phases"][0]["steps"] == HALF
    resumed, other = built(make=sgd)
    resumed.load_state_dict(whole.state_dict())
    set_optimizer_state_dict(resumed, other, state)
    run(whole, optimizer, range(HALF, STEPS))
    assert_goes_on(resumed, other, whole)


def test_a_state_that_is_there_before_any_step_is_none_of_mid_training(recwarn):
    """Adagrad's, which Accelerate loads with itself."""
    model = lotion_fx.transform(nn.Linear(8, 8), "int4", inner="aot_eager")
    optimizer = torch.optim.Adagrad(model.parameters(), 0.01)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not [warning for warning in recwarn if "mid-training" in str(warning.message)]
