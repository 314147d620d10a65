"""The phases of a training: which step is in which, what each does, and runs that fork from a plain beginning."""

import copy

import pytest
import torch

import lotion_fx
from lotion_fx.measuring import FIRST
from lotion_fx.numerics.noise import resolve_noise
from lotion_fx.schedule import AUTO, PHASES, Schedule, automatic, shared_out
from lotion_fx.state import registry
from tests.models import LM, MLP, counted, ids, lm_loss
from tests.runtime.steps import Recorder, one_step

THREE = (("plain", 0.6), ("lotion", 0.2), ("ste_scale", 0.2))


def phases(schedule):
    return [schedule.phase(step).name for step in range(schedule.steps)]


def test_shares_become_steps():
    schedule = Schedule(THREE, 10)
    assert phases(schedule) == ["plain"] * 6 + ["lotion"] * 2 + ["ste_scale"] * 2
    assert [schedule.after(step) for step in (0, 5, 6, 8)] == [("lotion", 6), ("lotion", 6), ("ste_scale", 8), None]
    assert schedule.term_begins == 6 and schedule.phase(1000).name == "ste_scale"
    assert Schedule().phase(7).name == "lotion" and Schedule().after(7) is None


def test_a_share_of_less_than_a_step_is_passed_over():
    assert phases(Schedule((("plain", 0.5), ("lotion", 0.01), ("ste", 0.49)), 10)) == ["plain"] * 5 + ["ste"] * 5
    assert phases(Schedule((("lotion", 0.99), ("ste", 0.01)), 10)) == ["lotion"] * 10


@pytest.mark.parametrize(
    "method, start, finish, term, shares",
    [
        ("lotion", 0, 0.4, True, [("lotion", 0.6), ("finish", 0.4)]),
        ("lotion", 0, 0.4, False, [("lotion", 0.6), ("ste_scale", 0.4)]),
        ("lotion", 0.6, 0.2, False, THREE),
        ("lotion", 0.7, 0.3, True, [("plain", 0.7), ("finish", 0.3)]),
        ("lotion", 0, 1, True, [("finish", 1.0)]),
        ("ptq", 0, 0.4, True, [("plain", 0.6), ("ste_scale", 0.4)]),
        ("ste", 0.5, 0, True, [("plain", 0.5), ("ste", 0.5)]),
        ("cage", 0.5, 0, True, [("plain", 0.5), ("ste", 0.4), ("cage", 0.1)]),
    ],
)
def test_shorthands_make_schedules(method, start, finish, term, shares):
    made = shared_out(method, start, finish, term)
    assert [name for name, _ in made] == [name for name, _ in shares]
    assert [share for _, share in made] == pytest.approx([share for _, share in shares])


def test_a_shorthand_begins_where_it_did():
    """After ``round(steps * (1 - finish))`` steps."""
    for steps in range(1, 200):
        for finish in (0.05, 0.1, 0.2, 0.3, 1 / 3, 0.4, 0.7, 0.9):
            made = Schedule(shared_out("lotion", 0, finish, True), steps)
            assert made.begins[-1] == round(steps * (1 - finish))


@pytest.mark.parametrize(
    "fmt, nearest, adaptive",
    [("nvfp4", "plain", "plain"), ("mxfp4", "plain", "plain"), ("int2", "lotion", "lotion")]
    + [(fmt, "plain", "plain") for fmt in ("int4", "nf4")]
    + [(fmt, "lotion", "plain") for fmt in ("int3", "int4/tensor", "int8/channel")],
)
def test_auto_depends_on_the_scales_and_on_the_rounding(fmt, nearest, adaptive):
    for noise, first in (("randomized", nearest), ("adaptive", adaptive)):
        model = lotion_fx.transform(LM(), fmt, noise=noise, schedule="auto", steps=5, inner="eager")
        found = registry[model.head.weight].smoothing.settings.schedule
        assert found == Schedule(automatic(lotion_fx.resolve(fmt), resolve_noise(noise)), 5)
        assert found.shares[0][0] == first
    for _, _, *both in AUTO:
        for shares in both:
            assert sum(share for _, share in shares) == pytest.approx(1) and {name for name, _ in shares} <= set(PHASES)


# ----------------------------------------------------------------------------------------------------- what phases do


