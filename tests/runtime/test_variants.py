"""Compile caches stay on, options pass through, and each model is compiled as often as it needs."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import lotion_fx
from lotion_fx import rounding
from lotion_fx.compiling import compiles
from lotion_fx.passes.attach.probe import Header
from lotion_fx.state import registry
from tests.models import LM, MLP, ids, lm_loss

SCRIPT = """
import json, torch, lotion_fx
from torch._dynamo.utils import counters
from tests.models import LM
from tests.models import ids
from tests.models import lm_loss

torch.manual_seed(0)
model = lotion_fx.transform(LM(), "int4", curvature={curvature!r})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
lm_loss(model, ids()).backward()
optimizer.step()
row = lotion_fx.report(model)["head.weight"]
print(json.dumps({{
    "hits": counters["aot_autograd"]["autograd_cache_hit"],
    "misses": counters["aot_autograd"]["autograd_cache_miss"],
    "bypasses": counters["aot_autograd"]["autograd_cache_bypass"],
    "estimator": row.estimator, "term": row.term, "weight": model.head.weight.sum().item(),
}}))
"""


@pytest.mark.slow
def test_a_warm_cache_gives_the_same_and_knows_the_configuration(tmp_path):
    def run(curvature):
        environment = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
        code = SCRIPT.format(curvature=curvature)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    cold, warm, other = run("factored"), run("factored"), run("full")
    assert cold["bypasses"] == 0 and cold["hits"] == 0
    assert warm["hits"] > 0 and warm["misses"] == 0, "the whole training step comes from the cache"
    assert {**warm, "hits": 0, "misses": 0} == {**cold, "hits": 0, "misses": 0}  # the estimator is known without a pass
    assert other["misses"] > 0 and other["term"] != cold["term"]


@pytest.mark.slow
def test_mode_and_options_pass_through():
    seen = []

    class Watch(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph):
            seen.append(len(graph.nodes))

        def uuid(self):
            return None

    options = {"joint_custom_pre_pass": Watch(), "max_autotune": False}
    model = lotion_fx.transform(LM(), "int4", options=options, mode="max-autotune-no-cudagraphs")
    lm_loss(model, ids()).backward()
    assert seen, "the user's own joint pass runs beside ours"
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert lotion_fx.report(model)["head.weight"].estimator == "analytic"


def test_a_custom_op_s_result_reaches_the_probe_once_a_backward():
    model = lotion_fx.transform(MLP(), "int4", inner="aot_eager")
    for repeat in range(1, 4):
        model(torch.randn(3, 20)).sum().backward()
        weight = registry[model.up.weight]
        calls, code, _, _, terms = Header.of(weight.gathered.probe.grad)
        assert (calls, code, terms, weight.smoothing.tally.loss_count) == (repeat, repeat, 3 * repeat, 3 * repeat)


def test_a_module_with_torch_s_own_forward_is_compiled():
    torch._dynamo.reset()
    before = compiles["aot_eager"]
    model = lotion_fx.transform(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "int4", inner="aot_eager")
    model(torch.randn(2, 4))
    assert compiles["aot_eager"] == before + 1


@torch._dynamo.config.patch(recompile_limit=2)
def test_many_models_of_torch_s_own_classes_are_compiled():
    """Dynamo gives up on a frame after a few recompilations: were it shared, later models would be left in Python."""
    x, y = torch.randn(2, 20), torch.zeros(2, dtype=torch.long)
    for width in range(2, 2 + 2 + 2):
        model = nn.Sequential(nn.Linear(20, width))
        lotion_fx.transform(model, "int4", loss_fn=nn.functional.cross_entropy, inner="aot_eager")
        before = compiles["aot_eager"]
        model(x)
        lotion_fx.training_loss(model, (x, y))
        assert compiles["aot_eager"] == before + 2


def test_the_update_is_compiled_once_for_equal_weights():
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(5)), nn.Linear(12, 3))
    lotion_fx.transform(model, "int4/4", inner="aot_eager")
    model(torch.randn(4, 12)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    specs = {spec for layer in model for _, spec in registry[layer.weight].curvature.specs.values()}
    assert len(specs) == 2


# ------------------------------------------------------------------------------------------------- second derivatives


class Energy(nn.Module):
    """Differentiates itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 1)

    def forward(self, x):
        x = x.requires_grad_()
        return torch.autograd.grad(self.b(torch.tanh(self.a(x))).sum(), x, create_graph=True)[0]


