"""The graph of a model's loss on one batch, as ATen ops before dispatch: what `expected_loss` interprets.

It is traced on the batch itself, with the parameters as inputs, so any Python control flow is followed as this batch
takes it, and where sizes depend on data, as by a mask or by routing to experts, the same elements are chosen at other
weights too. The model is in ``eval()`` mode meanwhile: no dropout, running statistics.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from lotion_fx import private
from lotion_fx.attributes import attribute_of
from lotion_fx.copied import Given, copied
from lotion_fx.fixed_sizes import fixed_sizes
from lotion_fx.followed import ADVICE, NEAR, check_followed, draws, moved, same_draws
from lotion_fx.kept_state import Kept, kept_state
from lotion_fx.likelihood import outputs_in
from lotion_fx.names import plain_name
from lotion_fx.own_backwards import tell_of_own_backwards
from lotion_fx.passes.attach.attach import LATENT
from lotion_fx.private import tree_flatten
from lotion_fx.private_tracing import FunctionsFollowed, checkpoints_inlined, parameters_replaced
from lotion_fx.scalars import check_loss, shown
from lotion_fx.switches import switched
from lotion_fx.vanishing import Step, steps_to_loss


@contextlib.contextmanager
def grad_mode_kept() -> Iterator[None]:
    """Whatever mode a graph with a region without gradients ends in."""
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        yield


LossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class LossGraph:
    """A traced loss.

    Args:
        gm: takes the parameters, then the batch's tensors; returns ``[loss]``, or ``[loss, output]`` with what of the
            model's outputs may parametrize a likelihood.
        parameters: the model's own, by name, in the order of the placeholders.
        data: the batch's tensors, flat.
        steps: the parameters that the loss depends on where it has no gradient.
    """

    gm: fx.GraphModule
    parameters: dict[str, Tensor]
    data: tuple[Tensor, ...]
    steps: Mapping[str, Step] = field(default_factory=dict)

    @cached_property
    def draws(self) -> bool:
        """Whether ops may draw random numbers, as those of a variational model do in ``eval()`` too."""
        return any(map(draws, self.gm.graph.nodes))

    @property
    def constants(self) -> list[Any]:
        """What the graph reads besides its inputs."""
        return [getattr(self.gm, str(node.target)) for node in self.gm.graph.find_nodes(op="get_attr")]

    def inputs(self, changed: Mapping[str, Any]) -> list[Any]:
        """The graph's inputs, some parameters replaced."""
        return [*(changed.get(name, value) for name, value in self.parameters.items()), *self.data]

    def loss(self, changed: Mapping[str, Any]) -> Tensor:
        """The loss with some parameters replaced, of the same random numbers each time."""
        with grad_mode_kept(), self.same_draws():
            return self.gm(*self.inputs(changed))[0]

    def same_draws(self, seed: int = 0) -> contextlib.AbstractContextManager[None]:
        """Inside, the graph draws the same random numbers each time, and none of the program's."""
        return same_draws([*self.parameters.values(), *self.data], seed) if self.draws else contextlib.nullcontext()


