"""`loss_graphs`: graphs of batches, those that are equal held once; and the model they are traced of, which stays."""

import contextlib
import itertools
from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

import lotion_fx
from lotion_fx.loss_graph import loss_graph, loss_graphs
from tests.models import MLP


def batch(rows):
    return torch.randn(rows, 20), torch.arange(rows) % 7


def test_batches_of_one_graph_hold_it_once():
    """What memory takes is of graphs, not of batches; what another batch shapes otherwise is its own."""
    torch.manual_seed(0)
    model = MLP()
    model.up.register_forward_pre_hook(lambda module, args: (args[0] * len(args[0]),))
    given = [batch(rows) for rows in (4, 4, 6, 4, 6)]
    graphs = loss_graphs(model, given, F.cross_entropy)
    assert [next(i for i, b in enumerate(graphs) if b.gm is a.gm) for a in graphs] == [0, 0, 2, 0, 2]
    for graph, (x, labels) in zip(graphs, given, strict=True):
        torch.testing.assert_close(graph.loss({}), F.cross_entropy(model(x), labels))


def test_graphs_that_read_other_constants_are_others():
    model, count = MLP(), itertools.count(1)
    model.up.register_forward_pre_hook(lambda module, args: (args[0] * torch.tensor(float(next(count))),))
    given = batch(4)
    a, b = loss_graphs(model, [given, given], F.cross_entropy)
    assert a.gm.code == b.gm.code and a.gm is not b.gm
    assert a.loss({}) != b.loss({})


def test_each_pass_finds_a_buffer_that_it_writes_to_as_the_first_did():
    """Or a loss would depend on those taken before."""

    class Counting(MLP):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls.view(-1).add_(1)
            return super().forward(x) * self.calls

    model, given = Counting(), batch(4)
    a, b = loss_graphs(model, [given, given], F.cross_entropy)
    torch.testing.assert_close(a.loss({}), F.cross_entropy(model(given[0]), given[1]))
    assert a.gm is b.gm and a.loss({}) == a.loss({}) == b.loss({})


class Following(MLP):
    """Its statistics are made of each batch in `eval()` too, by kernels and writes that bump no version."""

    def __init__(self, how):
        super().__init__()
        self.how, self.norm = how, nn.BatchNorm1d(20)
        self.register_buffer("mean", torch.zeros(20))
        self.untrained = nn.Parameter(torch.zeros(20), requires_grad=False)

    def train(self, mode=True):
        super().train(mode)
        self.norm.train()
        return self

    def forward(self, x):
        new = x.detach().mean(0)
        if self.how == "norm":
            return super().forward(self.norm(x))
        if self.how == "data":
            self.mean.data.add_(new)
        else:
            with torch.no_grad():
                self.untrained.add_(new)
        return super().forward(x + self.mean + self.untrained)


@pytest.mark.filterwarnings("ignore:round_")  # one batch says little
@pytest.mark.parametrize("how", ["norm", "data", "untrained"])
@pytest.mark.parametrize("call", ["graph", "expected", "round_", "suggest"])
def test_what_a_forward_changes_without_a_version_stays(call, how):
    torch._dynamo.reset()
    model, given = Following(how), batch(4)
    if call != "suggest":
        lotion_fx.transform(model, "int4", inner="aot_eager", calibrate=False)
        model(given[0])
    before = {name: x.clone() for name, x in model.state_dict().items() if name.startswith(("norm", "mean", "untr"))}
    # What the forward reads after such a write is not in its trace.
    is_refused = pytest.raises(ValueError, match="that of its trace") if how == "data" else contextlib.nullcontext()
    with is_refused:
        if call == "graph":
            graph = loss_graph(model, given, F.cross_entropy)
            assert graph.loss({}) == graph.loss({})
        elif call == "expected":
            lotion_fx.expected_loss(model, given, F.cross_entropy, samples=2)
        elif call == "round_":
            lotion_fx.round_(model, [given], F.cross_entropy)
        else:
            lotion_fx.suggest(model, given, F.cross_entropy, bits=5.0)
    after = model.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())


