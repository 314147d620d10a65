"""Layout "gguf": transformers' Llama, Qwen3, Mixtral and GPT-2 for llama.cpp, as one file.

Weights are in ggml's blocks (`ggml_blocks`), all other tensors in float32. llama.cpp computes with activations of 8
bits, so that its logits are some 6e-3 of their norm off, whichever way a model was quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn

from lotion_fx.deploy.content import Content
from lotion_fx.deploy.layout import Layout
from lotion_fx.deploy.layouts import ggml_blocks, gguf_tokenizer
from lotion_fx.deploy.layouts.gguf_models import Architecture, Place, stands_for
from lotion_fx.deploy.weights import QuantizedWeight
from lotion_fx.numerics.formats import Format


class Gguf(Layout):
    name = "gguf"
    suffix = ".gguf"
    packages = ("gguf",)

    def refusal(self, fmt: Format) -> str:
        return ggml_blocks.refusal(fmt)

    def write(self, content: Content, place: Path, *, pre_tokenizer: str | None = None) -> dict[str, str]:
        """
        Args:
            pre_tokenizer: llama.cpp's name of how the tokenizer splits text, where that cannot be told from it.
        """
        architecture = Architecture(content.model)
        scaled = [name for name, weight in content.weights.items() if weight.format.law.two_level]
        if scaled and architecture.kind == "gpt2":
            raise ValueError(
                f"layout='gguf' has no place for {scaled[0]!r} in {content.weights[scaled[0]].format.name}: llama.cpp "
                "computes GPT-2 without the tensor scale of NVFP4; train with mxfp4 or int4/32/fp16"
            )
        writer = gguf.GGUFWriter(place, gguf.MODEL_ARCH_NAMES[architecture.id])
        architecture.tell(writer)
        gguf_tokenizer.tell(writer, content, pre_tokenizer)
        dense = {}
        for name, weight in content.weights.items():
            where = _place(architecture, content, name)
            if reason := _dense(where, weight):
                dense[name] = reason
                _add(writer, where, weight.dequantize().movedim(weight.axis, -1))
                continue
            blocks = ggml_blocks.relaid(name, weight)
            for each, rows in where.cut(blocks.rows):
                writer.add_tensor(each, rows.cpu().contiguous().numpy(), raw_dtype=blocks.type)
                if blocks.scale is not None:
                    experts = len(rows) if rows.dim() == 3 else 1
                    writer.add_tensor(_scale(each), torch.full((experts,), blocks.scale).numpy())
        for name, tensor in content.others.items():
            where = _place(architecture, content, name)
            _add(writer, where, tensor.T if _is_transposed(content, name) else tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return dense

    def read(self, place: Path, content: Content) -> Iterator[tuple[str, Tensor]]:
        """As gguf dequantizes them, in float32, then rounded to the dtype that the model was trained in."""
        architecture = Architecture(content.model)
        tensors = {each.name: each for each in gguf.GGUFReader(place).tensors}
        for name, weight in content.weights.items():
            where = _place(architecture, content, name)
            if _dense(where, weight):
                continue
            parts = []
            for each in where.names:
                scale = tensors.get(_scale(each))
                parts.append(ggml_blocks.dequantized(tensors[each], None if scale is None else float(scale.data[0])))
            yield name, where.join(parts).movedim(-1, weight.axis).to(weight.dtype)

    def outputs(self, place: Path, model: nn.Module, inputs: Any) -> Tensor:
        """The logits [batch, tokens, vocabulary] of llama.cpp, whose cache is in float32."""
        if find_spec("llama_cpp") is None:
            raise NotImplementedError(
                "layout='gguf': llama.cpp runs it; pip install llama-cpp-python to compare outputs"
            )
        from llama_cpp import Llama

        ids = inputs["input_ids"] if isinstance(inputs, Mapping) else inputs
        size = max(64, ids.shape[1])
        client = Llama(str(place), n_ctx=size, n_batch=size, logits_all=True, verbose=False, type_k=0, type_v=0)
        rows = []
        for row in ids.tolist():
            client.reset()
            client.eval(row)
            rows.append(torch.tensor(client.scores[: len(row)]))
        return torch.stack(rows)


def _place(architecture: Architecture, content: Content, name: str) -> Place:
    return stands_for(content.names(name), architecture.place)


def _dense(where: Place, weight: QuantizedWeight) -> str:
    """Why a weight is written dense; empty if it is packed."""
    if weight.axis != len(weight.shape) - 1 and where.names[0].startswith("token_embd."):
        return "its blocks do not run along the rows that an embedding looks up"
    if weight.format.law.two_level and where.names[0].startswith("token_embd."):
        return "llama.cpp looks embeddings up without the tensor scale of NVFP4"
    if weight.format.law.two_level and ".ffn_gate_inp." in where.names[0]:
        return "llama.cpp has no tensor scale of NVFP4 for routers"
    return ggml_blocks.indivisible(weight)


def _is_transposed(content: Content, name: str) -> bool:
    """Whether it is a dense weight of transformers' Conv1D, which has inputs first."""
    owner, _, attribute = name.rpartition(".")
    return attribute == "weight" and type(content.model.get_submodule(owner)).__name__ == "Conv1D"


def _add(writer: gguf.GGUFWriter, where: Place, rows: Tensor) -> None:
    for each, part in where.cut(rows):
        writer.add_tensor(each, part.float().cpu().contiguous().numpy())


def _scale(name: str) -> str:
    return f"{name.removesuffix('weight')}scale"
