"""PyTorch's private interfaces: each name that the package takes from them, and why.

No other module imports such a name or reads such an attribute, `private_names` has a reason for each, and the canary
`tests/runtime/test_private.py` names the one which a release took away. This module knows torch alone.

Not here: processes and shards, in `private_ranks`; threads, in `private_threads`; the backward pass, in
`private_backward`; what is compiled ahead of time, in `private_packages`; a model that is traced, in `private_tracing`;
names of ATen's operators, which are a schema of their own; what Inductor asks of a CUDA device, which
`kernels/emit/absent_cuda.py` replaces; Triton's compiler, which that file and `kernels/audit/aot.py` drive.
"""

# ruff: noqa: F401 - names are imported here for others
from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from functorch.compile import aot_function, nop
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import config as dynamo_config
from torch._dynamo import trace_rules
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.convert_frame import _clear_fake_mode_weakrefs
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend, skip_code
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.symbolic_convert import InstructionTranslator, tls
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import aot_export_module
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options, list_options
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.triton_heuristics import GridExpr
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

EXACT_DIVISION = "eager_numerics.division_rounding"
"""Inductor's option to divide as eager does: a code depends on w / s, and Triton's own division is approximate."""

foreach_add_, foreach_sub_ = torch._foreach_add_, torch._foreach_sub_


def cacheable_functions() -> dict[str, str]:
    """The functions in graphs that Inductor's caches accept, each with the key of what it computes."""
    return dict(inductor_config.unsafe_marked_cacheable_functions)


# --- graphs ---


def trace(function: Callable[..., Any], args: Sequence[Any]) -> fx.GraphModule:
    """A function's graph of ATen ops before dispatch: ``linear``, ``layer_norm``, ``cross_entropy_loss`` are whole.

    What it calls that Dynamo has compiled, such as a block or a teacher, runs in Python, and is part of the graph.
    """
    with dynamo_config.patch(error_on_nested_fx_trace=False):
        # A value that Python branches on is taken as it is here; the op that read it is then dead.
        gm = make_fx(function, pre_dispatch=True, _error_on_data_dependent_ops=False)(*args)
    gm.graph.eliminate_dead_code()
    gm.graph.set_codegen(fx.graph.CodeGen())  # flat arguments, in the order of the placeholders
    gm.recompile()
    return gm


@contextlib.contextmanager
def faked(inputs: Sequence[Any]) -> Iterator[list[Any]]:
    """Inside, tensors hold no data; gives the inputs as such."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield [mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x for x in inputs]


def settle_device_guard() -> None:
    """Enters a mode without data once, in a thread that lives on.

    In a CUDA build without a device torch 2.11 sets a guard as the first one is entered; where that thread ends, the
    next thread that enters one crashes.
    """
    with FakeTensorMode():
        pass


@contextlib.contextmanager
def fake_mode_of(inputs: Sequence[Any]) -> Iterator[None]:
    """Inside, what is computed of the inputs holds no data where they hold none, and their sizes stay symbols."""
    modes = [x.fake_mode for x in inputs if isinstance(x, FakeTensor)]
    with modes[0] if modes else contextlib.nullcontext(), enable_python_dispatcher():
        yield


class InTurn(CustomGraphPass):
    """Several passes over Inductor's joint graph as one, all that torch 2.11 takes; caches need a `CustomGraphPass`."""

    def __init__(self, passes: Sequence[Callable[[fx.Graph], None]]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: fx.Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any:
        keys = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes]
        return None if None in keys else tuple(keys)


def arguments_of(op: Any) -> Sequence[Any]:
    """An operator's arguments: ``name``, ``default_value``, and ``alias_info``, by which one is written to."""
    return list(op._schema.arguments)


def results_of(op: Any) -> int:
    """How many results an operator has."""
    return len(op._schema.returns)


def taken_apart(op: OpOverload) -> Callable[..., Any] | None:
    """What Inductor runs in an operator's place, a function of ATen ops; None where it keeps the operator."""
    return select_decomp_table().get(op)


# --- what Dynamo knows of a graph's inputs ---


def source_of(placeholder: fx.Node) -> Any:
    """Dynamo's source of a graph's input, whose ``name`` is a Python expression; None where there is none."""
    return getattr(placeholder, "_dynamo_source", None)


def copy_source(old: fx.Node, new: fx.Node) -> None:
    """Gives an input the source of another, if that has one."""
    if hasattr(old, "_dynamo_source"):
        new._dynamo_source = old._dynamo_source


def complete_sources(gm: fx.GraphModule) -> None:
    """Says of every input without a source that it has none: where one input has, AOTAutograd asks all."""
    for node in gm.graph.find_nodes(op="placeholder"):
        node._dynamo_source = source_of(node)


def release_examples(gm: fx.GraphModule) -> None:
    """As `release_tensors`, for a copy of Dynamo's graph: from its own Dynamo drops them, once it has read them."""
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta.pop("grapharg", None)


