"""The Triton source that Inductor emits for a CUDA architecture, of a transformed transformer block, without a device.

One training step of the block runs on CPU, through `lotion_fx.transform` itself. Every graph that the step hands to
Inductor is compiled with the options that it came with, but as if its tensors were on the device:

    traced on CPU -> *moved to CUDA* -> curvature pass -> Inductor's passes, partition, lowering -> Triton source

So what is read here is what a user of that architecture gets, but for what Inductor decides by measuring: to pad matrix
products of odd sizes.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import lotion_fx
from lotion_fx import alike, private, update
from lotion_fx.compiling import compile_graph
from lotion_fx.kernels.config import Config
from lotion_fx.kernels.emit.absent_cuda import absent_cuda
from lotion_fx.passes.lower import lower
from lotion_fx.private import (
    CustomGraphPass,
    FakeTensor,
    GraphLowering,
    InTurn,
    PyCodeCache,
    aot_export_module,
    compile_fx,
    compile_fx_inner,
    functorch_config,
    inductor_config,
    select_decomp_table,
    tree_map,
)
from lotion_fx.variants import Backend

DEVICE = torch.device("cuda", 0)


class Block(nn.Module):
    """A pre-norm transformer block, [batch, length, width] to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@dataclass(frozen=True)
class Emitted:
    """What Inductor makes of one graph.

    Args:
        graph: ``"forward"``, ``"backward"`` or ``"step"``, the update at an optimizer's step.
        source: the wrapper module in Python, the source of its Triton kernels inside.
        bytes: what its kernels read and write by Inductor's own count, matrix products and other library kernels
            included.
        fused_bytes: those of the kernels that Inductor generates alone.
    """

    graph: str
    source: str
    bytes: int
    fused_bytes: int

    @property
    def triton_launches(self) -> list[str]:
        """The Triton kernel of each launch."""
        return re.findall(r"^ +(\w+)\.run\(", self.source, re.M)

    @property
    def library_calls(self) -> list[str]:
        """The library's kernel of each other call."""
        return re.findall(r"^ +(?:\w+ = )?(extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", self.source, re.M)

    @property
    def workspace_sums(self) -> int:
        """How many vectors a kernel with reductions of both orders leaves as partial sums for ATen to add."""
        return len(re.findall(r"workspace_\w+\[.*\]\.view\(.*\)\.sum\(dim=0\)", self.source))


def emitted(
    arch: int,
    method: str | None = "lotion",
    fmt: str = "nvfp4",
    *,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int, int] = (8, 1024, 768),
    heads: int = 12,
    step: bool = True,
    **settings: Any,
) -> list[Emitted]:
    """What Inductor emits for one training step of a block: forward, backward and step.

    Args:
        arch: compute capability times ten, 80 to 120.
        method, fmt, settings: `lotion_fx.transform`'s; method None leaves the block plain, and has no step.
        dtype: of the matrix products, ``torch.bfloat16`` by autocast; weights and the residual stream are float32.
        shape: batch, length and width of the block's input.
        heads: of the attention.
        step: whether to emit the step as well.
    """
    block = Block(shape[2], heads)
    if method is None:
        block.compile(backend=Backend())
    else:
        lotion_fx.transform(block, fmt, method=method, **settings)

    def forward(batch: int, length: int) -> Tensor:
        x = torch.randn(batch, length, shape[2], requires_grad=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return block(x)

    def train() -> None:  # the update is the same for any number of tokens
        out = forward(1, 16)
        out.backward(torch.ones_like(out))
        torch.optim.SGD(block.parameters(), lr=0.1).step()

    training = forward_and_backward(lambda: forward(*shape[:2]), arch)
    return training + (others(train, arch) if step and method is not None else [])


def forward_and_backward(function: Callable[[], Any], arch: int) -> list[Emitted]:
    """The forward and backward graphs of a function that is called on CPU, where its compiled parts yield zeros."""
    found: list[Emitted] = []

    def emit(gm: fx.GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any]) -> Callable[..., Any]:
        found.extend(compile_for(arch, copy.deepcopy(gm), inputs, config_patches)[1])
        results: Any = gm.graph.output_node().args[0]
        shapes = [node.meta["example_value"].shape for node in results]
        return lambda *args: [torch.zeros(()).expand(shape) for shape in shapes]

    torch.compiler.reset()
    with mock.patch.object(private, "compile_fx", emit), lowered_for(arch):
        function()
    return found


def others(function: Callable[[], Any], arch: int) -> list[Emitted]:
    """The graphs without a gradient in a function that is run on CPU."""
    found: list[Emitted] = []

    def emit(gm: fx.GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any]) -> Callable[..., Any]:
        if any(x.requires_grad for x in inputs):
            # Not eagerly: the update's code depends on what the curvature pass found.
            return compile_graph(gm, inputs, "aot_eager", None, {})
        found.extend(compile_for(arch, copy.deepcopy(gm), inputs, config_patches)[1])
        return gm.forward

    torch.compiler.reset()
    with mock.patch.object(private, "compile_fx", emit), lowered_for(arch):
        function()
    return found