class Scaled(MLP):
    """Its inputs are scaled in place, or not; what is looked at is a view, as it is after most first lines."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place

    def forward(self, x):
        if self.in_place:
            x.view(-1).mul_(0.25)
        else:
            x = x * 0.25
        return super().forward(x)


class Shared(nn.Module):
    """One layer applied three times, as ALBERT's, and one that a second name leads to."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(20, 20)] * 3)
        self.head = nn.Linear(20, 7)
        self.classifier = self.head

    def forward(self, x):
        for layer in self.layers:
            x = F.gelu(layer(x))
        return self.classifier(x)


CALLS = {
    "expected_loss": lambda model, given: lotion_fx.expected_loss(model, given, F.cross_entropy),
    "round_": lambda model, given: lotion_fx.round_(model, [given], F.cross_entropy),
    "suggest": lambda model, given: lotion_fx.suggest(model, given, F.cross_entropy),
    "diagnose": lambda model, given: lotion_fx.diagnose(model, given, F.cross_entropy),
    "calibrate": lambda model, given: lotion_fx.calibrate(model, [given], F.cross_entropy, samples=2),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_module_of_several_names_keeps_its_parameters(call):
    """The objects themselves, which an optimizer holds, in each place where they were."""
    torch.manual_seed(0)
    model = lotion_fx.transform(Shared(), "int4", inner="aot_eager")
    held = list(model.named_parameters(remove_duplicate=False))
    CALLS[call](model, batch(16))
    after = list(model.named_parameters(remove_duplicate=False))
    assert [(name, id(parameter)) for name, parameter in after] == [(name, id(parameter)) for name, parameter in held]
    assert len(held) == 10 and all(isinstance(parameter, nn.Parameter) for _, parameter in after)


def test_a_forward_that_raises_leaves_the_parameters():
    model = Shared()
    held = [id(parameter) for parameter in model.parameters()]
    model.classifier.register_forward_hook(lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_graph(model, batch(4), F.cross_entropy)
    assert [id(parameter) for parameter in model.parameters()] == held


@pytest.mark.parametrize("call", [*CALLS, "in order, and rounds"])
def test_a_forward_that_changes_its_inputs_sees_each_time_what_was_given(call):
    calls = CALLS | {
        "in order, and rounds": lambda model, given: lotion_fx.round_(
            model, [given], F.cross_entropy, method="descent", rounds=2
        )
    }
    said = []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = lotion_fx.transform(Scaled(in_place), "int2", inner="aot_eager")
        given = batch(16)
        before = given[0].clone()
        torch.manual_seed(1)
        said.append((str(calls[call](model, given)), [parameter.tolist() for parameter in model.parameters()]))
        assert torch.equal(given[0], before)
    assert said[0] == said[1]


class Holder:
    def __init__(self, x):
        self.x = x


@dataclass
class Batch:
    x: torch.Tensor


HOLDERS = {
    "mapping": lambda x: UserDict(x=x),
    "object": Holder,
    "dataclass": Batch,
    "inside": lambda x: [SimpleNamespace(x=Holder([x]))],
}


def tensor_of(held):
    while not isinstance(held, torch.Tensor):
        held = held[0] if isinstance(held, list) else held["x"] if isinstance(held, UserDict) else held.x
    return held


class Opening(Scaled):
    def forward(self, x):
        return super().forward(tensor_of(x))


@pytest.mark.parametrize("call", ["expected_loss", "in order"])
@pytest.mark.parametrize("make", HOLDERS.values(), ids=HOLDERS)
def test_tensors_in_objects_are_inputs_as_all_others(make, call):
    """What came of them counted as constants: weights were rounded in no order, on what the last pass had left."""
    calls = CALLS | {
        "in order": lambda model, given: lotion_fx.round_(model, [given], F.cross_entropy, method="descent")
    }
    said = []
    for held in (lambda x: x, make):
        torch.manual_seed(0)
        model = lotion_fx.transform(Opening(True), "int2", inner="aot_eager")
        x, labels = batch(16)
        before, given = x.clone(), held(x)
        torch.manual_seed(1)
        said.append((str(calls[call](model, (given, labels))), [p.tolist() for p in model.parameters()]))
        assert tensor_of(given) is x and torch.equal(x, before)
    assert said[0] == said[1]


class Memory:
    """Of what was seen before, as a cache of keys and values is."""

    def __init__(self, sums):
        self.sums, self.calls = sums, 0

    def update(self, x):
        self.sums, self.calls = self.sums + x.mean(0), self.calls + 1
        return self.sums * self.calls


class Remembering(MLP):
    def forward(self, x, memory):
        return super().forward(x + memory.update(x))


@pytest.mark.parametrize("call", CALLS)
def test_an_object_that_a_forward_changes_is_each_time_what_was_given(call):
    torch.manual_seed(0)
    model = lotion_fx.transform(Remembering(), "int2", inner="aot_eager", calibrate=False)
    (x, labels), sums = batch(16), torch.ones(20)
    memory = Memory(sums)
    CALLS[call](model, ((x, memory), labels))
    assert memory.sums is sums and memory.calls == 0 and torch.equal(sums, torch.ones(20))
    graphs = loss_graphs(model, [((x, memory), labels)] * 2, F.cross_entropy)
    with lotion_fx.full_precision(model):
        expected = F.cross_entropy(model(x, Memory(sums)), labels)
    for graph in graphs:
        torch.testing.assert_close(graph.loss({}), expected)


def test_a_batch_that_is_its_own_target_changes_with_it():
    """As in training: the two are one tensor."""
    model = Scaled(True)
    model.down = nn.Linear(33, 20)
    x = torch.randn(4, 20)
    graph = loss_graph(model, (x, x), F.mse_loss)
    given = x.clone()
    torch.testing.assert_close(graph.loss({}), F.mse_loss(model(given), given))


def test_only_what_is_written_is_copied():
    for in_place in (False, True):
        nodes = loss_graph(Scaled(in_place), batch(4), F.cross_entropy).gm.graph.nodes
        assert sum(node.target is torch.ops.aten.clone.default for node in nodes) == in_place


class Checkpointed(MLP):
    """Its middle is computed again in the backward pass, in the way named."""

    def __init__(self, reentrant):
        super().__init__()
        self.middle, self.reentrant = nn.Linear(33, 33), reentrant

    def forward(self, x):
        h = checkpoint(lambda h: F.gelu(self.middle(h)), F.gelu(self.up(x)), use_reentrant=self.reentrant)
        return self.down(h)


@pytest.mark.parametrize("call", CALLS)
def test_a_reentrant_checkpoint_is_as_any_other(call):
    said = []
    for reentrant in (True, False):
        torch.manual_seed(0)
        model = lotion_fx.transform(Checkpointed(reentrant), "int4", inner="aot_eager")
        given = batch(16)
        if call == "calibrate":
            torch.manual_seed(1)
        said.append((str(CALLS[call](model, given)), [parameter.tolist() for parameter in model.parameters()]))
    assert said[0] == said[1]


def test_checkpoints_are_themselves_again():
    model, given = Checkpointed(True), batch(4)
    loss_graph(model, given, F.cross_entropy)
    assert "apply" not in vars(CheckpointFunction)
    calls = []
    model.middle.register_forward_hook(lambda *call: calls.append(call))
    F.cross_entropy(model(given[0]), given[1]).backward()
    assert len(calls) == 2


IGNORED = torch.full((16,), -100)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("given", [(batch(16)[0], IGNORED), (batch(16)[0] * torch.nan, batch(16)[1]), batch(0)])
def test_a_batch_whose_loss_is_no_number_is_refused(given, call):
    model = lotion_fx.transform(MLP(), "int4", inner="aot_eager")
    with pytest.raises(ValueError, match=r"batch(es\[0\])?: its loss is nan at the weights as they are; leave out"):
        CALLS[call](model, given)


def test_of_several_the_one_is_named():
    model = lotion_fx.transform(MLP(), "int4", inner="aot_eager")
    batches = [batch(16), batch(16), (batch(16)[0], IGNORED)]
    for call in (lotion_fx.round_, lotion_fx.calibrate):
        with pytest.raises(ValueError, match=r"batches\[2\]: its loss is nan"):
            call(model, batches, F.cross_entropy)


def test_a_forgotten_loss_is_asked_for():
    model = lotion_fx.transform(MLP(), "int4", inner="aot_eager")
    for call in (lotion_fx.expected_loss, lotion_fx.suggest, lambda m, b: lotion_fx.round_(m, [b])):
        with pytest.raises(TypeError, match=r"forward does not take it .*; pass loss_fn if it is \(inputs, targets\)"):
            call(model, batch(16))


def test_a_hook_may_take_what_the_forward_does_not():
    model, given = lotion_fx.transform(nn.Linear(20, 7), "int4", inner="aot_eager"), (torch.randn(4, 20),) * 2
    model.register_forward_pre_hook(lambda module, args: (args[0] + args[1],))
    model.register_forward_hook(lambda module, args, out: out.square().mean())
    torch.testing.assert_close(lotion_fx.expected_loss(model, given).loss, model(*given))


class Filling(MLP):
    """Writes its output step by step into one tensor, through views."""

    def forward(self, x):
        out, made = torch.zeros(len(x), 7), super().forward(x)
        for place in range(7):
            out[:, place] = made[:, place]
        return out


@pytest.mark.parametrize("call", CALLS)
def test_an_output_that_is_filled_has_a_gradient(call):
    CALLS[call](lotion_fx.transform(Filling(), "int4", inner="aot_eager"), batch(16))


@pytest.mark.parametrize("call", CALLS)
def test_a_loss_without_gradient_is_refused(call):
    model = lotion_fx.transform(MLP(), "int4", inner="aot_eager")
    model.register_forward_hook(lambda module, args, out: out.detach())
    with pytest.raises(ValueError, match=r"loss_fn: the loss has no gradient of any parameter; is it of detached"):
        CALLS[call](model, batch(16))


@pytest.mark.parametrize("call", CALLS)
def test_inference_mode_is_refused(call):
    model = lotion_fx.transform(MLP(), "int4", inner="aot_eager")
    given = batch(16)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode.. is on, .*; call this outside of it"):
        CALLS[call](model, given)


@pytest.mark.parametrize("call", CALLS)
def test_batches_that_inference_mode_made_are_as_others(call):
    """Labels of a teacher that ran under it, for example."""
    said = []
    for mode in (torch.inference_mode, torch.no_grad):
        torch.manual_seed(0)
        model = lotion_fx.transform(MLP(), "int4", inner="aot_eager")
        with mode():
            given = batch(16)
        said.append((str(CALLS[call](model, given)), [parameter.tolist() for parameter in model.parameters()]))
    assert said[0] == said[1]


class _Loss:
    """Of outputs, labels and a model: with parameters of its own, a teacher, a compiled part, the model again."""

    def __init__(self):
        torch.manual_seed(3)
        self.log_scale, self.teacher = nn.Parameter(torch.tensor(0.3)), MLP()
        self.compiled = torch.compile(MLP(), backend="eager")

    def __call__(self, model, outputs, x, labels):
        loss = F.cross_entropy(outputs, labels) * torch.exp(-self.log_scale)
        with torch.no_grad():
            targets = self.teacher(x) + self.compiled(x)
        loss = loss + (outputs - targets).square().mean() + 3 * (model(0.5 * x) - outputs).square().mean()
        return loss + 0.05 * sum(p.square().sum() for p in model.parameters())


class _Inside(nn.Module):
    def __init__(self, net, loss):
        super().__init__()
        self.net, self.loss = net, [loss]

    def forward(self, x, labels):
        return {"loss": self.loss[0](self.net, self.net(x), x, labels)}


def test_a_loss_function_may_hold_parameters_and_call_or_read_the_model():
    loss, x, labels = _Loss(), *batch(12)
    own = lotion_fx.transform(MLP(), "int2", inner="aot_eager", calibrate=False)
    whole = _Inside(MLP(), loss)
    whole.net.load_state_dict(own.state_dict())
    lotion_fx.transform(whole, "int2", inner="aot_eager", calibrate=False)

    def loss_fn(outputs, given):
        return loss(own, outputs, *given)

    by_function = lotion_fx.round_(own, [(x, (x, labels))], loss_fn, method="descent")
    inside = lotion_fx.round_(whole, [{"x": x, "labels": labels}], method="descent")
    for name in ("latent", "nearest", "rounded"):
        assert getattr(by_function, name) == pytest.approx(getattr(inside, name), rel=1e-5)
    own.eval()
    assert by_function.rounded == pytest.approx(float(loss(own, own(x), x, labels).detach()), rel=1e-5)
    assert loss.log_scale.grad is None and isinstance(loss.teacher.up.weight, nn.Parameter)