def test_second_derivatives_need_eager():
    torch.compiler.reset()
    x = torch.randn(8, 4)
    plain = Energy()
    plain(x).square().mean().backward()
    for inner in ("eager", "aot_eager"):
        model = Energy()
        model.load_state_dict(plain.state_dict())
        lotion_fx.transform(model, "nvfp4", inner=inner)
        if inner == "eager":
            model(x).square().mean().backward()
            torch.testing.assert_close(model.a.weight.grad, plain.a.weight.grad)
            continue
        with pytest.raises(RuntimeError, match="create_graph=True: compiled graphs have no second derivatives.*eager"):
            model(x).square().mean().backward()


# --------------------------------------------------------------------------------------------------- lengths that vary


class Attention(nn.Module):
    """Takes its sizes apart as most attention blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 10)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, 32))


@pytest.mark.parametrize("method", ["lotion", "ste"])
def test_lengths_stay_symbols(method):
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = lotion_fx.transform(Attention(), "nvfp4", inner="aot_eager", method=method)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for length in (32, 17, 25, 31, 40, 12, 19, 22, 27, 36):
        optimizer.zero_grad()
        model(torch.randn(4, length, 32)).square().mean().backward()
        optimizer.step()
    assert counters["stats"]["unique_graphs"] == 2
    if method == "lotion":
        assert lotion_fx.report(model)["qkv.weight"].estimator == "analytic"
    torch.compiler.reset()
    counters.clear()
    model, x = lotion_fx.transform(Attention(), "nvfp4", inner="aot_eager", method=method), torch.randn(4, 32, 32)
    torch._dynamo.mark_dynamic(x, 1)
    model(x)
    model(torch.randn(4, 21, 32))
    assert counters["stats"]["unique_graphs"] == 1


def test_threads_serve_a_model_whose_eval_graph_none_has_made():
    """Each variant is compiled within a call, outside of Dynamo: once, while the others wait or run what they have."""
    torch.manual_seed(0)
    model = lotion_fx.transform(MLP(), "int4", inner="aot_eager")
    x, start = torch.randn(8, 20), threading.Barrier(4)
    model(x).square().mean().backward()
    model.eval()
    before = compiles["aot_eager"]

    def serve(_):
        start.wait()
        return model(x).detach()

    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(serve, range(4)))
    assert compiles["aot_eager"] == before + 1
    expected = lotion_fx.quantize(model)(x)
    for out in outputs:
        torch.testing.assert_close(out, expected)


class MaxNorm(nn.Module):
    """Its forward holds the first layer's rows to a norm; ``straight_through`` rounds the other by hand."""

    def __init__(self, straight_through):
        super().__init__()
        self.straight_through = straight_through
        self.first, self.second = nn.Linear(20, 12), nn.Linear(12, 4)

    def forward(self, x):
        self.first.weight.data.renorm_(2, 0, 0.3)
        hidden, weight = self.first(x).relu(), self.second.weight
        if self.straight_through:
            weight = weight + (rounding.rtn(weight.detach(), lotion_fx.resolve("int4"), 1) - weight).detach()
        return nn.functional.linear(hidden, weight, self.second.bias)


@pytest.mark.parametrize("method", ["ste", "ste_scale", "rr"])
def test_a_forward_that_writes_into_a_weight_trains_by_every_method(method):
    """The first graph is traced with a stand-in, no leaf, in the place of what it writes to."""
    trained = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        model = MaxNorm(by_hand)
        if not by_hand:
            lotion_fx.transform(model, "int4", method=method, inner="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 20, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        trained.append([parameter.detach() for parameter in model.parameters()])
    assert "forward writes into it" in lotion_fx.report(model)["first.weight"].reason
    if method == "ste":
        torch.testing.assert_close(*trained)
