"""`round_`'s order: weights are rounded as they run, each to make up for those before.

A weight W whose inputs come out of rounded weights meets x instead of the x* of before. The shift D that brings its
outputs back, of least ``sum |(W + D) x - W x*|^2``, is known before W is rounded: with the gradient G of half that sum
and ``A = sum x x^T`` it is ``-G A^-1``. Half of it is taken: all of it would learn what is particular to the batches.

Source: Arai, Ichikawa 2025, "Quantization Error Propagation" (arXiv 2504.09629), with its alpha of 1/2; the sum is
GPTAQ's as well (Li et al. 2025, arXiv 2504.02692). Here both G and A are the product's own, whatever op it is: G is its
derivative, and A what `passes.curvature.kronecker` makes of output gradients of one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from lotion_fx.compiling import joint_vectors
from lotion_fx.followed import draws, same_draws
from lotion_fx.loss_graph import LossGraph, is_mutable
from lotion_fx.numerics.adaptive import Curvature, newton, of_inputs
from lotion_fx.passes.attach.attach import LATENT, Plan
from lotion_fx.passes.attach.probe import Code, Header, Layout
from lotion_fx.passes.ops import ALIASES, PERMUTES, RESHAPES
from lotion_fx.state import Weight

aten = torch.ops.aten
_VIEWS = {op.overloadpacket for op in ALIASES | RESHAPES | PERMUTES if hasattr(op, "overloadpacket")}
_WHOLE = {aten.flatten, aten.unflatten, aten.view_as, aten.reshape_as, aten.to}  # before dispatch alone
FOLLOWED = (_VIEWS | _WHOLE | {aten.add, aten.add_, aten.sub}) - {aten.detach}
"""What keeps a product's squares, or adds to it."""
FAR = 32
"""Ops that are run before their turn for the sake of a sum, at most: another tower would have to be run to its end."""
TAKEN = 0.5
"""Of the shift that the batches ask for."""


class Product(NamedTuple):
    """The op that multiplies a weight with data, by itself.

    Args:
        gm: takes the weight and what else the op takes; returns ``[outputs]``.
        op: in the loss's graph.
        taken: what it takes besides the weight, there.
        regions: of autocast, that it is in.
    """

    gm: fx.GraphModule
    op: fx.Node
    taken: tuple[fx.Node, ...]
    regions: tuple[tuple[Any, ...], ...]


class MakingUp:
    """The graphs of a loss, run weight by weight: once at the latent weights, once at those that are rounded by then.

    Args:
        graphs: of the loss, a batch each.
        names: of the weights.
        done: those that are rounded already.
    """

    def __init__(self, graphs: Sequence[LossGraph], names: Sequence[str], done: Mapping[str, Tensor]) -> None:
        known: dict[fx.GraphModule, dict[str, Product | None]] = {}
        for graph in graphs:
            if graph.gm not in known:
                known[graph.gm] = _products(graph, names)
        self._products = [known[graph.gm] for graph in graphs]
        self._before, self._now = ([_Run(graph, i) for i, graph in enumerate(graphs)] for _ in range(2))
        self._known: dict[Layout, dict[Any, Any]] = {}  # calls of the joint graphs
        self.order = list(dict.fromkeys(name for products in self._products for name in products))
        for name, values in done.items():
            self.put(name, values)

    def put(self, name: str, values: Tensor) -> None:
        """A weight is rounded."""
        for run in self._now:
            run.put(name, values)

    @torch.no_grad()
    def shifted(self, name: str, weight: Weight, latent: Tensor) -> tuple[Tensor, Curvature]:
        """A weight that makes up for those put before, as far as it can; to be asked in `order`.

        Returns:
            What it is to be rounded from, and the curvature of its inputs as they are now. ``latent`` itself and
            nothing where these are what they were, where several ops take it, or where they have no matrix.
        """
        nothing = latent, Curvature(None, None)
        if any(products.get(name, latent) is None for products in self._products):
            return nothing
        met = self._met(name)
        changed = [each for each in met if not all(map(_same, each.before, each.now))]
        gradient = sum((_gradient(latent, each) for each in changed), torch.zeros(()))
        if not changed or not bool(gradient.any()) or (inputs := self._inputs(weight, latent, met)) is None:
            return nothing
        step = newton(gradient, weight.layout.factors, inputs) * (latent != 0)  # what is pruned stays so
        energy = sum(_energy(latent, step.to(latent.dtype), each) for each in met)
        length = -float((gradient * step).sum()) / energy if energy > 0 else 0.0  # to the least sum, so about 1
        goal = (latent + TAKEN * length * step).to(latent.dtype)
        return (goal, inputs) if goal.isfinite().all() else nothing  # else products overflow, as in float16

    def _met(self, name: str) -> list[_Met]:
        """What a weight's product takes, of each batch that has it."""
        found = []
        for products, before, now in zip(self._products, self._before, self._now, strict=True):
            product = products.get(name)
            if product is not None and now.is_before(product):
                found.append(_Met(product, before.reach(product), now.reach(product)))
        return found

    def _inputs(self, weight: Weight, latent: Tensor, met: Sequence[_Met]) -> Curvature | None:
        """With the sum of the inputs' outer products on their side; None where they are not told from outputs."""
        layout = replace(weight.layout, kind="kronecker")
        plans, known = {0: Plan(LATENT, weight.quantizer, layout)}, self._known.setdefault(layout, {})
        total = torch.zeros(layout.size, device=latent.device)
        for product, _, now in met:
            with _autocast(product.regions):
                given, losses = [latent, *now], [lambda outputs: outputs[0].sum()]
                vectors = joint_vectors(product.gm, given, plans, losses, known.setdefault(product.regions, {}))
            total = sum((vector for vector, _ in vectors.values()), total)
        found = of_inputs(Curvature(*layout.matrices(total)), latent, weight.axis, layout.factors)
        is_known = Header.of(total).common_code is Code.ANALYTIC and found != (None, None)
        return found if is_known else None