def trained(count, make=counted, lr=1e-2, model=None, **options):
    torch.manual_seed(0)
    model = make(LM() if model is None else model, "int4", inner="aot_eager", **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    run(model, optimizer, range(count))
    return model, optimizer


def run(model, optimizer, steps):
    for step in steps:
        one_step(model, optimizer, lambda m, step=step: lm_loss(m, ids(seed=step)))


def assert_same(one, other):
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("method", ["lotion", "ste", "ste_scale"])
def test_a_single_phase_is_its_method(method):
    by_method, _ = trained(4, method=method)
    by_phase, _ = trained(4, schedule=[(method, 1.0)], steps=4)
    assert_same(by_method, by_phase)


def test_each_phase_does_what_its_method_does():
    """The forward and the gradient of each step, at weights that stay."""
    model = counted(
        LM(),
        "int4",
        inner="aot_eager",
        schedule=(("plain", 0.25), *((n, 0.25) for n in ("lotion", "finish", "ste"))),
        steps=4,
    )
    recorder = Recorder(model)
    alone = {}
    for method, finish in (("ptq", None), ("lotion", None), ("lotion", 1.0), ("ste", None)):
        other = LM()
        other.load_state_dict(model.state_dict())
        other = counted(other, "int4", inner="aot_eager", method=method, finish=finish, steps=finish and 1)
        alone[method, finish] = other, Recorder(other)
    for (method, finish), (other, beside) in alone.items():
        losses = []
        for one, optimizer in ((model, recorder), (other, beside)):
            optimizer.zero_grad()
            losses.append(lm_loss(one, ids()))
            losses[-1].backward()
            optimizer.step()
        assert torch.equal(*losses)
        if (method, finish) != ("lotion", 1.0):  # whose curvature has a step behind it in the schedule
            for name, given in recorder.given.items():
                assert torch.equal(given, beside.given[name]), (method, name)


def test_the_report_names_the_phase_and_the_next():
    model, optimizer = trained(0, schedule=THREE, steps=10)
    seen = []
    for step in range(10):
        run(model, optimizer, [step])
        report = lotion_fx.report(model)
        seen.append((report.phase, report.next_phase, report["head.weight"].estimator))
    assert seen == (
        [("plain", ("lotion", 6), None)] * 6
        + [("lotion", ("ste_scale", 8), "analytic")] * 2
        + [("ste_scale", None, None)] * 2
    )
    assert "phase 'ste_scale', after 10 steps" in str(report)
    assert report["head.weight"].reason == "phase 'ste_scale' has no expected-loss term"
    assert report.to_dict()["phase"] == "ste_scale"
    lotion_fx.finish(model)
    assert lotion_fx.report(model).phase == "finish"


def test_two_optimizers_of_one_iteration_are_in_one_phase():
    """No weight of the second takes a term that its forward did not ask for; warnings are errors here."""
    model = counted(LM(), "int4", inner="aot_eager", start=0.5, steps=4)
    head = torch.optim.SGD([model.head.weight], lr=0.1)
    rest = torch.optim.SGD([p for p in model.parameters() if p is not model.head.weight], lr=0.1)
    for step in range(4):
        model.zero_grad()
        lm_loss(model, ids(seed=step)).backward()
        before = model.mlp[0].weight.grad.clone()
        head.step()
        rest.step()
        assert torch.equal(before, model.mlp[0].weight.grad) == (step < 2), step


def test_a_loop_that_calls_no_model_is_in_its_phases_all_the_same():
    """Steps alone tell, where gradients come from elsewhere."""
    model = lotion_fx.transform(LM(), "int4", inner="eager", schedule=(("plain", 0.5), ("ste", 0.5)), steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert lotion_fx.report(model).phase == "ste"


# ------------------------------------------------------------------------------------------------------------ measuring


def test_measuring_begins_with_the_term():
    model, optimizer = trained(0, make=lotion_fx.transform, start=0.5, steps=20)
    measuring = registry[model.head.weight].smoothing.tally.measuring
    begun = []
    for step in range(20):
        run(model, optimizer, [step])
        begun.append(measuring.begun)
    assert begun[:11] == [0] * 11 and begun[11 : 11 + FIRST] == list(range(1, FIRST + 1)) and measuring.draws >= FIRST
    assert lotion_fx.report(model).size is not None


@pytest.mark.parametrize("schedule", [(("plain", 1.0),), (("plain", 0.5), ("finish", 0.5)), (("ste", 1.0),)])
def test_without_a_latent_term_nothing_is_measured(schedule):
    model, _ = trained(8, make=lotion_fx.transform, schedule=schedule, steps=8)
    assert registry[model.head.weight].smoothing.tally.measuring.begun == 0
    assert lotion_fx.report(model).size is None


def test_measuring_is_as_it_was_where_the_term_comes_late():
    """The same weights, batches and optimizer state: a late term is measured as one from the start is."""
    sizes = []
    for start in (None, 0.5):
        model, optimizer = trained(0, make=lotion_fx.transform, lr=0.0, start=start, steps=start and 20)
        if start:
            run(model, torch.optim.SGD(model.parameters(), lr=0.0), range(10))
        run(model, optimizer, range(10))
        sizes.append(lotion_fx.report(model).measurements)
    assert sizes[0] == sizes[1] > FIRST


# ---------------------------------------------------------------------------------------------------- resumes and forks


@pytest.mark.parametrize("kind, at", [("factored", 2), ("factored", 5), ("factored", 7), ("fisher", 2), ("ggn", 5)])
def test_a_resume_in_any_phase_is_bit_for_bit(kind, at):
    options = {"make": lotion_fx.transform, "curvature": kind, "steps": 8}
    options["schedule"] = (("plain", 0.5), ("lotion", 0.25), ("finish", 0.25))
    whole, _ = trained(8, **options)
    first, optimizer = trained(at, **options)
    resumed, other = trained(0, **options)
    resumed.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(resumed, other, range(at, 8))
    assert_same(resumed, whole)
    assert lotion_fx.report(resumed).to_dict() == lotion_fx.report(whole).to_dict()


@pytest.mark.parametrize("fmt, kind", [("int4", "factored"), ("int4", "ggn"), ("nvfp4", "fisher")])
def test_plain_training_is_the_beginning_of_any_run(fmt, kind):
    """Up to there it is ``method="ptq"``, bit for bit, and from its checkpoint it goes on as if never interrupted."""
    ours = {
        "curvature": kind,
        "inner": "aot_eager",
        "schedule": (("plain", 0.5), ("lotion", 0.3), ("ste_scale", 0.2)),
        "steps": 10,
    }
    curvature = "ggn" if kind == "ggn" else "factored"  # whose passes count the forwards before them
    plain, optimizer = trained(5, make=lotion_fx.transform, method="ptq", curvature=curvature)
    torch.manual_seed(0)
    whole = lotion_fx.transform(LM(), fmt, **ours)
    its = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    run(whole, its, range(5))
    assert_same(plain, whole)
    forked = lotion_fx.transform(LM(), fmt, **ours)
    other = torch.optim.AdamW(forked.parameters(), lr=1e-2)
    forked.load_state_dict(plain.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, stepping in ((whole, its), (forked, other)):
        torch.manual_seed(1)
        run(model, stepping, range(5, 10))
    assert_same(forked, whole)
    assert lotion_fx.report(forked).to_dict() == lotion_fx.report(whole).to_dict()


def test_a_finish_by_hand_is_kept_by_a_resume():
    first, optimizer = trained(2, method="lotion")
    lotion_fx.finish(first, term=False)
    resumed, other = trained(0, method="lotion")
    resumed.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert lotion_fx.report(resumed).phase == "ste_scale"
    for model, stepping in ((first, optimizer), (resumed, other)):
        run(model, stepping, range(2, 4))
    assert_same(first, resumed)


def test_the_report_names_the_phase_that_auto_chose():
    """And the method where it is the method that has no term."""
    chosen = lotion_fx.transform(MLP(), "nvfp4", noise="adaptive", schedule="auto", steps=10)
    assert lotion_fx.report(chosen)["up.weight"].reason == "phase 'plain' has no expected-loss term"
    plain = lotion_fx.transform(MLP(), "nvfp4", method="ptq")
    assert lotion_fx.report(plain)["up.weight"].reason == "method='ptq' has no expected-loss term"
