"""The pass that curvature="ggn" makes of its own leaves no trace in the user's step, and comes when it is due."""

import contextlib
import functools
import io
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from lotion_fx import kept_state, sampling
from lotion_fx.likelihood import sampled_loss
from lotion_fx.passes.attach.probe import Code
from lotion_fx.state import registry
from lotion_fx.update import curvature_of
from tests.models import LM, MLP, VOCAB, ids, lm_loss
from tests.runtime.steps import Recorder, one_step


@pytest.fixture
def passes(monkeypatch):
    """The likelihood of each curvature pass made so far."""
    made = []

    def counted(output, likelihood, generator):
        made.append(likelihood)
        return sampled_loss(output, likelihood, generator)

    monkeypatch.setattr(sampling, "sampled_loss", counted)
    return made


# ------------------------------------------------------------------------------------------------- no trace of the pass


class Stateful(nn.Module):
    """Everything that a forward may leave behind: running statistics, a counter made anew, random numbers used up."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("largest", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls = self.calls + 1
        x = F.dropout(self.norm(self.conv(x)).relu(), 0.3, self.training)
        self.largest.copy_(x.detach().amax())
        return self.head(x.mean((2, 3)))


def test_the_user_s_own_step_is_that_of_plain_training():
    def run(**options):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = lotion_fx.transform(Stateful(), "int4/tensor", inner="aot_eager", **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        seen = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(torch.randn(6, 3, 7, 7)), torch.arange(6) % 5)
            seen += [b.clone() for b in model.buffers()]
            loss.backward()
            seen += [loss.detach(), torch.get_rng_state(), *(p.grad.clone() for p in model.parameters())]
            optimizer.step()
        return model, seen

    plain, expected = run(method="ptq")
    model, found = run(curvature="ggn", strength=0.0)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert model.calls == 3 and model.norm.num_batches_tracked == 3
    assert list(map(id, model.buffers())) != list(map(id, plain.buffers())) and model.largest > 0
    assert lotion_fx.report(model)["conv.weight"].estimator == "ggn"


class Tracking(nn.Module):
    """Keeps a mean of its inputs, in ways that count as no change, or in what is no buffer."""

    def __init__(self, how, breaks):
        super().__init__()
        self.how, self.norm, self.head = how, nn.BatchNorm1d(24), nn.Linear(24, 5)
        self.register_buffer("held", torch.zeros(1, 24))
        self.register_buffer("spread", torch.zeros(1).expand(3), persistent=False)  # no write in place is possible
        self.mean = nn.Parameter(torch.zeros(24), requires_grad=False)
        self.followed = torch.compiler.disable(self.follow) if breaks else self.follow

    def follow(self, x):
        new = x.detach().mean(0)
        if self.how == "norm":
            return self.norm(x)
        if self.how == "data":
            self.held.data.mul_(0.9).add_(new, alpha=0.1)
        elif self.how == "data replaced":
            self.held.data = self.held.data * 0.9 + new * 0.1
        else:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(new, alpha=0.1)
        return x - self.held - self.mean

    def forward(self, x):
        return self.head(self.followed(x).tanh())


@pytest.mark.parametrize(
    ("how", "breaks"),
    [("norm", True), ("data", False), ("data", True), ("data replaced", True), ("param", False), ("param", True)],
)
def test_what_changes_without_a_version_is_put_back(how, breaks, passes):
    torch._dynamo.reset()
    plain = Tracking(how, breaks)
    model = Tracking(how, breaks)
    model.load_state_dict(plain.state_dict())
    lotion_fx.transform(model, "int4", inner="aot_eager", curvature="ggn")
    memory = model.held.data_ptr()
    for step in range(2):
        x = torch.randn(8, 24) + step
        plain(x)
        F.cross_entropy(model(x), torch.arange(8) % 5).backward()
    assert passes and (how == "data replaced" or model.held.data_ptr() == memory)
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected, msg=name)


def test_only_small_untrained_parameters_are_copied(monkeypatch):
    """Or each pass under LoRA would copy the model; what nothing wrote to counts no change."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.BatchNorm1d(5))
    model[0].requires_grad_(False)
    monkeypatch.setattr(kept_state, "LARGEST", 10)
    versions = [x._version for x in model.state_dict(keep_vars=True).values()]
    with kept_state.kept_state(model) as kept:
        by_value = {x for x, each in kept.items() if each.values is not None}
    assert by_value == {model[0].bias, *model.buffers()} and len(kept) == len(versions)
    assert versions == [x._version for x in model.state_dict(keep_vars=True).values()]