class _Met(NamedTuple):
    """A weight's product on a batch, and what it took before and takes now."""

    product: Product
    before: list[Any]
    now: list[Any]

    def outputs(self, weight: Tensor, taken: Sequence[Any]) -> Tensor:
        with _autocast(self.product.regions):
            found: Tensor = self.product.gm(weight, *taken)[0]
        return found


class _Run:
    """A loss's graph on its batch, run so far, at parameters that may change. Two of one batch draw the same noise."""

    def __init__(self, graph: LossGraph, batch: int) -> None:
        nodes = graph.gm.graph.find_nodes(op="placeholder")
        self._interpreter = fx.Interpreter(graph.gm)
        self._parameters = dict(zip(graph.parameters, nodes, strict=False))
        self._values: dict[fx.Node, Any] = dict(zip(nodes, graph.inputs({}), strict=True))
        self._of_parameters = _of_parameters(graph.gm.graph, set(self._parameters.values()))
        self._regions = _regions(graph.gm.graph)
        self._uses = {node: len(node.users) for node in graph.gm.graph.nodes}
        self._to_run = [n for n in graph.gm.graph.nodes if n.op not in ("placeholder", "output")]
        self._at = 0
        self._seed = batch * len(self._to_run)

    def put(self, name: str, values: Tensor) -> None:
        if name in self._parameters:
            self._values[self._parameters[name]] = values

    def is_before(self, product: Product) -> bool:
        """Whether a product is not run yet: graphs of other batches may have another order."""
        return product.op in self._to_run[self._at :]

    def reach(self, product: Product) -> list[Any]:
        """What a product takes besides its weight: all that comes before is run."""
        while (node := self._to_run[self._at]) is not product.op:
            self._at += 1
            if node not in self._of_parameters and node in self._regions:  # those are made when they are asked for
                self._values[node] = self._value(node, {})
                self._release(node)
        later: dict[fx.Node, Any] = {}  # is run again in its turn, at what is rounded by then
        return [self._value(node, later) for node in product.taken]

    def _value(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        if node in self._values:
            return self._values[node]
        if node not in known:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda x: self._value(x, known))
            # Each by itself, for some are switches of gradient mode.
            with torch.no_grad(), _autocast(self._regions[node]), self._drawing(node):
                known[node] = getattr(self._interpreter, node.op)(node.target, args, kwargs)
        return known[node]

    @contextlib.contextmanager
    def _drawing(self, node: fx.Node) -> Iterator[None]:
        if not draws(node):
            yield
            return
        with same_draws(self._values.values(), self._seed + self._to_run.index(node)):
            yield

    def _release(self, done: fx.Node) -> None:
        """Forgets what no op will ask for any more."""
        for node in (done, *done.all_input_nodes):
            self._uses[node] -= node is not done
            if not self._uses[node] and node.op != "placeholder":
                self._values.pop(node, None)


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def _autocast(regions: Sequence[tuple[Any, ...]]) -> contextlib.ExitStack:
    with contextlib.ExitStack() as stack:
        for region in regions:
            stack.enter_context(torch.autocast(*region))
        return stack.pop_all()


def _gradient(weight: Tensor, met: _Met) -> Tensor:
    """Of half the squares by which a product's outputs are off, by the weight, float64."""
    leaf = weight.detach().clone().requires_grad_()
    with torch.enable_grad():
        off = met.outputs(leaf, met.now) - met.outputs(weight, met.before)
        if not off.requires_grad:
            return torch.zeros_like(weight, dtype=torch.float64)
        known = off.detach().nan_to_num(0, 0, 0)  # a mask of -inf is off by nan
        largest = known.abs().max().clamp(min=torch.finfo(off.dtype).tiny)
        (found,) = torch.autograd.grad(off, leaf, known / largest)
    return found.double() * largest


def _energy(weight: Tensor, step: Tensor, met: _Met) -> float:
    """The squares that a step adds to a product's outputs."""
    leaf = weight.detach().clone().requires_grad_()
    with torch.enable_grad():
        outputs = met.outputs(leaf, met.now)
        pulled = torch.zeros_like(outputs, requires_grad=True)
        (back,) = torch.autograd.grad(outputs, leaf, pulled, create_graph=True)
        (added,) = torch.autograd.grad(back, pulled, step)  # the derivative along the step, twice transposed
    return float(added.double().square().sum())


