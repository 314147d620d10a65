"""Whole networks against `torch.func`, and what the pass leaves as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.aot_autograd import aot_function, aot_module_simplified
from torch._functorch.compilers import nop
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from lotion_fx.passes.attach.probe import HEADER, Code, Layout
from lotion_fx.passes.curvature.resolve import resolve_curvature
from tests.passes.curvature.running import (
    TABLES,
    TOKENS,
    close,
    convolution,
    flat,
    gather_sum,
    gradient,
    latent,
    loss_of,
    product,
    randn,
    run,
    said,
)


def test_mlp_equals_the_squares_of_per_sample_gradients() -> None:
    x, shapes = randn(11, 7), [(5, 7), (3, 5)]
    weights = [randn(*shape) for shape in shapes]

    def samples(weights: Any, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x @ weights[0].T) @ weights[1].T).square().sum(-1)

    layouts = [Layout("full", shape, 1, shape[0]) for shape in shapes]
    made = run(lambda *args: samples(args[:2], args[2]).mean(), weights, layouts, (x,))
    doubles = [weight.double() for weight in weights]
    per_sample = torch.func.vmap(torch.func.grad(samples), in_dims=(None, 0))(doubles, x.double())
    for probe, layout, gradients in zip(made.probes, layouts, per_sample, strict=True):
        # The loss is a mean, so each sample's gradient is 1/T of its own: h = T * probe is the mean of the squares.
        close(probe[-1] * probe[: layout.payload], gradients.square().mean(0))
        assert probe[-1] == len(x)


def perturbed(network: Callable[..., Tensor], weights: list[Tensor], x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(g, input) of each layer: the gradients with respect to a perturbation of its output, by `torch.func.vjp`."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def record(n: int, i: Tensor, y: Tensor) -> Tensor:
        inputs.append(i)
        outputs.append(y)
        return y

    network(weights, x, record)
    zeros = [torch.zeros_like(y) for y in outputs]
    steps = torch.func.vjp(lambda steps: network(weights, x, lambda n, i, y: y + steps[n]), zeros)
    return list(zip(steps[1](torch.ones_like(steps[0]))[0], inputs, strict=True))


def cnn(weights: Any, x: Tensor, layer: Any) -> Tensor:
    x = F.relu(layer(0, x, F.conv2d(x, weights[0], stride=2, padding=1)))
    x = F.relu(layer(1, x, F.conv2d(x, weights[1], padding=1, groups=2)))
    x = F.avg_pool2d(x, 2).flatten(1)
    return F.cross_entropy(layer(2, x, x @ weights[2].T), torch.arange(len(x)) % 3)


def transformer(weights: Any, x: Tensor, layer: Any) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:])
    q, k, v = layer(0, normed, normed @ weights[0].T).chunk(3, -1)
    mixed = F.scaled_dot_product_attention(*(t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v)))
    mixed = mixed.transpose(1, 2).flatten(2)
    x = x + layer(1, mixed, mixed @ weights[1].T)
    normed = F.layer_norm(x, x.shape[-1:])
    hidden = F.gelu(layer(2, normed, normed @ weights[2].T))
    x = x + layer(3, hidden, hidden @ weights[3].T)
    logits = layer(4, x, x @ weights[4].T)
    return F.cross_entropy(logits.flatten(0, 1), torch.arange(logits[..., 0].numel()) % logits.shape[-1])


NETWORKS: dict[str, Any] = {
    "cnn": (cnn, [(4, 3, 3, 3), (6, 2, 3, 3), (3, 24)], (5, 3, 8, 8), [1, 2, 1], 5),
    "transformer": (transformer, [(18, 6), (6, 6), (11, 6), (6, 11), (13, 6)], (3, 5, 6), [1] * 5, 15),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", NETWORKS)
def test_network_equals_the_squares_of_per_position_gradients(name: str, table: str) -> None:
    network, shapes, size, groups, terms = NETWORKS[name]
    x, weights = randn(*size), [randn(*shape) / 2 for shape in shapes]
    layouts = [Layout("full", shape, g, shape[0] // g) for shape, g in zip(shapes, groups, strict=True)]
    made = run(lambda *args: network(args[:-1], args[-1], lambda n, i, y: y), weights, layouts, (x,), table)
    oracles = perturbed(network, [weight.double() for weight in weights], x.double())
    for probe, layout, (g, i), shape in zip(made.probes, layouts, oracles, shapes, strict=True):
        if len(shape) == 4:
            stride = 2 if layout.groups == 1 else 1
            h, _ = convolution(g, i, shape[2:], layout.groups, stride, 1, 1)
        else:
            # per position and weight, the gradient itself, then its square
            h = torch.einsum("no,ni->noi", flat(g), flat(i)).square().sum(0)
        close(probe[: layout.payload], h)
        assert said(probe) == [1, Code.ANALYTIC, terms]


def test_by_choice_has_terms_and_no_payload() -> None:
    made = run(lambda w, x: loss_of(x @ w), [randn(5, 7)], [Layout("none", (5, 7), 1, 5)], (randn(13, 5),))
    assert len(made.probes[0]) == HEADER and said(made.probes[0]) == [1, Code.BY_CHOICE, 13]
    assert made.resolutions[0].code == Code.BY_CHOICE
    made = run(lambda w, i: loss_of(F.embedding(i, w)), [randn(9, 7)], [Layout("none", (9, 7), 1, 9)], (TOKENS,))
    assert said(made.probes[0]) == [1, Code.BY_CHOICE, 15]


@pytest.mark.parametrize("partition", [min_cut_rematerialization_partition, default_partition])
def test_gradients_and_forward_values_are_untouched(partition: Callable[..., Any]) -> None:
    network, shapes, size, *_ = NETWORKS["transformer"]
    x, weights = randn(*size), [randn(*shape) / 2 for shape in shapes]

    def function(*args: Any) -> Tensor:
        return network(args[:-1], args[-1], lambda n, i, y: y)

    layouts = [Layout("factored", shape, 1, shape[0]) for shape in shapes]
    made = run(function, weights, layouts, (x,), partition=partition)
    leaves = [weight.clone().requires_grad_() for weight in weights]
    plain = aot_function(lambda *args: function(*args), nop, partition_fn=partition, decompositions={})(*leaves, x)
    plain.backward()
    assert torch.equal(made.loss, plain)
    assert all(torch.equal(grad, gradient(leaf)) for grad, leaf in zip(made.grads, leaves, strict=True))


def test_forward_saves_nothing_for_curvature() -> None:
    """Squares of activations belong to the backward graph, else both x and x^2 would be kept."""
    saved = []

    def partition(*args: Any, **kwargs: Any) -> Any:
        forward, backward = default_partition(*args, **kwargs)
        saved.append(len(forward.graph.find_nodes(op="output")[0].args[0]))
        return forward, backward

    for kind in ("none", "full", "factored"):
        run(
            lambda w, x: loss_of(F.linear(x.sin(), w)),
            [randn(5, 7)],
            [Layout(kind, (5, 7), 1, 5)],
            (randn(13, 7),),
            partition=partition,
        )
    assert len(set(saved)) == 1


def test_accumulates_over_micro_batches() -> None:
    layout, (x, w) = Layout("full", (5, 7), 1, 5), (randn(13, 7), randn(5, 7))
    probe = torch.zeros(layout.size, requires_grad=True)

    def partition(joint: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        resolve_curvature(joint.graph)
        joint.recompile()
        return default_partition(joint, inputs, **kwargs)

    def function(w: Tensor, probe: Tensor, x: Tensor) -> Tensor:
        return loss_of(F.linear(x, latent(w, probe, layout)))

    compiled = aot_function(function, nop, partition_fn=partition, decompositions={})
    for batch in (x, x.sin()):
        compiled(w.clone().requires_grad_(), probe, batch).backward()
    y = [(i.double() @ w.double().T).requires_grad_() for i in (x, x.sin())]
    g = torch.autograd.grad(torch.stack([loss_of(value) for value in y]).sum(), y)
    expected = torch.stack([product(a, b.double())[0] for a, b in zip(g, (x, x.sin()), strict=True)]).sum(0)
    close(gradient(probe)[: layout.payload], expected)
    assert said(gradient(probe)) == [2, 2 * Code.ANALYTIC, 2 * 13]


def test_dynamic_batch() -> None:
    """One graph with a symbolic batch gives the right norm and terms at every size."""
    layouts = [Layout("factored", (5, 7), 1, 5), Layout("factored", (4, 5, 3), 1, 4), Layout("full", (9, 7), 1, 9)]
    joints: list[torch.fx.Graph] = []

    def partition(joint: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        assert all(item.code == Code.ANALYTIC for item in resolve_curvature(joint.graph))
        joints.append(joint.graph)
        joint.recompile()
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        return aot_module_simplified(gm, inputs, nop, partition_fn=partition, decompositions=select_decomp_table())

    attach = torch._dynamo.allow_in_graph(latent)  # in use the node is put in after Dynamo

    @torch.compile(backend=backend, fullgraph=True)
    def function(weights: Any, probes: Any, tokens: Tensor) -> Tensor:
        linear, kernel, table = map(attach, weights, probes, layouts)
        x = F.linear(F.embedding(tokens, table), linear).tanh()
        return F.conv1d(x.mT, kernel, stride=2)

    weights = [randn(*layout.shape).requires_grad_() for layout in layouts]
    for batch in (3, 6, 4):
        probes = [torch.zeros(layout.size, requires_grad=True) for layout in layouts]
        tokens = torch.arange(batch * 11).reshape(batch, 11) % 9
        torch._dynamo.mark_dynamic(tokens, 0)
        loss_of(function(weights, probes, tokens)).backward()
        norms = [layout.split(gradient(probe))[2].item() for layout, probe in zip(layouts[:2], probes, strict=False)]
        assert norms == [batch * 11, batch * 5]
        assert all(said(gradient(probe)) == [1, Code.ANALYTIC, batch * 5] for probe in probes)
        e = weights[2].detach().double()[tokens].requires_grad_()
        y = F.linear(e, weights[0].detach().double())
        z = F.conv1d(y.tanh().mT, weights[1].detach().double(), stride=2)
        g = torch.autograd.grad(loss_of(z), (y, e))
        _, factors = product(flat(g[0]), flat(e))
        for part, expected in zip(layouts[0].split(gradient(probes[0])), factors, strict=True):
            close(part, expected)
        close(gradient(probes[2])[: layouts[2].payload], gather_sum(tokens, 9, flat(g[1]).square()))
    assert len(joints) == 1