class Greedy(nn.Module):
    """Changes all that it is given: its inputs, through a slice of a larger tensor, and what lies in a dictionary."""

    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(7, 9), nn.Linear(9, 5)

    def forward(self, x, state):
        x.mul_(0.25)
        state["calls"] += 1
        state["sums"].add_(x.sum(0))
        return self.head(self.up(x + state["sums"]).relu()) * state["calls"]


class Opening(Greedy):
    """What it is given lies in an object."""

    def forward(self, x, held):
        return super().forward(x, held.state)


@pytest.mark.parametrize("make", [Greedy, Opening])
def test_the_user_s_forward_finds_its_inputs_as_they_were_and_leaves_them_changed(make):
    def run(**options):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = lotion_fx.transform(make(), "int4/tensor", inner="aot_eager", calibrate=False, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        state, seen = {"calls": 0, "sums": torch.zeros(7)}, []
        given = state if make is Greedy else SimpleNamespace(state=state)
        for _ in range(2):
            optimizer.zero_grad()
            x = torch.randn(6, 8)[:, 1:]
            loss = F.cross_entropy(model(x, given), torch.arange(6) % 5)
            loss.backward()
            seen += [loss.detach(), x.clone(), state["sums"].clone(), torch.tensor(state["calls"])]
            optimizer.step()
        return seen

    assert all(map(torch.equal, run(curvature="ggn", strength=0.0), run(method="ptq")))


def test_the_pass_touches_no_gradient_and_the_user_s_forward_carries_no_probe(passes):
    model = lotion_fx.transform(LM(), inner="aot_eager", curvature="ggn")
    parameter = model.head.weight
    parameter.grad = torch.ones_like(parameter)
    fired = []
    parameter.register_post_accumulate_grad_hook(fired.append)
    out = model(ids())
    weight = registry[parameter]
    vector = weight.gathered.probe.grad.clone()
    assert len(passes) == 1 and not fired and torch.equal(parameter.grad, torch.ones_like(parameter))
    lm_loss(lambda _: out, ids()).backward()
    assert fired and torch.equal(weight.gathered.probe.grad, vector)


def test_a_pass_that_raises_leaves_things_as_they_were():
    class Moody(Stateful):
        def forward(self, x):
            out = super().forward(x)
            return out if self.good else out.sum()

    model = lotion_fx.transform(Moody(), "int4/tensor", inner="aot_eager", curvature="ggn")
    model.good = False
    before, state = [b.clone() for b in model.buffers()], torch.get_rng_state()
    x = torch.ones(2, 3, 7, 7)
    with pytest.raises(ValueError, match="curvature='ggn'.* draws labels.*holds no differentiable"):
        model(x)
    assert all(map(torch.equal, model.buffers(), before)) and torch.equal(torch.get_rng_state(), state)
    model.good = True
    model(x)
    assert (
        registry[model.head.weight].gathered.probe.grad is not None
        and not registry[model.head.weight].smoothing.tally.sampling
    )


# ----------------------------------------------------------------------------------------------------- training's loops


def trained(loss, steps=1, likelihood=None, make=LM, **options):
    torch.manual_seed(0)
    model = lotion_fx.transform(make(), "int4", inner="aot_eager", **{"curvature": "ggn", **options})
    recorder = Recorder(model)
    for _ in range(steps):
        recorder.zero_grad()
        loss(model)
        recorder.step()
    return model


def states(model):
    return {
        w.name: w.curvature.ema for w in registry[model.head.weight].smoothing.weights if w.curvature.ema is not None
    }


@pytest.mark.parametrize("together", [False, True])
def test_micro_batches_are_one_batch(monkeypatch, together):
    """At labels that depend on a position's own output alone; a backward pass after each forward, or one for all."""

    def likeliest(output, likelihood, generator):
        flat = output.flatten(0, -2)
        return F.cross_entropy(flat, flat.argmin(-1))

    def accumulate(model):
        losses = []
        for part in ids(32).split(8):
            losses.append(lm_loss(model, part) / 4)
            if not together:
                losses.pop().backward()
        sum(losses).backward() if together else None

    monkeypatch.setattr(sampling, "sampled_loss", likeliest)
    parts = trained(accumulate, steps=2, calibrate=False)
    whole = trained(lambda model: lm_loss(model, ids(32)).backward(), steps=2, calibrate=False)
    for name, state in states(whole).items():
        torch.testing.assert_close(states(parts)[name], state, rtol=1e-4, atol=1e-6 * state.abs().max().item())


def test_each_micro_batch_draws_labels_of_its_own(passes):
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager", curvature="ggn")
    probe = lambda: registry[model.head.weight].gathered.probe.grad[:-3]  # noqa: E731
    model(ids())
    first = probe().clone()
    model(ids())
    assert passes == ["categorical"] * 2 and registry[model.head.weight].smoothing.tally.draws == 2 * ids().numel()
    assert not torch.allclose(probe() - first, first)


def test_grad_scaler_does_not_enter():
    plain = trained(lambda model: lm_loss(model, ids()).backward())
    model = trained(lambda model: None)  # made alike, no step taken
    recorder, scaler = Recorder(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(lm_loss(model, ids())).backward()
    scaler.step(recorder)
    for name, state in states(plain).items():
        assert torch.equal(state, states(model)[name]), name


def test_half_precision_keeps_small_gradients():
    """A mean's gradients over this many rows would underflow in float16; those of the sum do not."""
    x = torch.randn(20_000, 20)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(20, 16), nn.Linear(16, 7)
            nn.init.normal_(self.head.weight, std=1e-3)

        def forward(self, x):
            return self.head(self.body(x).tanh())

    def run(context):
        def loss(model):
            with context:
                model(x).sum().backward()

        model = trained(loss, make=Classifier)
        weights = model.body.weight, model.head.weight
        return [curvature_of(registry[weight], weight) for weight in weights]

    exact, half = run(contextlib.nullcontext()), run(torch.autocast("cpu", torch.float16))
    for mine, theirs in zip(half, exact, strict=True):
        assert (mine - theirs).norm() < 0.05 * theirs.norm()


def test_the_pass_s_backward_runs_outside_of_autocast():
    class Watched(nn.Sequential):
        def forward(self, x):
            out = super().forward(x)
            out.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
            return out

    seen = []
    model = Watched(nn.Linear(6, 5))
    lotion_fx.transform(model, "int4/tensor", inner="aot_eager", curvature="ggn", regions=[model[0]])
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 6))
    assert seen == [False]


