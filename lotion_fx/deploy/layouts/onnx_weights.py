"""A packed weight in ONNX: the product that takes its codes, or a DequantizeLinear in its place."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor

from lotion_fx.deploy.weights import QuantizedWeight
from lotion_fx.numerics.formats import Format, resolve
from lotion_fx.numerics.grids import Codebook, Integer, Minifloat

SMALLEST, LARGEST = 16, 256  # blocks of MatMulNBits: powers of two
_FLOAT8 = {Minifloat(4, 3, 448.0): TensorProto.FLOAT8E4M3FN, Minifloat(5, 2, 57344.0): TensorProto.FLOAT8E5M2}
_NF4 = resolve("nf4").grid


class Parts(NamedTuple):
    """A node that stands for a weight, its tensors, and its inputs after the activations, where it takes any."""

    node: onnx.NodeProto
    tensors: list[onnx.TensorProto]


def refusal(fmt: Format) -> str:
    advice = "train with int2, int4, int8, nf4 or mxfp8"
    if isinstance(fmt.grid, Integer):
        if fmt.grid.bits not in (2, 4, 8):
            return f"MatMulNBits of onnxruntime has 2, 4 or 8 bits; {advice}"
        if isinstance(fmt.block, int) and math.gcd(fmt.block, LARGEST) < SMALLEST:
            return (
                f"MatMulNBits of onnxruntime has blocks of a power of two from {SMALLEST}; train with {_name(fmt)}/32"
            )
        return ""
    if isinstance(fmt.grid, Codebook):
        if fmt.grid != _NF4:
            return f"no operator of onnxruntime has these levels; {advice}"
        fits = isinstance(fmt.block, int) and fmt.block >= SMALLEST and math.gcd(fmt.block, 2**20) == fmt.block
        return "" if fits else "MatMulBnb4 of onnxruntime has blocks of a power of two from 16; train with nf4"
    if fmt.grid in _FLOAT8:
        return ""
    return f"onnxruntime computes with no 4-bit or 6-bit floats on a CPU (FLOAT4E2M1 has no kernel there); {advice}"


def _name(fmt: Format) -> str:
    return f"int{fmt.grid.bits}"


def no_product(weight: QuantizedWeight) -> str:
    """Why a weight that other nodes than products take is written dense; empty if it can be dequantized for them."""
    grid = weight.format.grid
    if grid in _FLOAT8 or (isinstance(grid, Integer) and grid.bits in (4, 8)):
        return ""
    block = weight.format.block
    if grid == _NF4 and isinstance(block, int) and len(weight.shape) == 2 and weight.length % block:
        return f"its length of {weight.length} is no multiple of a block of {block}, which products in nf4 need"
    return f"ONNX dequantizes no {weight.format.name} for what takes it, which is no product"


def is_product(weight: QuantizedWeight) -> bool:
    """Whether onnxruntime has a product with its codes."""
    if len(weight.shape) != 2:
        return False
    if weight.format.grid == _NF4:
        assert isinstance(weight.format.block, int)
        return weight.length % weight.format.block == 0
    return isinstance(weight.format.grid, Integer)


def product(name: str, weight: QuantizedWeight, activations: str, out: str) -> Parts:
    """The node ``out = activations @ weight.T``, of com.microsoft."""
    outputs = math.prod(weight.shape) // weight.length
    shape: dict[str, Any] = {"K": weight.length, "N": outputs, "domain": "com.microsoft"}
    inputs = [activations, f"{name}.codes", f"{name}.scales"]
    if weight.format.grid == _NF4:
        high, low = weight.each_code().reshape(-1, 2).unbind(-1)
        block: Any = weight.format.block
        tensors = [
            _raw(inputs[1], high << 4 | low, TensorProto.UINT8),
            _float(inputs[2], weight.block_scales().flatten()),
        ]
        return Parts(helper.make_node("MatMulBnb4", inputs, [out], **shape, block_size=block, quant_type=1), tensors)
    bits = weight.format.grid.bits
    block, scales = _blocks(weight, outputs)
    codes = F.pad(weight.each_code(), (0, -weight.length % block), value=1 << (bits - 1)).unflatten(-1, (-1, block))
    packed = torch.zeros_like(codes[..., :: 8 // bits])
    for i in range(8 // bits):
        packed |= codes[..., i :: 8 // bits] << (bits * i)
    tensors = [_raw(inputs[1], packed, TensorProto.UINT8), _float(inputs[2], scales)]
    # Level 1 asks for products in float32; left unset, a session may be told to round activations to 8 bits.
    node = helper.make_node("MatMulNBits", inputs, [out], **shape, bits=bits, block_size=block, accuracy_level=1)
    return Parts(node, tensors)


def _blocks(weight: QuantizedWeight, outputs: int) -> tuple[int, Tensor]:
    """A block that MatMulNBits has, and its scales [outputs, blocks], each as often as it takes."""
    scales, block = weight.block_scales(), weight.format.block
    if isinstance(block, int):
        fitting = math.gcd(block, LARGEST)
        scales = scales.repeat_interleave(block // fitting, -1)[:, : -(-weight.length // fitting)]
        return fitting, scales
    fitting = min(LARGEST, max(SMALLEST, 1 << (weight.length - 1).bit_length()))
    return fitting, scales.reshape(-1, 1).expand(outputs, -(-weight.length // fitting)).contiguous()


def dequantizer(name: str, weight: QuantizedWeight) -> Parts:
    """The node that gives the weight in its own shape."""
    grid, axis, block = weight.format.grid, weight.axis, weight.format.block
    codes = weight.each_code().movedim(-1, axis).contiguous()
    scales = weight.block_scales()
    inputs = [f"{name}.codes", f"{name}.scales"]
    if grid in _FLOAT8:
        stored = _raw(inputs[0], codes, _FLOAT8[grid])
    elif grid.bits == 8:
        stored = _raw(inputs[0], codes ^ 128, TensorProto.INT8)
    else:
        pairs = F.pad((codes ^ 8).flatten(), (0, codes.numel() % 2)).reshape(-1, 2)
        stored = _raw(inputs[0], pairs[:, 0] | pairs[:, 1] << 4, TensorProto.INT4, list(weight.shape))
    attributes: dict[str, Any] = {}
    if block == "tensor":
        scales = scales.reshape(())
    else:
        size = block if isinstance(block, int) else weight.length
        attributes, scales = {"axis": axis, "block_size": size}, scales.movedim(-1, axis)
    node = helper.make_node("DequantizeLinear", inputs, [f"{name}.dequantized"], **attributes)
    return Parts(node, [stored, _float(inputs[1], scales)])


def _raw(name: str, values: Tensor, type: int, shape: list[int] | None = None) -> onnx.TensorProto:
    array = values.cpu().contiguous().numpy()
    return helper.make_tensor(name, type, list(array.shape) if shape is None else shape, array.tobytes(), raw=True)


def _float(name: str, values: Tensor) -> onnx.TensorProto:
    return _raw(name, values.float(), TensorProto.FLOAT)


def dequantized(node: onnx.NodeProto, tensors: list[onnx.TensorProto], model: onnx.ModelProto) -> Tensor:
    """What onnxruntime makes of a node: the weight itself, or its product with an identity, which is the transpose."""
    import onnxruntime

    sizes = {a.name: a.i for a in node.attribute}
    needs = {} if node.op_type == "DequantizeLinear" else {"x": np.eye(sizes["K"], dtype=np.float32)}
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    alone.output[0] = "weight"
    if needs:
        alone.input[0] = "x"
    takes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in needs.items()]
    gives = [helper.make_tensor_value_info("weight", TensorProto.FLOAT, None)]
    graph = helper.make_graph([alone], "weight", takes, gives, tensors)
    made = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, needs)[0])
    return found.T if needs else found