@contextlib.contextmanager
def lowered_for(arch: int) -> Iterator[None]:
    """Inside, what is compiled for CPU tensors takes the kernels that it would take on a device, see `passes.lower`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(lower, "arch_of", lambda device: arch))
        for kept in (alike._compiled, update._specs):
            stack.enter_context(mock.patch.dict(kept, clear=True))
        yield


Loader = Callable[[str], Callable[[list[Any]], Any]]


def _unloaded(source: str) -> Callable[[list[Any]], Any]:
    return lambda inputs: None


def compile_for(
    arch: int, gm: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any], load: Loader = _unloaded
) -> tuple[Callable[..., Any], list[Emitted]]:
    """Compiles a graph with its options, which then are of a device that is not there.

    Args:
        arch: of the device.
        gm, inputs, options: what the backend hands to Inductor.
        load: makes of a module's source the function that it defines, of one list of tensors.

    Returns:
        The compiled function, and what it is made of.
    """
    found: list[Emitted] = []
    passes = options.get("joint_custom_pre_pass", [])
    passes = passes if isinstance(passes, list) else [passes]
    options = {**options, "joint_custom_pre_pass": InTurn([ToDevice(), *passes])}
    with (
        absent_cuda(arch),
        warnings.catch_warnings(),
        inductor_config.patch(force_disable_caches=True, compile_threads=1, shape_padding=False),
        functorch_config.patch(force_non_lazy_backward_lowering=True, decompose_custom_triton_ops=False),
    ):
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)  # the user's choice, not ours
        warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)  # Triton 3.9's
        function: Any = compile_fx(
            _with_cuda_attention(gm), inputs, inner_compile=_recorder(found, load), config_patches=options
        )
    return function, found


class ToDevice(CustomGraphPass):
    """Moves a graph that was traced on CPU: factories, and every fake value."""

    def __call__(self, graph: fx.Graph) -> None:
        _move(graph)

    def uuid(self) -> None:
        return None


def _move(graph: fx.Graph) -> None:
    for node in graph.nodes:
        node.args, node.kwargs = tree_map(_moved, (node.args, dict(node.kwargs)))
        if "val" in node.meta:
            node.meta["val"] = tree_map(_moved, node.meta["val"])


def _moved(value: Any) -> Any:
    if isinstance(value, torch.device):
        return DEVICE
    if not isinstance(value, FakeTensor) or value.device == DEVICE:
        return value
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)


def _recorder(found: list[Emitted], load: Loader) -> Callable[..., Any]:
    """Inductor's inner compiler, which keeps the source and leaves it to ``load`` to load it."""

    def compile_inner(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        graph = "step" if kwargs.get("is_inference") else "backward" if kwargs.get("is_backward") else "forward"

        def record(lowering: GraphLowering) -> SimpleNamespace:
            source = lowering.codegen()[0].value
            nodes = {node: node.get_read_write_buffers_sizes() for node in lowering.scheduler.nodes}
            fused = sum(size for node, size in nodes.items() if not node.is_extern())
            found.append(Emitted(graph, source, sum(nodes.values()), fused))
            return SimpleNamespace(call=load(source))

        inputs = [_moved(x) for x in inputs]
        _move(gm.graph)
        gm = _inlined(gm, inputs)
        with mock.patch.object(GraphLowering, "compile_to_module", record):
            return compile_fx_inner(gm, inputs, **kwargs)

    return compile_inner


def _inlined(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """The graph with our ``triton_op``s as the kernels that they launch.

    On CPU these ops take their ATen reference, so the trace kept them whole.
    """
    ours = [node for node in gm.graph.nodes if getattr(node.target, "namespace", "") == "lotion_fx"]
    if not ours:
        return gm
    with torch.no_grad(), functorch_config.patch(decompose_custom_triton_ops=True):
        exported: Any = aot_export_module(gm, inputs, trace_joint=False, decompositions=select_decomp_table())[0]
    return exported


def _with_cuda_attention(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with the attention that CUDA chooses, for a trace on CPU would decompose it to the CPU's."""
    for node in gm.graph.nodes:
        if node.target is F.scaled_dot_product_attention:
            node.target = _attention
    gm.recompile()
    return gm


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    aten = torch.ops.aten
    if q.dtype == torch.float32 or attn_mask is not None:
        return aten._scaled_dot_product_efficient_attention(
            q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale
        )[0]
    return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]


def compile_kernels(source: str, arch: int) -> list[tuple[str, Config, Any]]:
    """Compiles every Triton kernel of an emitted module.

    Args:
        source: `Emitted.source`.
        arch: that for which it was emitted.

    Returns:
        For each kernel and each configuration that Inductor would try on a device: the kernel's name, the
        configuration and Triton's ``CompiledKernel``.
    """
    compiled = []
    with absent_cuda(arch), inductor_config.patch(use_static_triton_launcher=False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)  # of kernels that a user wrote
        for name, code in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'", source, re.S):
            tuner = getattr(PyCodeCache.load(code), name)
            for each in tuner.configs:
                kernel = tuner._precompile_config(each).kernel
                compiled.append((name, Config(each.kwargs, each.num_warps, each.num_stages), kernel))
    return compiled
