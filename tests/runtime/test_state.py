"""A tensor seen anywhere is recognized as the weight that it is now, and none is referred to weakly."""

import gc
import sys
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import lotion_fx
from lotion_fx import calls
from lotion_fx.state import registry
from tests.models import LM, MLP, ids, lm_loss


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Many models share one class's code here, and Dynamo compiles a code only so many times."""
    yield
    torch._dynamo.reset()


@pytest.fixture
def swapping():
    """`Module.to` swaps the contents of parameters, as it does of FSDP2's, instead of setting their data."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(model, optimizer, steps, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 20, generator=generator).to(dtype)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def moved_while_training(dtype, sharded=False, **options):
    """The model and optimizer of a training whose model is moved to another dtype and back between two steps."""
    torch.manual_seed(0)
    model = nn.Sequential(MLP())
    if sharded:
        fully_shard(model[0]), fully_shard(model)
    regions = [model[0]] if sharded else None
    lotion_fx.transform(model, "int4", **{"inner": "aot_eager", "strength": 10.0, "regions": regions} | options)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    model.to(dtype).to(torch.float32)  # before any call
    train(model, optimizer, 2)
    model.to(dtype)
    if not sharded:  # FSDP2 itself cannot run in another dtype than it began with
        with torch.no_grad():
            model.eval()(torch.zeros(4, 20, dtype=dtype))
    model.to(torch.float32).train()
    train(model, optimizer, 2)
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor", "eager"])
def test_swapping_a_model_s_tensors_changes_no_training(dtype, inner, swapping):
    swapped, optimizer = moved_while_training(dtype, inner=inner)
    torch.__future__.set_swap_module_params_on_conversion(False)
    expected, _ = moved_while_training(dtype, inner=inner)
    for mine, theirs in zip(swapped.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert optimizer.state[swapped[0].up.weight]["step"] == 4
    weight = registry[swapped[0].up.weight]
    assert weight.name == "0.up.weight" and weight.gathered.steps == 4 and weight.is_analytic is (inner != "eager")


@pytest.mark.parametrize(
    "settings", [{"curvature": "ggn"}, {"curvature": "fisher"}, {"method": "ste"}, {"method": "rr"}]
)
def test_no_method_keeps_weak_references(settings, swapping):
    model, _ = moved_while_training(torch.float64, **settings)
    batch = torch.randn(4, 20), torch.randn(4, 7)
    lotion_fx.expected_loss(model, batch, nn.functional.mse_loss, samples=2)
    lotion_fx.report(model), lotion_fx.explain(model), lotion_fx.penalty(model), lotion_fx.state_dict(model)
    assert not any(weakref.getweakrefs(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fsdp2_moves_a_model(dtype, one_rank):
    sharded, optimizer = moved_while_training(dtype, sharded=True)
    expected, _ = moved_while_training(dtype)
    for mine, theirs in zip(sharded.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.full_tensor(), theirs, rtol=1e-5, atol=1e-7)
    assert optimizer.state[sharded[0].up.weight]["step"] == 4
    assert registry[sharded[0].up.weight].gathered.steps == 4


def test_functional_calls_leave_nothing_behind():
    gc.collect()  # models of before are owners too until then
    model = lotion_fx.transform(MLP(), "int4", inner="aot_eager").eval()
    x = torch.randn(4, 20)
    seen = []
    for _ in range(30):
        fresh = {name: parameter.detach() * 1.5 for name, parameter in model.named_parameters()}
        with torch.no_grad():
            out = torch.func.functional_call(model, fresh, (x,))
        seen += fresh.values()  # alive, so that no id comes twice
    assert not torch.equal(out, model(x))  # and it computed with them
    assert len(registry._seen) <= 2 * sum(len(owned) for owned in registry.owned.values())
    assert registry[fresh["up.weight"]] is None and registry[model.up.weight].name == "up.weight"


def test_a_new_tensor_at_a_known_id_is_no_weight():
    model = lotion_fx.transform(MLP(), "int4", inner="aot_eager")
    old = registry[model.up.weight]
    registry._seen[id(stranger := torch.zeros(33, 20))] = weakref.ref(old)
    assert registry[stranger] is None
    replaced, model.up.weight = model.up.weight, nn.Parameter(torch.zeros(33, 20))
    assert registry[replaced] is None and registry[model.up.weight] is old and old.master is model.up.weight


def test_an_optimizer_of_another_model_costs_one_look(monkeypatch):
    model = lotion_fx.transform(MLP(), "int4", inner="aot_eager")
    looks = []
    ask = registry._ask_owners
    monkeypatch.setattr(registry, "_ask_owners", lambda: looks.append(1) or ask())
    other = nn.ParameterList(nn.Parameter(torch.ones(2)) for _ in range(50))
    for parameter in other:
        parameter.grad = torch.ones(2)
    torch.optim.SGD(other.parameters(), 0.1).step()
    assert len(looks) == 1
    train(model, torch.optim.SGD(model.parameters(), 0.1), 3)
    looks.clear()
    train(model, torch.optim.SGD(model.parameters(), 0.1), 3)
    assert not looks


def test_a_model_that_is_gone_takes_its_tensors_with_it():
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lm_loss(model, ids()).backward()
    optimizer.step()
    watched = [weakref.ref(model.head.weight), weakref.ref(registry[model.head.weight])]
    del model, optimizer
    torch._dynamo.reset()
    for _ in range(2):  # the model first, then what was kept for it
        gc.collect()
    assert [each() for each in watched] == [None, None]


def test_a_model_that_is_gone_takes_its_graphs_with_it():
    """They are names in the module of the function that was compiled, and hold its code."""

    def graphs():
        gc.collect()
        return {name for name in vars(calls) if name.startswith("__compiled_fn")}

    before = graphs()
    for regions in (False, True):
        model = LM()
        lotion_fx.transform(model, "int4", inner="aot_eager", regions=[model.mlp, model.head] if regions else None)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        lm_loss(model, ids()).backward()
        optimizer.step()
        model.eval()(ids())
        assert graphs() > before
        del model, optimizer
        assert graphs() == before


def test_forwards_that_no_step_follows_leave_nothing_behind():
    model = lotion_fx.transform(MLP(), "int4", inner="aot_eager").eval()
    terms = registry[model.up.weight].smoothing.tally.terms
    x, sizes = torch.randn(4, 20), []
    for _ in range(3):
        for _ in range(20):
            model(x)
        sizes.append(sum(sys.getsizeof(kept) for kept in vars(terms).values()))
    assert terms.forwards == 60 and sizes[0] == sizes[2]