def frame_names() -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The local and global names of the frame that Dynamo is compiling, None outside of that."""
    if getattr(tls, "current_tx", None) is None:
        return None
    output = InstructionTranslator.current_tx().output
    return output.local_scope, output.global_scope


def live_tensor(placeholder: fx.Node, example: Any) -> Any:
    """The tensor behind a placeholder. DDP's graph splitter hands over fakes: then Dynamo's source expression tells."""
    source, names = source_of(placeholder), frame_names()
    if not isinstance(example, FakeTensor) or source is None or names is None:
        return example
    try:
        return eval(source.name, {"L": names[0], "G": names[1]})
    except Exception:  # a source that is no plain expression is no parameter's
        return example


def guard_identity(source: Any) -> None:
    """Makes what Dynamo is compiling hold for the object behind a source alone."""
    install_guard(source.make_guard(GuardBuilder.ID_MATCH))


_UNKNOWN_SIZE = 4  # stands for a size that depends on data


def hint_of(value: Any) -> Any:
    """A number of Dynamo's that may be a symbol, as it was when Dynamo saw it, without a guard on it."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    if value.node.has_hint():
        return value.node.hint
    return _UNKNOWN_SIZE if isinstance(value, torch.SymInt) else value.node.pytype(1)


def current_context() -> TracingContext | None:
    """What Dynamo and AOTAutograd share about the graph under way."""
    return TracingContext.try_get()


@contextlib.contextmanager
def within(context: TracingContext | None) -> Iterator[None]:
    """Inside, a later variant of the context's graph is compiled, unless a graph is under way already."""
    if context is None or current_context() is not None:
        yield
        return
    context = copy.copy(context)
    context.ddp_optimizer_ctx = None  # DDP's graph splitter counts in it, one compile for each of its parts
    with tracing(context):
        yield


def release_tensors(gm: fx.GraphModule, context: TracingContext | None) -> None:
    """Drops the weak references that a graph and its context have on the tensors that it was traced with.

    `torch.utils.swap_tensors`, and so FSDP2's ``model.to()``, refuses a tensor that has any. Dynamo does the same for
    its own backends, which keep neither. Not before Dynamo is done with the frame: it reads them until then.
    """
    if context is not None:
        context.tensor_to_context.clear()
    values = [node.meta.get("example_value") for node in gm.graph.nodes]
    modes = {id(value.fake_mode): value.fake_mode for value in values if isinstance(value, FakeTensor)}
    for mode in [context.fake_mode if context is not None else None, *modes.values()]:
        _clear_fake_mode_weakrefs(mode)


def fake_input(value: Any, context: TracingContext | None) -> Any:
    """What AOTAutograd would make of an example input, made beforehand and by the same rule."""
    mode = context.fake_mode if context else None
    if context is None or mode is None or not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return value
    symbolic = context.tensor_to_context.get(value)
    source = symbolic.tensor_source if symbolic else None
    return mode.from_tensor(value, symbolic_context=symbolic, source=source, trace=symbolic is None)


def traces_for_us() -> bool:
    """Whether the backend that Dynamo traces for is ours; to be asked while it traces."""
    backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    backend = innermost_backend(backend)
    backend = getattr(getattr(backend, "__self__", None), "backend_compile_fn", backend)  # of DDP's graph splitter
    for wrapped in ("_compiler_fn", "compiler_fn"):
        backend = getattr(innermost_backend(backend), wrapped, backend)
    return str(getattr(backend, "__module__", "")).startswith("lotion_fx")


def leave_graph(reason: str) -> None:
    """Ends the graph that Dynamo, which is tracing the caller, is making: what follows runs in Python."""
    torch._dynamo.graph_break(msg=reason)


def forget_graphs(code: CodeType) -> None:
    """Drops what Dynamo has compiled of a function's code."""
    torch._dynamo.reset_code(code)


def tracer() -> str:
    """What traces or transforms the Python code that runs now, other than Dynamo; empty for nothing."""
    if torch.compiler.is_exporting():
        return "torch.export"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func"
    return "make_fx" if get_proxy_mode() is not None else ""


def is_traced_by_fx() -> bool:
    """Whether `torch.fx.symbolic_trace` runs the caller: it takes parameters by name, whatever they hold."""
    return torch.fx._symbolic_trace.is_fx_symbolic_tracing() and get_proxy_mode() is None


def is_wrapped(tensor: Tensor) -> bool:
    """Whether torch.func or functionalization stands around a tensor's values."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor)


def real_of(tensor: Any) -> Tensor | None:
    """The tensor that a fake one was made of, None where there is none or its mode does not know.

    `torch.export` puts such fakes into a model's parameters, at whatever values these hold then.
    """
    if not isinstance(tensor, FakeTensor):
        return None
    converter = tensor.fake_mode.fake_tensor_converter.meta_converter
    number = next((number for number, made in converter.tensor_memo.items() if made is tensor), None)
    return next((real for real, known in converter.describer.lookup_tensor.items() if known == number), None)


@contextlib.contextmanager
def outside_of_modes() -> Iterator[None]:
    """Inside, tensors are computed as they are: nothing is traced, recorded or marked as inference."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


