"""Losses in which sizes depend on data: masks, routing to experts, packed sequences."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lotion_fx
from lotion_fx import private
from lotion_fx.fixed_sizes import fixed_sizes
from lotion_fx.loss_graph import loss_graph
from tests.models import MLP


def batch():
    torch.manual_seed(1)
    labels = torch.arange(24) % 7
    labels[::3] = -100
    return torch.randn(24, 20), labels


def masked(out, labels):
    return F.cross_entropy(out[labels != -100], labels[labels != -100])


def indexed(out, labels):
    """The same without a mask."""
    kept = torch.tensor([i for i in range(24) if i % 3])
    return F.cross_entropy(out[kept], labels[kept])


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(20, 4)
        self.experts = nn.ModuleList(nn.Linear(20, 7) for _ in range(4))

    def forward(self, x):
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        out = x.new_zeros(len(x), 7)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(-1)
            if rows.numel():
                out = out.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return out


class Placed(MLP):
    """Rows written by a mask, and a mean of some that passes no gradient on."""

    def forward(self, x):
        h, mask = F.gelu(self.up(x)), x[:, 0] > 0
        with torch.no_grad():
            mean = h.masked_select(mask[:, None]).view(-1, 33).mean(0)
        out = torch.zeros_like(h)
        out[mask], out[~mask] = 2 * h[mask], h[~mask]
        return self.down(out + mean)


class Packed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(5, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 7)

    def forward(self, x):
        packed = pack_padded_sequence(x.view(-1, 4, 5), torch.arange(24) % 4 + 1, True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], True)[0].sum(1))


class Adaptive(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(20, 16)
        self.head = nn.AdaptiveLogSoftmaxWithLoss(16, 30, [3, 9])

    def forward(self, x):
        return self.head(F.gelu(self.up(x)), torch.arange(24) + 3).output


class Grouped(nn.Module):
    """Experts by one product of groups, in a type of which torch has it with data alone."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(4, 20, 8) / 4)

    def forward(self, x):
        ends = torch.tensor([5, 5, 17, 24], dtype=torch.int32)
        return F.grouped_mm(x, self.stack, offs=ends)


MODELS = {
    "experts": Experts,
    "placed": Placed,
    "gru": lambda: Packed(nn.GRU),
    "lstm": lambda: Packed(nn.LSTM),
    "adaptive": Adaptive,
    "grouped": Grouped,
}


def mean_loss(out, labels):
    return masked(out, labels) if out.dim() == 2 else out.square().mean()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_graph_is_the_model_s_and_runs_without_data(make):
    """Its loss and gradients are those of the model in Python."""
    torch.manual_seed(0)
    model, (x, labels) = make(), batch()
    graph = loss_graph(model, (x, labels), mean_loss)
    with private.faked(graph.inputs({})) as fakes:
        assert graph.gm(*fakes)[0].shape == ()
    assert fixed_sizes(graph.gm, graph.inputs({})) is graph.gm
    expected = mean_loss(model(x), labels)
    torch.testing.assert_close(graph.loss({}), expected)
    parameters = dict(model.named_parameters())
    found, wanted = (
        torch.autograd.grad(loss, parameters.values(), allow_unused=True) for loss in (graph.loss({}), expected)
    )
    for name, a, b in zip(parameters, found, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.filterwarnings("ignore:round_. the batches' loss")  # of weights that nothing has trained
def test_its_weights_have_curvature(make):
    torch.manual_seed(0)
    model = lotion_fx.transform(make(), "int4", inner="aot_eager")
    rounded = lotion_fx.round_(model, [batch()], mean_loss, method="descent")
    unknown = [weight.name for weight in rounded.weights if math.isnan(weight.share)]
    assert all(".weight_hh" in name for name in unknown), rounded  # which first meets zeros, not data
    assert len(unknown) < len(rounded.weights)


def told(call, loss_fn):
    """What a function says of one model, and its weights then."""
    torch.manual_seed(0)
    model, given = lotion_fx.transform(MLP(), "int4", inner="aot_eager"), batch()
    said = call(model, given, loss_fn)
    return str(said), [parameter.tolist() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "call",
    [
        lambda m, b, f: lotion_fx.expected_loss(m, b, f, samples=2, generator=torch.Generator().manual_seed(0)),
        lambda m, b, f: lotion_fx.round_(m, [b], f, method="descent", rounds=1),
        lambda m, b, f: lotion_fx.suggest(m, b, f),
        lambda m, b, f: lotion_fx.diagnose(m, b, f),
        lambda m, b, f: lotion_fx.calibrate(m, [b], f, samples=2, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["expected_loss", "round_", "suggest", "diagnose", "calibrate"],
)
def test_a_mask_says_what_indices_do(call):
    assert told(call, masked) == told(call, indexed)


def test_the_same_rows_are_chosen_at_other_weights():
    """A token stays with its expert where rounding would send it to another, which this batch may not have traced."""
    torch.manual_seed(0)
    model, (x, labels) = Experts(), batch()
    graph = loss_graph(model, (x, labels), masked)
    chosen = model.gate(x).argmax(-1)
    weight = torch.randn_like(model.gate.weight)
    shares = F.linear(x, weight, model.gate.bias).softmax(-1).amax(-1)
    out = torch.stack([model.experts[i](row) * share for i, row, share in zip(chosen, x, shares, strict=True)])
    torch.testing.assert_close(graph.loss({"gate.weight": weight}), masked(out, labels))


def test_an_op_that_has_no_meaning_without_data_is_named():
    @torch.library.custom_op("lotion_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    with pytest.raises(ValueError, match="^batch: lotion_test.twice.default runs on it and not on .*; expected"):
        loss_graph(MLP(), batch(), lambda out, labels: twice(out).mean())