def loss_graph(
    model: nn.Module, batch: Any, loss_fn: Any, *, called_batch: str = "batch", is_checked: bool = True
) -> LossGraph:
    """Traces a model's loss on one batch.

    Args:
        model: any module; its parameters are left as they are.
        batch: ``(inputs, targets)`` for ``loss_fn(model(inputs), targets)``, where a tuple or dictionary of inputs is
            spread; or without ``loss_fn`` the model's own arguments, a dictionary as keywords.
        loss_fn: None, or ``"model"``, where the model returns its loss.
        called_batch: by its user.
        is_checked: whether to look if the graph computes what the model does, see `followed`.

    Raises:
        TypeError: without ``loss_fn``, the model does not take the batch.
        ValueError: the batch is not as above, there is no scalar loss, it is no finite number or does not depend on any
            parameter, it depends on some in a way that no trace follows, or `torch.inference_mode` is on.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "model: torch.inference_mode() is on, under which its loss has no gradient; call this outside of it, or "
            "under torch.no_grad()"
        )
    loss_fn = None if isinstance(loss_fn, str) and loss_fn == "model" else loss_fn
    if loss_fn is not None:
        check_loss(loss_fn, where_returned="None")
    if loss_fn is not None:
        pair(batch)
    seen: list[Tensor] = []
    functions: dict[type, Any] = {}

    def losses(functional: Callable[..., Any], given: Any) -> list[Tensor]:
        inputs, targets = (given, None) if loss_fn is None else given
        out = called(functional, inputs)
        seen[:] = [loss_of(out) if loss_fn is None else scalar(loss_fn(out, targets), "loss_fn")]
        return [*seen, *outputs_in(out)]

    try:
        gm, parameters, data = _traced(model, batch, losses, functions=functions)
    except TypeError as error:
        if loss_fn is not None or not (why := misfit(model.forward, batch)):
            raise
        raise TypeError(
            f"{called_batch}: {type(model).__name__}.forward does not take it ({why}); without loss_fn it is the "
            "model's own arguments and the model returns its loss; pass loss_fn if it is (inputs, targets)"
        ) from error
    loss = float(seen[0].detach())
    _check_finite(loss, parameters, called_batch)
    if is_checked:
        check_followed(gm, lambda moves: _traced(model, batch, losses, moves=moves)[0])
    if not _keep_one_output(gm, len(parameters)):
        raise ValueError(
            f"{'model' if loss_fn is None else 'loss_fn'}: the loss has no gradient of any parameter; is it of "
            "detached outputs, or made under torch.no_grad()?"
        )
    steps = steps_to_loss(gm, parameters)  # as they are before what they choose is fixed
    graph = LossGraph(fixed_sizes(gm, [*parameters.values(), *data]), parameters, data, steps)
    if is_checked:
        _check_equal(graph, loss)
        tell_of_own_backwards(functions)
    return graph


def loss_graphs(model: nn.Module, batches: Iterable[Any], loss_fn: Any) -> list[LossGraph]:
    """Traces a model's loss on several batches; graphs that are equal are one, so that memory is not of each batch."""
    known: dict[str, list[LossGraph]] = {}
    found = []
    for place, batch in enumerate(batches):
        graph = loss_graph(model, batch, loss_fn, called_batch=f"batches[{place}]", is_checked=not place)
        alike = known.setdefault(graph.gm.code, [])
        same = next((other for other in alike if _equal(graph.constants, other.constants)), None)
        if same is None:
            alike.append(graph)
        found.append(graph if same is None else replace(graph, gm=same.gm))
    return found


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(
        x is y or (isinstance(x, Tensor) and isinstance(y, Tensor) and _make(x) == _make(y) and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


def _make(x: Tensor) -> tuple[torch.dtype, torch.device]:
    return x.dtype, x.device


def forward_graph(model: nn.Module, args: Any, kwargs: Any) -> tuple[fx.GraphModule, dict[str, Tensor], list[Any]]:
    """Traces a forward in ``eval()`` mode, which returns all tensors that the model does.

    Returns:
        The graph, the model's parameters by name in the order of its first placeholders, and all its inputs.
    """

    def outputs(functional: Callable[..., Any], given: Any) -> list[Tensor]:
        return [leaf for leaf in tree_flatten(functional(*given[0], **given[1]))[0] if isinstance(leaf, Tensor)]

    gm, parameters, data = _traced(model, (args, kwargs), outputs)
    inputs = [*parameters.values(), *data]
    return fixed_sizes(gm, inputs), parameters, inputs


def _traced(
    model: nn.Module,
    given: Any,
    outputs: Callable[[Callable[..., Any], Any], list[Tensor]],
    *,
    moves: bool = False,
    functions: dict[type, Any] | None = None,
) -> tuple[fx.GraphModule, dict[str, Tensor], tuple[Tensor, ...]]:
    """The graph of what is made of a model and what it is given, its parameters, and the given tensors.

    Args:
        moves: at parameters near the model's own.
        functions: told of those with a backward of their own, see `FunctionsFollowed`.
    """
    parameters: dict[str, Tensor] = {plain_name(name): p for name, p in model.named_parameters()}
    taken = Given(given)
    if any(x.is_nested for x in taken.tensors):
        raise ValueError(
            "batch: it holds a nested tensor, of which no trace of a loss can be made here; give the same rows padded, "
            "with a mask, or one sequence at a time"
        )
    tensors = [_ordinary(x) for x in taken.tensors]

    def run(params: dict[str, Tensor], data: list[Tensor]) -> list[Tensor]:
        # A loss may call the model too, or read its weights.
        others = {parameter: params[name] for name, parameter in parameters.items()}
        with parameters_replaced(model, others), FunctionsFollowed(functions):
            return outputs(model, taken.filled(data))

    drawn = same_draws([*parameters.values(), *tensors])
    with _functions_refused(), as_evaluated(model) as kept, checkpoints_inlined(), drawn:
        own = copied(tensors)
        inputs = [*(kept.get(p) or Kept(p, by_value=False) for p in parameters.values()), *map(Kept, own)]
        at = {name: moved(p) if moves else p.detach() for name, p in parameters.items()}
        gm = private.trace(run, (at, own))
        _copy_what_is_written(gm, inputs, kept)
    with _functions_refused():
        for node in gm.graph.find_nodes(op="get_attr"):  # the model's buffers may change later
            value = getattr(gm, node.target)
            if isinstance(value, Tensor):
                delattr(gm, node.target)  # a parameter, as a teacher's in the loss, would take no other tensor
                setattr(gm, node.target, value.detach().clone())
    return gm, parameters, tuple(tensors)


@contextlib.contextmanager
def _functions_refused() -> Iterator[None]:
    """Inside, what `torch.func` says of a trace that it does not allow is one sentence."""
    try:
        yield
    except RuntimeError as error:
        if "functorch" not in str(error):
            raise
        raise ValueError(f"model: no trace of its loss can be made, for torch.func is in it: {ADVICE}") from error


def _check_finite(loss: float, parameters: Mapping[str, Tensor], called_batch: str) -> None:
    """Raises where a loss is no finite number, and names the parameter that is to blame if one is."""
    if math.isfinite(loss):
        return
    for name, parameter in parameters.items():
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"model: {name!r} has values that are no finite numbers; load a checkpoint of before")
    raise ValueError(
        f"{called_batch}: its loss is {loss} at the weights as they are; leave out batches without rows, or all of "
        "whose labels are ignored, and look for what is no finite number in the others"
    )


def _check_equal(graph: LossGraph, loss: float) -> None:
    """Raises where a graph's loss at the model's weights is not the model's; warns of one that draws at random."""
    with torch.no_grad():
        found = float(graph.loss({}))
    if not abs(found - loss) <= NEAR * abs(loss) + 1e-30:
        raise ValueError(f"model: its loss is {loss:.6g}, and that of its trace {found:.6g}: {ADVICE}")
    with torch.no_grad(), graph.same_draws(1):
        other = float(graph.gm(*graph.inputs({}))[0]) if graph.draws else found
    if other != found:
        warnings.warn(
            "model: its forward draws random numbers in eval() too; losses are compared at one draw of them",
            stacklevel=3,
        )


def _keep_one_output(gm: fx.GraphModule, parameters: int) -> bool:
    """Of the outputs beside the loss leaves the first that has a gradient: others may hide how weights are used.

    Returns:
        Whether the loss has one.
    """
    reached = set(gm.graph.find_nodes(op="placeholder")[:parameters])
    for node in gm.graph.nodes:
        if node.target is not torch.ops.aten.detach.default and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            written = node if is_mutable(node) else None
            while written is not None:  # up to what it is a view of, as the outputs of steps that fill one tensor
                reached.add(written)
                written = next(iter(written.all_input_nodes), None)
    end: Any = gm.graph.output_node()
    loss, *outputs = end.args[0]
    end.args = ([loss, *[x for x in outputs if x in reached and x.op != "placeholder"][:1]],)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return loss in reached


def _copy_what_is_written(gm: fx.GraphModule, inputs: Sequence[Kept], known: Mapping[Tensor, Kept]) -> None:
    """Has a graph copy what it writes into, so that it computes the same each time and changes nothing outside.

    Args:
        gm: just traced.
        inputs: its inputs as they were before.
        known: its constants as they were, those left out that are of the trace itself.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    written = [node for node, kept in zip(placeholders, inputs, strict=True) if kept.is_changed]
    for node in gm.graph.find_nodes(op="get_attr"):
        value = getattr(gm, str(node.target))
        if isinstance(value, Tensor) and (known[value].is_changed if value in known else private.version_of(value)):
            written.append(node)
    copies: dict[Any, fx.Node] = {}
    for node in written:
        if node.target not in copies:
            with gm.graph.inserting_after(placeholders[-1] if node.op == "placeholder" else node):
                copies[node.target] = gm.graph.call_function(torch.ops.aten.clone.default, (node,))
        copy = copies[node.target]
        node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor that autograd may keep, which one made under `torch.inference_mode` is not."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def listed(batches: Any) -> list[Any]:
    """Batches as a list.

    Raises:
        TypeError, ValueError: it is one batch, or there is none.
    """
    if isinstance(batches, (str, bytes, Mapping, Tensor)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches={shown(batches)}: expected an iterable of batches; of a single one, [batch]")
    found = list(batches)
    if not found:
        raise ValueError("batches: expected at least one batch to measure on, got none")
    return found


def pair(batch: Any) -> tuple[Any, Any]:
    """A batch as inputs and targets."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        single = " (of a single batch, pass [batch])" if isinstance(batch, Tensor) else ""
        raise ValueError(
            f"batch: expected (inputs, targets) with loss_fn, got {type(batch).__name__}{single}; without loss_fn the "
            "batch is the model's own arguments and the model returns its loss"
        )
    return batch[0], batch[1]


def is_mutable(node: fx.Node) -> bool:
    """Whether a node of a graph writes into one of its inputs."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def misfit(function: Callable[..., Any], inputs: Any) -> str:
    """Why a function cannot be called with inputs as `called` does, by its signature; empty where nothing tells."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return ""
    try:
        called(signature.bind, inputs)
    except TypeError as error:
        return str(error)
    return ""


def called(function: Callable[..., Any], inputs: Any) -> Any:
    """Calls with inputs as a batch holds them: a dictionary as keywords, a tuple spread."""
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(*inputs) if isinstance(inputs, (tuple, list)) else function(inputs)


def loss_of(out: Any) -> Tensor:
    """The loss in what a model returned: a scalar, ``.loss``, ``["loss"]`` or the first scalar of a tuple."""
    if isinstance(out, Tensor):
        return scalar(out, "model")
    named = out.get("loss") if isinstance(out, Mapping) else attribute_of(out, "loss")
    if isinstance(named, Tensor):
        return scalar(named, "model")
    for item in out if isinstance(out, (tuple, list)) else ():
        if isinstance(item, Tensor) and item.dim() == 0 and item.is_floating_point():
            return item
    raise ValueError(
        f"model: it returned {type(out).__name__}, in which there is no scalar loss; pass loss_fn and a batch of "
        "(inputs, targets), or give the model the labels that make it return one"
    )


def scalar(loss: Any, what: str) -> Tensor:
    """The loss, 0-d; ``what`` made it."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        if isinstance(loss, Tensor) and loss.numel() == 1:
            raise ValueError(f"{what}: expected a loss of real numbers, which has a gradient, got {loss.dtype}")
        shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{what}: expected a scalar loss, got {shape}; reduce it, by its mean for example")
    return loss.reshape(())


@contextlib.contextmanager
def as_evaluated(model: nn.Module) -> Iterator[dict[Tensor, Kept]]:
    """Inside, the model runs in Python at its latent weights, in ``eval()`` mode; gives its state before that."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # Gradients are on, as a region without them ends in what it began in; the parameters given are detached.
        with (
            switched(model, override=LATENT),
            private.uncompiled(model),
            kept_state(model) as kept,
            torch.enable_grad(),
        ):
            yield kept
    finally:
        for module, mode in training.items():
            module.training = mode
