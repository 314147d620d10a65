"""Layout "onnx": any model that torch.onnx exports, for onnxruntime and OpenVINO, as one file.

The rounded model is exported by torch; then each product of a packed weight becomes MatMulNBits or MatMulBnb4, and a
weight that other nodes take is dequantized for them. All arithmetic is float32's. A weight in bfloat16 or float16 is
written dense: the products take float32 alone.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from lotion_fx.deploy.content import Content
from lotion_fx.deploy.layout import Layout
from lotion_fx.deploy.layouts import onnx_weights
from lotion_fx.deploy.layouts.tracing import arguments, traceable
from lotion_fx.deploy.weights import QuantizedWeight
from lotion_fx.numerics.formats import Format

OPSET = 23
MARK = "lotion_fx:"  # names of our nodes begin so, then comes the weight's


class Onnx(Layout):
    name = "onnx"
    suffix = ".onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")

    def refusal(self, fmt: Format) -> str:
        return onnx_weights.refusal(fmt)

    def write(
        self, content: Content, place: Path, *, example_inputs: Any = None, dynamic_shapes: Any = None
    ) -> dict[str, str]:
        """
        Args:
            example_inputs: a tuple of the forward's arguments, or a dictionary of them by name.
            dynamic_shapes: which of their sizes may differ, as `torch.export` takes it.
        """
        args, kwargs = arguments(self.name, example_inputs)
        made = exported(traceable(content), args, kwargs, dynamic_shapes)
        dense = {}
        for name, weight in content.weights.items():
            names = content.names(name)
            if reason := replaced(made.graph, name, names, weight):
                dense[name] = reason
        if not any(each.domain == "com.microsoft" for each in made.opset_import):
            made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        onnx.save(made, str(place))
        return dense

    def read(self, place: Path, content: Content) -> Iterator[tuple[str, Tensor]]:
        """As onnxruntime dequantizes them."""
        made = onnx.load(str(place))
        tensors = {each.name: each for each in made.graph.initializer}
        seen = set()
        for node in made.graph.node:
            name = node.name.removeprefix(MARK).partition("#")[0]
            if node.name.startswith(MARK) and name not in seen:
                seen.add(name)
                taken = [tensors[each] for each in node.input if each in tensors]
                read = onnx_weights.dequantized(node, taken, made)
                weight = content.weights[name]
                yield name, read if node.op_type == "DequantizeLinear" else read.movedim(-1, weight.axis)

    def outputs(self, place: Path, model: nn.Module, inputs: Any) -> Tensor:
        """By onnxruntime, in float32."""
        import onnxruntime

        session = onnxruntime.InferenceSession(place, providers=["CPUExecutionProvider"])
        args, kwargs = arguments("onnx", inputs if isinstance(inputs, (Mapping, tuple, list)) else (inputs,))
        given = [*args, *kwargs.values()]
        named = {each.name: each.name for each in session.get_inputs()}
        fed = {name: kwargs.get(name, tensor).numpy() for name, tensor in zip(named, given, strict=False)}
        return torch.from_numpy(session.run(None, fed)[0])


def exported(model: nn.Module, args: Any, kwargs: Any, dynamic_shapes: Any) -> onnx.ModelProto:
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its steps even where it is asked not to
        made = torch.onnx.export(
            model,
            args,
            kwargs=kwargs,
            dynamo=True,
            optimize=False,  # which would fold transposes into copies of the weights
            opset_version=OPSET,
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
    assert made is not None
    graph = made.model_proto.graph
    for each in (*graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        del each.metadata_props[:]  # stack traces: most of a small file, and this machine's paths
        each.ClearField("doc_string")
    return made.model_proto


def replaced(graph: onnx.GraphProto, name: str, names: list[str], weight: QuantizedWeight) -> str:
    """Puts a weight's codes in its place in a graph; the reason if it stays dense."""
    known = {each.name: each for each in graph.initializer}
    found = [each for each in names if each in known]
    if not found:
        return "torch.onnx has computed with it while tracing, and it is no tensor of the graph"
    if weight.dtype != torch.float32:
        return (
            f"its products are in {str(weight.dtype).removeprefix('torch.')}, and onnxruntime's with codes in float32"
        )
    (initial,) = found
    products, others = _uses(graph, initial, weight.axis)
    if products and not others and onnx_weights.is_product(weight):
        for i, (node, transposition) in enumerate(products):
            parts = onnx_weights.product(name, weight, node.input[0], node.output[0])
            parts.node.name = f"{MARK}{name}#{i}"
            if len(node.input) > 2:  # the bias, which not every client takes as an input of the product
                parts.node.output[0] = f"{name}.product{i}"
                graph.node.insert(
                    _at(graph, node) + 1, helper.make_node("Add", [parts.node.output[0], node.input[2]], node.output)
                )
            graph.node.insert(_at(graph, node), parts.node)
            graph.node.remove(node)
            if transposition is not None and transposition in graph.node:
                graph.node.remove(transposition)
    elif reason := onnx_weights.no_product(weight):
        return reason
    else:
        parts = onnx_weights.dequantizer(name, weight)
        parts.node.name = f"{MARK}{name}"
        for node in graph.node:
            for i, taken in enumerate(node.input):
                if taken == initial:
                    node.input[i] = parts.node.output[0]
        graph.node.insert(0, parts.node)
    graph.initializer.remove(known[initial])
    graph.initializer.extend(parts.tensors)
    return ""


def _at(graph: onnx.GraphProto, node: onnx.NodeProto) -> int:
    return next(i for i, each in enumerate(graph.node) if each.output[0] == node.output[0])


def _uses(
    graph: onnx.GraphProto, name: str, axis: int
) -> tuple[list[tuple[onnx.NodeProto, onnx.NodeProto | None]], int]:
    """The products that sum along an axis of a tensor, each with its transposition; and how many other uses."""
    products: list[tuple[onnx.NodeProto, onnx.NodeProto | None]] = []
    others = 0
    for node in graph.node:
        if name not in node.input:
            continue
        if node.op_type == "Transpose":
            for after in graph.node:
                if node.output[0] in after.input:
                    fits = _sums(after, node.output[0], 1 - axis)
                    products += [(after, node)] if fits else []
                    others += not fits
        elif _sums(node, name, axis):
            products.append((node, None))
        else:
            others += 1
    return products, others


def _sums(node: onnx.NodeProto, name: str, axis: int) -> bool:
    """Whether a node is a product whose second operand, a matrix, is summed along an axis."""
    if node.op_type not in ("MatMul", "Gemm") or node.input[1] != name or node.input[0] == name:
        return False
    told = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    plain = not told.get("transA", 0) and told.get("alpha", 1.0) == 1.0 and told.get("beta", 1.0) == 1.0
    return plain and axis == (1 if told.get("transB", 0) else 0)