def _products(graph: LossGraph, names: Sequence[str]) -> dict[str, Product | None]:
    """The product of each weight, in the order in which the graph runs them; None where several ops take it."""
    nodes = list(graph.gm.graph.nodes)
    parameters = dict(zip(graph.parameters, graph.gm.graph.find_nodes(op="placeholder"), strict=False))
    own = _of_parameters(graph.gm.graph, set(parameters.values()))
    if any(is_mutable(node) for node in own):  # whose writes nobody asks for
        return {}
    made = {name: {parameters[name]} for name in names if name in parameters}
    met: dict[str, list[fx.Node]] = {}
    for node in nodes:
        for name in [name for name in made if node.op != "output" and made[name].intersection(node.all_input_nodes)]:
            if node in own:
                made[name].add(node)
            else:
                met.setdefault(name, []).append(node)
    at = {node: i for i, node in enumerate(nodes)}
    regions = _regions(graph.gm.graph)
    found: dict[str, Product | None] = {}
    for name, ops in met.items():
        found[name], op = None, ops[0]
        if len(ops) == 1 and op in regions and _is_one_tensor(op):
            inside = {*made[name], *_followed(op, at)}
            if len({regions[node] for node in inside if node is not parameters[name]}) == 1:
                found[name] = _product(graph.gm, parameters[name], inside, op, regions[op])
    return found


def _is_one_tensor(op: fx.Node) -> bool:
    """Whether an op makes one tensor, and changes none."""
    schema = getattr(op.target, "_schema", None)
    return schema is not None and not is_mutable(op) and [str(x.type) for x in schema.returns] == ["Tensor"]


def _regions(graph: fx.Graph) -> dict[fx.Node, tuple[tuple[Any, ...], ...]]:
    """What `torch.autocast` is to be told for each node; without those that say where its regions begin and end."""
    regions, found = list[tuple[fx.Node, tuple[Any, ...]]](), dict[fx.Node, tuple[tuple[Any, ...], ...]]()
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name == "_enter_autocast":
            regions.append((node, tuple(node.args)))
        elif name == "_exit_autocast":
            regions = [(begin, args) for begin, args in regions if begin is not node.args[0]]
        else:
            found[node] = tuple(args for _, args in regions)
    return found


def _followed(op: fx.Node, at: Mapping[fx.Node, int]) -> Iterator[fx.Node]:
    """An op and what its outputs alone go through: other views, and sums with what is known without them."""
    yield op
    last = op
    while len(last.users) == 1:
        [node] = last.users
        is_idle = node.target is aten.dropout.default and not node.args[2]
        if not is_idle and getattr(node.target, "overloadpacket", None) not in FOLLOWED:
            return
        if not all(x is last or _can_be_known(x, op, at) for x in node.all_input_nodes):
            return
        yield (last := node)


def _can_be_known(node: fx.Node, op: fx.Node, at: Mapping[fx.Node, int]) -> bool:
    """Whether a node can be run before an op that comes earlier: nothing on the way changes what others read."""
    to_see, seen = [node], set[fx.Node]()
    while to_see:
        node = to_see.pop()
        if node in seen or at[node] < at[op]:
            continue
        seen.add(node)
        is_known = node.op != "call_function" or getattr(node.target, "_schema", None) is not None
        if not is_known or is_mutable(node) or len(seen) > FAR:
            return False
        to_see += node.all_input_nodes
    return True


def _of_parameters(graph: fx.Graph, parameters: set[fx.Node]) -> set[fx.Node]:
    """The nodes that are made of parameters, perhaps with constants, and of no data."""
    constant, own = set[fx.Node](), set(parameters)
    for node in graph.nodes:
        given = node.all_input_nodes
        if node.op not in ("placeholder", "output") and all(x in own or x in constant for x in given):
            (constant if own.isdisjoint(given) else own).add(node)
    return own - parameters


def _product(
    gm: fx.GraphModule, weight: fx.Node, inside: set[fx.Node], op: fx.Node, regions: tuple[tuple[Any, ...], ...]
) -> Product:
    """Of the nodes inside, which end in the outputs."""
    graph, known = fx.Graph(), dict[fx.Node, fx.Node]()
    known[weight] = last = graph.placeholder("weight")
    ordered = [node for node in gm.graph.nodes if node in inside and node is not weight]
    taken = list(dict.fromkeys(x for node in ordered for x in node.all_input_nodes if x not in inside))
    for i, node in enumerate(taken):
        known[node] = graph.placeholder(f"taken_{i}")
    for node in ordered:  # named anew, so that layers that are alike are equal
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        target = aten.add.Tensor if node.target is aten.add_.Tensor else node.target
        known[node] = last = graph.create_node(node.op, target, args, kwargs)
    graph.output([last])
    return Product(fx.GraphModule(gm, graph), op, tuple(taken), regions)