def test_a_weight_first_met_between_passes_waits_for_the_next():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.other = nn.Linear(20, 7), nn.Linear(20, 7)

        def forward(self, x, which):
            return self.other(x) if which else self.head(x)

    model = lotion_fx.transform(TwoHeads(), "int4/tensor", inner="aot_eager", curvature="ggn", refresh=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, which in enumerate([False, True, True, False]):
        one_step(model, optimizer, lambda m, which=which: m(torch.randn(4, 20), which).square().mean())
        assert lotion_fx.report(model)["other.weight"].estimator == ("ggn" if step >= 2 else None)
    assert states(model)["other.weight"][-1] == pytest.approx(mass(1, refresh=2)) == states(model)["head.weight"][-1]


def mass(passes, refresh):
    """Of a moving average that forgets by .99 a step, after so many of every `refresh`-th step."""
    return 1 - 0.99 ** (refresh * passes)


def test_a_state_loaded_back_gets_its_pass_again(passes):
    model = trained(lambda model: lm_loss(model, ids()).backward(), steps=2)
    state = lotion_fx.state_dict(model)
    one_step(model, Recorder(model), lambda m: lm_loss(m, ids()))
    lotion_fx.load_state_dict(model, state)
    model(ids())
    assert len(passes) == 4


def test_refresh_rests_between_passes(passes):
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager", curvature="ggn", refresh=3, calibrate=False)
    recorder = Recorder(model)
    masses = []
    for step in range(7):
        one_step(model, recorder, lambda m, step=step: lm_loss(m, ids(seed=step)))
        masses.append(registry[model.head.weight].curvature.ema[-1].item())
        plain = LM()
        plain.load_state_dict(model.state_dict())
        lm_loss(plain, ids(seed=step)).backward()
        assert not torch.allclose(recorder.given["head.weight"], plain.head.weight.grad, rtol=1e-5, atol=0)
    assert len(passes) == 3 and masses == pytest.approx([mass(1 + step // 3, refresh=3) for step in range(7)])


def test_two_optimizers_share_one_pass(passes):
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager", curvature="ggn", refresh=2, calibrate=False)
    head = torch.optim.SGD([model.head.weight], lr=0.0)
    rest = torch.optim.SGD([p for p in model.parameters() if p is not model.head.weight], lr=0.0)
    for step in range(5):
        model.zero_grad()
        lm_loss(model, ids(seed=step)).backward()
        head.step()
        rest.step()
    assert len(passes) == 3
    assert all(state[-1] == pytest.approx(mass(3, refresh=2)) for state in states(model).values())


def test_no_pass_outside_of_training(passes):
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager", curvature="ggn")
    with torch.no_grad():
        model(ids())
    with lotion_fx.full_precision(model):
        model(ids())
    model.eval()(ids())
    assert not passes
    model.train()(ids())
    assert len(passes) == 1
    finished = lotion_fx.transform(LM(), "int4", inner="aot_eager", curvature="ggn")
    lotion_fx.finish(finished, term=False)
    finished(ids())
    assert len(passes) == 1


def test_training_in_eval_mode_keeps_the_last_curvature():
    model = lotion_fx.transform(LM(), "int4", inner="aot_eager", curvature="ggn", calibrate=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    one_step(model, optimizer, lambda m: lm_loss(m, ids()))
    before = registry[model.head.weight].curvature.ema.clone()
    model.eval()
    with pytest.warns(UserWarning, match=r"curvature of .*head.weight did not arrive"):
        one_step(model, optimizer, lambda m: lm_loss(m, ids()))
    assert torch.equal(registry[model.head.weight].curvature.ema, before)
    one_step(model, optimizer, lambda m: lm_loss(m, ids()))  # said once
    one_step(model.train(), optimizer, lambda m: lm_loss(m, ids()))
    assert not torch.equal(registry[model.head.weight].curvature.ema, before)


def resumable(state=None):
    torch.manual_seed(0)
    model = nn.Sequential(LM(), nn.Dropout(0.2))
    if state is not None:
        model.load_state_dict(state["model"])
    lotion_fx.transform(model, "nvfp4", curvature="ggn", refresh=4, inner="aot_eager", finish=0.5, steps=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        lotion_fx.load_state_dict(model, state["lotion"])
        torch.set_rng_state(state["rng"])
    return model, optimizer


def saved(model, optimizer):
    file = io.BytesIO()
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "lotion": lotion_fx.state_dict(model)}
    torch.save(states | {"rng": torch.get_rng_state()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@functools.cache
def whole_run():
    """A model after ten steps, and what was saved before each."""
    model, optimizer = resumable()
    states = []
    for step in range(10):
        states.append(saved(model, optimizer))
        one_step(model, optimizer, lambda m, step=step: lm_loss(m, ids(seed=step)))
    return model, states


@pytest.mark.parametrize("at", [2, 4])
def test_a_resumed_run_is_bit_identical(at):
    whole, states = whole_run()
    resumed, optimizer = resumable(states[at])
    for step in range(at, 10):
        one_step(resumed, optimizer, lambda m, step=step: lm_loss(m, ids(seed=step)))
    for (name, mine), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert lotion_fx.report(resumed).to_dict() == lotion_fx.report(whole).to_dict()
    with pytest.raises(ValueError, match="curvature=.*'ggn'.*'factored'"):
        lotion_fx.load_state_dict(lotion_fx.transform(nn.Sequential(LM()), inner="eager"), states[at]["lotion"])


# ------------------------------------------------------------------------------------ weights without Gauss-Newton form


class Normalized(LM):
    """A head that is not linear in its weight, which the user's own gradient serves; ``inside`` makes the loss too."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, ids):
        x = self.token(ids)
        logits = F.linear(self.norm(x + self.mlp(x)), F.normalize(self.head.weight))
        loss = F.cross_entropy(logits.flatten(0, 1), self.labels(ids)) if self.inside else None
        return {"loss": loss, "logits": logits}

    def labels(self, ids):
        return ids.roll(-1, 1).flatten()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("clip", [False, True])
def test_a_nonlinear_weight_takes_the_user_s_gradient_and_terms(inside, parts, clip):
    def loss(model):
        for part in ids(9).chunk(parts):
            out = model(part)
            found = out["loss"] if inside else F.cross_entropy(out["logits"].flatten(0, 1), model.labels(part))
            (found / parts).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    make = lambda: Normalized(inside)  # noqa: E731
    ggn, factored = (trained(loss, 2, make=make, curvature=kind) for kind in ("ggn", "factored"))
    row = lotion_fx.report(ggn)["head.weight"]
    assert row.estimator == "fisher" and row.reason == Code.NONLINEAR.reason
    torch.testing.assert_close(states(ggn)["head.weight"], states(factored)["head.weight"], rtol=1e-4, atol=0)
    assert not torch.allclose(states(ggn)["mlp.0.weight"], states(factored)["mlp.0.weight"], rtol=1e-2)


def test_terms_of_a_skipped_step_do_not_stay():
    model = lotion_fx.transform(Normalized(False), "int4", inner="aot_eager", curvature="ggn")
    smoothing = registry[model.head.weight].smoothing
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        model.zero_grad()
        lm_loss(lambda x: model(x)["logits"], ids()).backward()
    optimizer.step()
    assert smoothing.tally.last_loss_count == 40


def test_a_model_of_analytic_weights_counts_no_terms():
    model = trained(lambda model: lm_loss(model, ids()).backward(), calibrate=False)
    hooks = (model(ids())._backward_hooks or {}).values()
    assert [hook.__name__ for hook in hooks] == ["_refuse_second_derivatives"]


# ------------------------------------------------------------------------------------------------------------- refusals


def test_the_loss_itself_names_the_likelihood(passes):
    for loss in (F.mse_loss, nn.BCEWithLogitsLoss()):
        lotion_fx.transform(MLP(), inner="aot_eager", curvature="ggn", likelihood=loss)(torch.randn(3, 20))
    assert passes == ["gaussian", "bernoulli"]


def test_a_model_that_returns_a_loss_alone_is_told_what_to_return():
    class LossOnly(LM):
        def forward(self, ids):
            return F.cross_entropy(super().forward(ids).flatten(0, 1), ids.flatten())

    model = lotion_fx.transform(LossOnly(), inner="aot_eager", curvature="ggn")
    with pytest.raises(ValueError, match="holds no differentiable.*return logits.*beside the loss"):
        model(ids())


def test_a_checkpointed_model_with_regions():
    """Recomputation runs in the pass's own backward, where the graphs must be those that carry probes."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(2))
            self.head = nn.Linear(16, VOCAB)

        def forward(self, x):
            for block in self.blocks:
                x = x + torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            return self.head(x)

    def state(regions):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = Checkpointed()
        chosen = [*model.blocks, model.head] if regions else None
        lotion_fx.transform(model, "int4", inner="aot_eager", curvature="ggn", regions=chosen)
        x = torch.randn(8, 16)
        one_step(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m: m(x).square().mean())
        return states(model)

    whole, parts = state(False), state(True)
    assert len(parts) == 3
    for name, mine in parts.items():
        torch.testing.assert_close(mine, whole[name], msg=name)
