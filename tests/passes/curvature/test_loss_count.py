"""T, the loss terms of a backward pass, read off the joint graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lotion_fx.passes.attach.probe import Header, Layout
from tests.passes.curvature.running import TABLES, TOKENS, loss_of, randn, run


def terms_of(
    function: Callable[..., Any], shape: tuple[int, ...], *data: Any, objective: Callable[[Any], Tensor] = torch.sum
) -> list[float]:
    """T as the probe has it, under each table of decompositions; the objective is of the function's outputs."""
    layout, weight = Layout("factored", shape, 1, shape[0]), randn(*shape) / 2
    made = [run(function, [weight], [layout], data, table, objective=objective) for table in TABLES]
    return [one.probes[0][-1].item() for one in made]


LABELS = torch.tensor([[1, -100, 3, 0, 2], [-100, -100, 4, 1, 1], [2, 2, 1, -100, 0]])


def test_terms_are_the_tokens_with_a_label() -> None:
    def token_loss(w: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w).flatten(0, 1), labels.flatten())

    assert terms_of(token_loss, (5, 7), randn(3, 5, 7), LABELS) == [11, 11]


@pytest.mark.parametrize("scale", [1.0, 512.0])
def test_norms_and_energies_are_of_the_gradients_where_terms_are_counted(scale: float) -> None:
    """One for each token with a label; of what lies before the head as of the head itself."""

    def loss(w: Tensor, v: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        return scale * F.cross_entropy(F.linear(F.linear(x, v).tanh(), w).flatten(0, 1), labels.flatten())

    weights, layouts, x = (
        [randn(5, 6), randn(6, 7)],
        [Layout("factored", (5, 6), 1, 5), Layout("none", (6, 7), 1, 6)],
        randn(3, 5, 7),
    )
    logits = (x @ weights[1].T).double().tanh() @ weights[0].double().T
    logits.requires_grad_()
    (g,) = torch.autograd.grad(scale * F.cross_entropy(logits.flatten(0, 1), LABELS.flatten()), logits)
    for table in TABLES:
        made = run(loss, weights, layouts, (x, LABELS), table)
        for probe in made.probes:
            header = Header.of(probe)
            assert header.norms.item() == pytest.approx(g.norm(dim=-1).sum().item(), rel=1e-5)
            assert header.energies.item() == pytest.approx(g.square().sum().item(), rel=1e-5)
            assert header.loss_count == 11


def test_terms_do_not_change_behind_a_hidden_layer_or_an_unsmoothed_head() -> None:
    def token_loss(w: Tensor, x: Tensor, labels: Tensor, head: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(F.linear(x, w).tanh(), head).flatten(0, 1), labels.flatten())

    frozen, trained = randn(5, 6), randn(5, 6).requires_grad_()
    for head in (frozen, trained):
        assert terms_of(token_loss, (6, 7), randn(3, 5, 7), LABELS, head) == [11, 11]


NONLINEAR = {
    "bilinear": lambda w, x: F.bilinear(x, x, w.view(6, 7, 1).expand(6, 7, 7)),
    "distances": lambda w, x: torch.cdist(x, w),
    "sines": lambda w, x: F.linear(x, w) + w.sin().sum(1),
}


@pytest.mark.parametrize("head", ["smoothed", "trained", "frozen"])
@pytest.mark.parametrize("how", NONLINEAR)
def test_terms_behind_a_layer_that_is_nonlinear_in_its_weight(how: str, head: str) -> None:
    """What such a layer puts out is a function of its weight, and not the weight of the head behind it."""

    def loss(w: Tensor, head: Tensor, x: Tensor) -> Tensor:
        return loss_of(F.linear(NONLINEAR[how](w, x).tanh(), head))

    weights, layouts = [randn(6, 7)], [Layout("factored", (6, 7), 1, 6)]
    given = randn(5, 6).requires_grad_(head == "trained")
    for table in TABLES:
        if head == "smoothed":
            made = run(loss, [*weights, given], [*layouts, Layout("factored", (5, 6), 1, 5)], (randn(13, 7),), table)
        else:
            made = run(loss, weights, layouts, (given, randn(13, 7)), table)
        assert {probe[-1].item() for probe in made.probes} == {13}


def test_terms_with_a_tied_head_that_is_not_smoothed() -> None:
    def token_loss(w: Tensor, table: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = F.linear(F.embedding(tokens, table), w).tanh()
        return F.cross_entropy(F.linear(hidden, table).flatten(0, 1), labels.flatten())

    table = randn(9, 7).requires_grad_()
    assert terms_of(token_loss, (7, 7), table, TOKENS, LABELS) == [11, 11]


def test_terms_with_one_unsmoothed_layer_of_given_input() -> None:
    """Head and input are both placeholders; that the input comes first says which is which."""

    def token_loss(w: Tensor, head: Tensor, x: Tensor) -> Tensor:
        return loss_of(F.linear(x, head)) + loss_of(x * w)

    assert terms_of(token_loss, (7,), randn(3, 7).requires_grad_(), randn(13, 7)) == [13, 13]


def test_terms_where_the_input_is_also_the_second_operand() -> None:
    """Scores of 17 queries against 13 keys; the keys are also the input of another product, of another size."""

    def retrieval(w: Tensor, queries: Tensor, keys: Tensor, head: Tensor) -> Tensor:
        auxiliary = loss_of(keys @ head)
        return auxiliary + loss_of((queries @ w).tanh() @ keys.T)

    assert terms_of(retrieval, (7, 7), randn(17, 7), randn(13, 7), randn(7, 3).requires_grad_()) == [17, 17]


def test_terms_of_a_mean_pooled_classifier_are_the_samples() -> None:
    def classifier(w: Tensor, x: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(F.linear(x, w).relu().mean(1), head), labels)

    head, labels = randn(4, 5).requires_grad_(), torch.tensor([1, 0, 2])
    assert terms_of(classifier, (5, 7), randn(3, 11, 7), head, labels) == [3, 3]


def test_terms_of_a_segmentation_are_the_pixels() -> None:
    labels = torch.arange(2 * 5 * 7).reshape(2, 5, 7) % 3
    labels[0, 0, :4] = 255

    def segmentation(w: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.conv2d(x, w, padding=1), labels, ignore_index=255)

    assert terms_of(segmentation, (3, 4, 3, 3), randn(2, 4, 5, 7), labels) == [66, 66]


def test_terms_of_a_regression() -> None:
    assert terms_of(lambda w, x, y: F.mse_loss(F.linear(x, w), y), (5, 7), randn(13, 7), randn(13, 5)) == [13, 13]
    assert terms_of(lambda w, x, y: F.mse_loss(x @ w, y), (7,), randn(13, 7), randn(13)) == [13, 13]


@pytest.mark.parametrize("kind", ["none", "factored"])
def test_terms_where_the_weight_comes_first(kind: str) -> None:
    """[O, I] @ [I, N]: positions are the output's columns."""
    for function in (lambda w: w, lambda w: w * w):
        for table in TABLES:
            layouts = [Layout(kind, (5, 7), 1, 5), Layout(kind, (7, 4), 1, 7)]
            made = run(
                lambda w, v, x, function=function: loss_of(function(w) @ (v @ x).tanh()),
                [randn(5, 7), randn(7, 4)],
                layouts,
                (randn(4, 13),),
                table,
            )
            assert [probe[-1] for probe in made.probes] == [13, 13]


def test_terms_where_nothing_is_contracted() -> None:
    assert terms_of(lambda w, i: loss_of(F.embedding(i, w)), (9, 7), TOKENS) == [15, 15]
    assert terms_of(lambda w, x: loss_of(x * w), (7,), randn(3, 5, 7)) == [15, 15]


def test_terms_with_the_loss_outside_the_graph() -> None:
    layout, data = Layout("factored", (5, 7), 1, 5), (randn(3, 5, 7),)
    seen = run(lambda w, x: F.linear(x, w), [randn(5, 7)], [layout], data)
    assert seen.probes[0][-1] == 15


def test_terms_are_known_to_a_weight_used_after_the_last_contraction() -> None:
    layouts = [Layout("factored", (5, 7), 1, 5), Layout("factored", (5,), 1, 5)]
    made = run(lambda w, s, x: loss_of(F.linear(x, w) * s), [randn(5, 7), randn(5)], layouts, (randn(13, 7),))
    assert [probe[-1].item() for probe in made.probes] == [13, 13]


PICKS: dict[str, tuple[Callable[[Any], Tensor], Callable[[int, int], int]]] = {
    "first": (lambda out: loss_of(out[0]), lambda first, second: first),
    "second": (lambda out: loss_of(out[1]), lambda first, second: second),
    "both": (lambda out: loss_of(out[0]) + loss_of(out[1]), max),
}


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("rows", [(15, 6), (6, 15)])
def test_terms_are_those_of_the_head_in_the_loss(pick: str, rows: tuple[int, int]) -> None:
    """Whichever head comes later in the forward pass, and so earlier in the backward."""
    objective, told = PICKS[pick]
    expected = [told(*rows)] * 2
    a, b = (randn(7, length).requires_grad_() for length in (5, 3))
    first, second = (randn(length, 4) for length in rows)

    def one_trunk(w: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Any:
        hidden = F.linear(x, w).tanh()
        return hidden[: rows[0]] @ a, hidden[-rows[1] :] @ b

    def two_trunks(w: Tensor, first: Tensor, second: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Any:
        return F.linear(first, w).tanh() @ a, F.linear(second, v).tanh() @ b

    def smoothed_first(w: Tensor, first: Tensor, second: Tensor, b: Tensor) -> Any:
        return F.linear(first, w), second @ b

    def smoothed_second(w: Tensor, first: Tensor, second: Tensor, a: Tensor) -> Any:
        return first @ a, F.linear(second, w)

    given = {"objective": objective}
    assert terms_of(one_trunk, (7, 4), randn(21, 4), a, b, **given) == expected
    assert terms_of(one_trunk, (7, 4), randn(21, 4), a.detach(), b.detach(), **given) == expected
    assert terms_of(two_trunks, (7, 4), first, second, randn(7, 4).requires_grad_(), a, b, **given) == expected
    assert terms_of(smoothed_first, (7, 4), first, second, randn(4, 3).requires_grad_(), **given) == expected
    assert terms_of(smoothed_second, (7, 4), first, second, randn(4, 3).requires_grad_(), **given) == expected


@pytest.mark.parametrize(("pick", "terms"), [("first", 15), ("second", 3), ("both", 15)])
def test_terms_of_heads_one_behind_another(pick: str, terms: int) -> None:
    """The second output is made of the first, so its head's gradient is the first tangent plus its own."""

    def chained(w: Tensor, x: Tensor, head: Tensor, frozen: Tensor) -> Any:
        tokens = F.linear(F.linear(x, w).tanh(), head)
        return tokens, tokens[:, 0] @ frozen

    head = randn(4, 7).requires_grad_()
    found = terms_of(chained, (7, 7), randn(3, 5, 7), head, randn(4, 2), objective=PICKS[pick][0])
    assert found == [terms, terms]


def test_terms_of_states_beside_a_head_are_the_labels() -> None:
    """A hidden state that is an output too has a gradient at all tokens, which attention spread there."""

    def language_model(w: Tensor, x: Tensor, head: Tensor) -> Any:
        hidden = F.linear(x, w)
        hidden = hidden + (hidden @ hidden.mT).softmax(-1) @ hidden
        return hidden, hidden @ head

    def token_loss(out: Any) -> Tensor:
        return F.cross_entropy(out[1].flatten(0, 1), LABELS.flatten())

    head = randn(7, 5).requires_grad_()
    assert terms_of(language_model, (7, 7), randn(3, 5, 7), head, objective=token_loss) == [11, 11]
    assert terms_of(language_model, (7, 7), randn(3, 5, 7), head, objective=lambda out: loss_of(out[0])) == [15, 15]


def test_terms_of_a_tied_head_beside_another() -> None:
    def two_heads(w: Tensor, tokens: Tensor, pooler: Tensor) -> Any:
        hidden = F.embedding(tokens, w)
        return F.linear(hidden, w), hidden[:, 0] @ pooler

    def token_loss(out: Any) -> Tensor:
        return F.cross_entropy(out[0].flatten(0, 1), LABELS.flatten())

    pooler = randn(7, 2).requires_grad_()
    assert terms_of(two_heads, (9, 7), TOKENS, pooler, objective=token_loss) == [11, 11]
    assert terms_of(two_heads, (9, 7), TOKENS, pooler, objective=lambda out: loss_of(out[1])) == [3, 3]


def test_terms_of_an_embedding_beside_an_unused_head() -> None:
    def two_outputs(w: Tensor, tokens: Tensor, x: Tensor, head: Tensor) -> Any:
        return F.embedding(tokens, w), x @ head

    data = TOKENS, randn(6, 7), randn(7, 3).requires_grad_()
    assert terms_of(two_outputs, (9, 4), *data, objective=lambda out: loss_of(out[0])) == [15, 15]
    assert terms_of(two_outputs, (9, 4), *data, objective=lambda out: loss_of(out[1])) == [6, 6]