# --- modules ---

_HOOK: Any = "lotion_fx"  # the key of our hooks


def inline_only(hook: Any) -> None:
    """A function that is inlined where its caller is traced, and never a graph of its own."""
    skip_code(hook.__code__)


def hook_forward(module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
    """Registers two forward hooks, the second also for a forward that raises, under the same key in every module.

    Dynamo guards on the keys: with those that `nn.Module` numbers itself, no two blocks could share compiled code.
    """
    module._forward_pre_hooks[_HOOK] = before
    module._forward_hooks[_HOOK] = after
    module._forward_hooks_always_called[_HOOK] = True


def unhook(module: nn.Module) -> None:
    """Takes these hooks off a module."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called):
        hooks.pop(_HOOK, None)


def needs_frame(module: nn.Module) -> bool:
    """Whether a module's call, compiled by itself, stays in Python: a forward of torch's own, or our hooks.

    With hooks of others too it need not; but then one of ours, and not the rest, would be in a graph that breaks.
    """
    return _HOOK in module._forward_pre_hooks or bool(trace_rules.check(module.forward))


def plain_call(module: nn.Module) -> Callable[..., Any]:
    """The module's hooks and forward, not compiled."""
    call: Callable[..., Any] = module._call_impl
    return call


def call_of(module: nn.Module) -> Callable[..., Any]:
    """What calling the module runs: its compiled call, where it has one."""
    now = module._compiled_call_impl or plain_call(module)
    return now.call if isinstance(now, _CallOfOne) else now


def before_of(module: nn.Module) -> Any:
    """Our hook before the module's forward, None where it has none."""
    return module._forward_pre_hooks.get(_HOOK)


def refresh_flat_weights(module: nn.Module) -> None:
    """Makes a recurrent module see the parameters that it holds now: its forward takes them from a list of its own."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def replace_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Makes calling the module run something else."""
    if call is not None and isinstance(module, nn.RNNBase):  # copied with all of its state, as no other module is
        call = _CallOfOne(module, call)
    module._compiled_call_impl = call


def replaced_call(module: nn.Module, call: Callable[..., Any]) -> bool:
    """Whether calling the module runs something compiled that is not this."""
    now = module._compiled_call_impl
    return now is not None and (now.call if isinstance(now, _CallOfOne) else now) is not call


class _CallOfOne:
    """What calling a module runs, and calling a copy of it does not."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self.module, self.call = weakref.ref(module), call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.module()))
        return None if copied is None else vars(copied).get("_compiled_call_impl")

    def __reduce__(self) -> Any:
        return type(None), ()


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Inside, no module of the model runs compiled, neither by ``compile()`` nor wrapped by `torch.compile`."""
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    wrapped = {m: m.forward for m in model.modules() if isinstance(m, OptimizedModule)}
    try:
        for module in compiled:
            module._compiled_call_impl = None
        for module in wrapped:
            module.forward = next(module.children()).__call__  # what it wraps
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
        for module, forward in wrapped.items():
            module.forward = forward


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """A module's own parameters by attribute, each a tensor or None; of a ScriptModule, a copy of that dictionary."""
    return dict(module._parameters.items()) if isinstance(module, torch.jit.ScriptModule) else module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own buffers by attribute; of a ScriptModule, a copy of that dictionary."""
    return dict(module._buffers.items()) if isinstance(module, torch.jit.ScriptModule) else module._buffers


def version_of(tensor: Tensor) -> int:
    """A number that grows with each change in place."""
    return tensor._version


# --- steps ---


_grad_scales: weakref.WeakKeyDictionary[torch.optim.Optimizer, Tensor] = weakref.WeakKeyDictionary()


def take_grad_scale(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """The loss scale that a GradScaler divided out of this optimizer's gradients for the step under way."""
    return _grad_scales.pop(optimizer, None)


def watch_grad_scaler(then: Callable[[], None]) -> None:
    """Makes `torch.amp.GradScaler.unscale_` note the scale: nothing public tells it to an optimizer's hook."""
    original = torch.amp.GradScaler.unscale_
    if getattr(original, "_lotion_fx", False):
        return

    def unscale_(self: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        if self.is_enabled() and self._scale is not None:
            _grad_scales[optimizer] = self._scale.clone()
        original(self, optimizer)
        then()  # for it may skip the step

    unscale_._lotion_fx = True  # type: ignore[attr-defined]
    torch.amp.GradScaler.unscale_ = unscale_  # type: ignore[method-assign]
