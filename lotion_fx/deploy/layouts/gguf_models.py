"""How llama.cpp wants the models that it knows: which architecture, what it must be told, and how rows are ordered.

Names are those of gguf's own table. llama.cpp stores a matrix [outputs, inputs], with no other change to a model than
these: architecture "llama" rotates neighbouring pairs where transformers rotates halves, so the rows of q and k are
reordered; experts' gate and up projections, one tensor in transformers, are two. Both move whole rows, so they are the
same for bytes and for numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gguf
import torch
from torch import Tensor

from lotion_fx.attributes import config_of

KNOWN = {"llama": gguf.MODEL_ARCH.LLAMA, "mixtral": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}
KNOWN["gpt2"] = gguf.MODEL_ARCH.GPT2
ACTIVATIONS = {"gpt2": ("gelu_new", "gelu_pytorch_tanh"), "": ("silu",)}


class Place(NamedTuple):
    """Where a tensor goes.

    Args:
        names: in the file; its rows are cut into as many equal parts.
        heads: of attention, within each of which rows are reordered; 0 for none.
    """

    names: tuple[str, ...]
    heads: int = 0

    def cut(self, rows: Tensor) -> list[tuple[str, Tensor]]:
        """The tensors of the file of one of the model, [*rows, K] in numbers or bytes, or a vector."""
        dim = max(rows.dim() - 2, 0)
        if self.heads:  # [heads, half, pair] -> [heads, pair, half]
            rows = rows.unflatten(dim, (self.heads, 2, -1)).transpose(dim + 1, dim + 2).flatten(dim, dim + 2)
        return list(zip(self.names, rows.chunk(len(self.names), dim), strict=True))

    def join(self, parts: list[Tensor]) -> Tensor:
        """What `cut` was given."""
        dim = max(parts[0].dim() - 2, 0)
        rows = torch.cat(parts, dim)
        if self.heads:
            rows = rows.unflatten(dim, (self.heads, -1, 2)).transpose(dim + 1, dim + 2).flatten(dim, dim + 2)
        return rows


class Architecture:
    """
    Raises:
        ValueError: llama.cpp does not know the model, or computes something else with it.
    """

    def __init__(self, model: Any) -> None:
        config = config_of(model)
        self.kind = getattr(config, "model_type", type(model).__name__)
        if self.kind not in KNOWN or not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
            raise ValueError(
                f"model: layout='gguf' writes transformers' causal language models {', '.join(KNOWN)}, not "
                f"{type(model).__name__}; layout='lotion' takes any"
            )
        self.config = config
        self.id = KNOWN[self.kind]
        self.layers = int(config.num_hidden_layers)
        self.table = gguf.get_tensor_name_map(self.id, self.layers)
        self._check()
        self.factors = None if self.kind == "gpt2" else self._rotary_factors(model)

    def _check(self) -> None:
        config = self.config
        activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
        expected = ACTIVATIONS.get(self.kind, ACTIVATIONS[""])
        wrong: list[tuple[str, Any, Any]] = (
            [] if activation in expected else [("its activation", activation, " or ".join(expected))]
        )
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        for name, value, plain in (
            ("sliding_window", window, None),
            ("scale_attn_by_inverse_layer_idx", getattr(config, "scale_attn_by_inverse_layer_idx", False), False),
            ("scale_attn_weights", getattr(config, "scale_attn_weights", True), True),
        ):
            if value != plain:
                wrong.append((name, value, plain))
        if wrong:
            name, value, plain = wrong[0]
            raise ValueError(
                f"model: {name} is {value!r}; llama.cpp computes architecture {self.kind!r} with {plain!r}"
            )

    def _rotary_factors(self, model: Any) -> Tensor | None:
        """What each rotary frequency is divided by, float32 [pairs]; None where all are plain."""
        rotary = model.model.rotary_emb
        kind = (getattr(self.config, "rope_parameters", None) or {}).get("rope_type", "default")
        if kind not in ("default", "linear", "llama3") or getattr(rotary, "attention_scaling", 1.0) != 1.0:
            raise ValueError(
                f"model: its rotary embedding is of type {kind!r}; layout='gguf' writes default, linear, llama3"
            )
        if kind == "default":
            return None
        width = self.head_size
        plain = self.theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        return (plain / rotary.inv_freq.double().cpu()).float()

    @property
    def head_size(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def theta(self) -> float:
        return float((getattr(self.config, "rope_parameters", None) or {}).get("rope_theta", 10000.0))

    def place(self, name: str) -> Place:
        """
        Args:
            name: of a tensor in the model.

        Raises:
            ValueError: llama.cpp has no such tensor in this architecture.
        """
        stem, end = name, ""
        for suffix in (".weight", ".bias"):
            if name.endswith(suffix):
                stem, end = name.removesuffix(suffix), suffix
        names = [stem]
        if stem.endswith("experts.gate_up_proj"):
            names = [stem.replace("gate_up", "gate"), stem.replace("gate_up", "up")]
        end = end or ".weight"  # stacked experts are parameters without a suffix
        found = [self.table.get_name(each) for each in names]
        if None in found:
            raise ValueError(f"model: {name!r} is no tensor of llama.cpp's {gguf.MODEL_ARCH_NAMES[self.id]}")
        heads = 0
        if self.id == gguf.MODEL_ARCH.LLAMA:
            attention = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
            heads = attention.get(stem.rpartition(".")[2], 0) if "attn" in stem else 0
        return Place(tuple(f"{each}{end}" for each in found), heads)

    def tell(self, writer: gguf.GGUFWriter) -> None:
        """Writes what llama.cpp must know of the model, without its tokenizer."""
        config = self.config
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(self.layers)
        writer.add_head_count(config.num_attention_heads)
        writer.add_vocab_size(config.vocab_size)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if self.kind == "gpt2":
            writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
            writer.add_layer_norm_eps(config.layer_norm_epsilon)
            return
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.head_size)
        writer.add_rope_freq_base(self.theta)
        if self.kind == "mixtral":
            writer.add_expert_count(config.num_local_experts)
            writer.add_expert_used_count(config.num_experts_per_tok)
        if self.factors is not None:
            writer.add_tensor("rope_freqs.weight", self.factors.numpy())


def stands_for(names: list[str], place: Callable[[str], Place]) -> Place:
    """The place of a tensor that has several names: the embedding's, where a head is tied to it, for llama.cpp reads it
    in the head's stead."""
    places = [place(name) for name in names]
    embedding = [each for each in places if each.names[0].startswith("token_embd.")]
    return (embedding or places)[0]
