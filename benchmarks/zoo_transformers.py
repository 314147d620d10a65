"""Models of the `transformers` library: tiny configurations, random weights, no dropout, own losses where any.

A type's sizes are set by the names that its configuration knows (`SIZES`); the tables below add what is particular.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig
from zoo_entry import Entry, Inputs, named, normal, whole

VOCAB, LENGTH = 96, 12

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "n_layers", "n_layer", "num_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_RANDOM = ("dropout", "dropout_prob", "dropout_rate", "pdrop", "layerdrop", "drop_path_rate", "attention_dropout_prob")


def small(kind: str, **more: Any) -> Any:
    """A type's configuration, its sizes small and its randomness off; ``omit`` names sizes to leave as they are."""
    default = AutoConfig.for_model(kind)
    omitted = set(more.pop("omit", ()))
    known = {name: size for name, size in SIZES.items() if hasattr(default, name) and name not in omitted}
    known = {name: size for name, size in known.items() if not isinstance(getattr(type(default), name, None), property)}
    random = {name: 0.0 for name, x in default.to_dict().items() if name.endswith(_RANDOM) and not isinstance(x, bool)}
    return AutoConfig.for_model(kind, **{**known, **random, **more})


def build(kind: str, head: str, more: dict[str, Any]) -> nn.Module:
    """A model of a type, by an automatic class or a class of its own."""
    made = getattr(transformers, head)
    config = small(kind, **more)
    config.use_cache = False  # torch.export knows no cache among outputs
    model = made.from_config(config) if head.startswith("AutoModel") else made(config)
    if head == "AutoModelForCausalLM":
        model.loss_type = "ForCausalLM"  # else a logging call breaks the graph of some
    return model.float()


_ids, _labels = whole(VOCAB, (2, LENGTH)), whole(VOCAB, (2, LENGTH))
_classes: Inputs = lambda: (torch.tensor([0, 1]),)  # noqa: E731
text = named(input_ids=_ids, labels=_labels)
pairs = named(input_ids=_ids, decoder_input_ids=whole(VOCAB, (2, 6)), labels=whole(VOCAB, (2, 6)))
# Plain aot_eager fails in qwen3_next's backward pass on more sequences than one, and LongT5 without a mask.
one_text = named(input_ids=whole(VOCAB, (1, LENGTH)), labels=whole(VOCAB, (1, LENGTH)))
_ones: Inputs = lambda: (torch.ones(2, LENGTH, dtype=torch.long),)  # noqa: E731
masked_pairs = named(
    input_ids=_ids, attention_mask=_ones, decoder_input_ids=whole(VOCAB, (2, 6)), labels=whole(VOCAB, (2, 6))
)
sentence = named(input_ids=_ids, labels=_classes)
image = named(pixel_values=normal((2, 3, 32, 32)), labels=_classes)
image64 = named(pixel_values=normal((2, 3, 64, 64)), labels=_classes)
sound = named(input_values=normal((2, 800)), labels=_classes)

LM, MASKED, PAIRS = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"
CLASSES, IMAGES, SOUNDS = (
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
)
_FOUR = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 2, 2, 2]}
_WINDOWS = {
    "omit": ["num_attention_heads", "num_hidden_layers", "hidden_size"],
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 4,
}
_PATCHES = {"image_size": 32, "patch_size": 8}
_MLA = {
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_SSM = {"state_size": 8, "time_step_rank": 4, "conv_kernel": 4}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_HYBRID = {**_DELTA, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
_GLOBAL = {
    "num_layers": 1,
    "num_decoder_layers": 1,
    "local_radius": 3,
    "global_block_size": 4,
    "encoder_attention_type": "transient-global",
}
_SPEECH = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
    "classifier_proj_size": 16,
}

DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "gpt2": {},
    "gpt_neo": {
        "num_hidden_layers": 2,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "intermediate_size": 48,
    },
    "gpt_neox": {},
    "gptj": {},
    "gpt_bigcode": {},
    "codegen": {},
    "opt": {"ffn_dim": 48},
    "bloom": {},
    "falcon": {},
    "mpt": {},
    "stablelm": {},
    "starcoder2": {},
    "olmo2": {},
    "cohere": {},
    "glm": {},
    "granite": {},
    "smollm3": {},
    "nemotron": {},
    "persimmon": {},
    "xglm": {"ffn_dim": 48, "attention_heads": 4, "num_layers": 1},
    "biogpt": {},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_hidden_layers": 2},
    "qwen2_moe": {"decoder_sparse_step": 1},
    "qwen3_moe": {"decoder_sparse_step": 1},
    "gpt_oss": {"layer_types": ["full_attention"]},
    "deepseek_v2": {**_MLA, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": {**_MLA, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
    "olmoe": {},
    "phimoe": {},
    "granitemoe": {},
    "dbrx": {
        "n_layers": 1,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "jetmoe": {"kv_channels": 8, "num_key_value_heads": 2},
    "ernie4_5_moe": {"moe_layer_start_index": 0},
    "glm4_moe": {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
    "llama4_text": {"layer_types": ["full_attention"], "intermediate_size_mlp": 48},
    "minimax": {"layer_types": ["full_attention"]},
    "hunyuan_v1_moe": {"moe_topk": 2},
}
STATES: dict[str, dict[str, Any]] = {
    "mamba": _SSM,
    "falcon_mamba": _SSM,
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "rwkv": {"num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64},
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "bamba": {**_MAMBA2, "num_hidden_layers": 2, "attn_layer_indices": [1]},
    "recurrent_gemma": {"lru_width": 32, "num_hidden_layers": 3, "attention_window_size": 8},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"max_position_embeddings": 66},
    "distilbert": {},
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_hidden_size": 32},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "mpnet": {},
    "squeezebert": dict.fromkeys(("q_groups", "k_groups", "v_groups", "intermediate_groups"), 2),
    "convbert": {"embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3},
    "nystromformer": {"num_landmarks": 12, "segment_means_seq_len": 12},
    "modernbert": {},
    "esm": {"position_embedding_type": "rotary", "mask_token_id": 4},
    "roformer": {"embedding_size": 32},
    "mobilebert": {"true_hidden_size": 16, "intra_bottleneck_size": 16, "embedding_size": 16},
    "funnel": {
        "omit": ["num_hidden_layers"],
        "block_sizes": [1, 1],
        "d_head": 8,
        "d_inner": 48,
        "n_head": 4,
        "num_decoder_layers": 1,
    },
    "layoutlm": {},
    "xlnet": {"omit": ["max_position_embeddings"], "n_head": 4, "d_head": 8, "d_inner": 48},
}
BOTH: dict[str, dict[str, Any]] = {
    "t5": {"num_layers": 1, "num_decoder_layers": 1},
    "bart": {},
    "mbart": {},
    "pegasus": {},
    "marian": {"decoder_start_token_id": 0},
    "longt5": {"num_layers": 1, "num_decoder_layers": 1, "local_radius": 3},
    "led": {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "switch_transformers": {"num_layers": 1, "num_decoder_layers": 1, "num_sparse_encoder_layers": 1},
    "m2m_100": {},
}
VISION: dict[str, dict[str, Any]] = {
    "vit": _PATCHES,
    "deit": _PATCHES,
    "beit": {**_PATCHES, "use_relative_position_bias": True, "out_indices": [0]},
    "dinov2": _PATCHES,
    "hiera": {
        "image_size": [32, 32],
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "masked_unit_size": [4, 4],
        "num_query_pool": 1,
    },
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "convnext": {"omit": ["num_hidden_layers"], "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    "convnextv2": {"omit": ["num_hidden_layers"], "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    "resnet": {"embedding_size": 16, "hidden_sizes": [32, 32], "depths": [1, 1]},
    "regnet": {"embedding_size": 16, "hidden_sizes": [32, 32], "depths": [1, 1], "groups_width": 8},
    "pvt": {"image_size": 32, **_FOUR},
    "segformer": {**_FOUR, "decoder_hidden_size": 16},
}
AUDIO: dict[str, dict[str, Any]] = {
    "wav2vec2": _SPEECH,
    "hubert": _SPEECH,
    "wavlm": {**_SPEECH, "num_buckets": 8},
    "sew": {**_SPEECH, "squeeze_factor": 1},
    "unispeech": _SPEECH,
}


def _spectrogram() -> Entry:
    more = {"num_mel_bins": 16, "max_length": 32, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
    inputs = named(input_values=normal((2, 32, 16)), labels=_classes)
    return _entry("audio-spectrogram-transformer", SOUNDS, more, inputs)


def _two_towers(kind: str, **more: Any) -> nn.Module:
    towers = {
        "text_config": small(f"{kind}_text_model").to_dict(),
        "vision_config": small(f"{kind}_vision_model", **_PATCHES).to_dict(),
    }
    config = AutoConfig.for_model(kind, **towers, **more)
    return transformers.AutoModel.from_config(config)


def _llava() -> nn.Module:
    vision, language = small("clip_vision_model", **_PATCHES, num_hidden_layers=2), small("llama", use_cache=False)
    config = AutoConfig.for_model("llava", vision_config=vision, text_config=language, image_token_id=95)
    return transformers.LlavaForConditionalGeneration(config)


def _llava_batch() -> dict[str, torch.Tensor]:
    ids = whole(95, (2, 24))()[0]
    ids[:, 2:18] = 95  # an image of 16 patches
    return {"input_ids": ids, "pixel_values": normal((2, 3, 32, 32))()[0], "labels": ids.clamp(max=94)}


_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1}


def _series_batch() -> dict[str, torch.Tensor]:
    past, time, future, after = normal((2, 10), (2, 10, 1), (2, 4), (2, 4, 1))()
    return {
        "past_values": past,
        "past_time_features": time,
        "past_observed_mask": torch.ones_like(past),
        "future_values": future,
        "future_time_features": after,
    }


_PATCHED = {"context_length": 16, "prediction_length": 4, "patch_length": 4, "patch_stride": 4, "num_input_channels": 2}
_forecast = named(past_values=normal((2, 16, 2)), future_values=normal((2, 4, 2)))

OTHERS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "clip": (
        partial(_two_towers, "clip", projection_dim=16),
        named(input_ids=_ids, pixel_values=normal((2, 3, 32, 32))),
    ),
    "siglip": (partial(_two_towers, "siglip"), named(input_ids=_ids, pixel_values=normal((2, 3, 32, 32)))),
    "llava": (_llava, _llava_batch),
    "vilt": (
        partial(build, "vilt", "ViltModel", _PATCHES),
        named(
            input_ids=_ids,
            pixel_values=normal((2, 3, 32, 32)),
            pixel_mask=lambda: (torch.ones(2, 32, 32, dtype=torch.long),),
        ),
    ),
    "whisper": (
        partial(
            build,
            "whisper",
            "WhisperForConditionalGeneration",
            {"max_source_positions": 16, "max_target_positions": 16, "num_mel_bins": 8, "decoder_start_token_id": 1},
        ),
        named(input_features=normal((2, 8, 32)), labels=whole(VOCAB, (2, 6))),
    ),
    "speech_to_text": (
        partial(
            build,
            "speech_to_text",
            "Speech2TextForConditionalGeneration",
            {
                "max_source_positions": 32,
                "max_target_positions": 16,
                "input_feat_per_channel": 8,
                "conv_channels": 16,
                "decoder_start_token_id": 1,
            },
        ),
        named(input_features=normal((2, 32, 8)), labels=whole(VOCAB, (2, 6))),
    ),
    "time_series_transformer": (
        partial(build, "time_series_transformer", "TimeSeriesTransformerForPrediction", _SERIES),
        _series_batch,
    ),
    "informer": (partial(build, "informer", "InformerForPrediction", _SERIES), _series_batch),
    "autoformer": (
        partial(build, "autoformer", "AutoformerForPrediction", {**_SERIES, "moving_average": 3, "label_length": 4}),
        _series_batch,
    ),
    "patchtst": (partial(build, "patchtst", "PatchTSTForPrediction", {**_PATCHED, "ffn_dim": 48}), _forecast),
    "patchtsmixer": (partial(build, "patchtsmixer", "PatchTSMixerForPrediction", _PATCHED), _forecast),
    "decision_transformer": (
        partial(
            build, "decision_transformer", "DecisionTransformerModel", {"state_dim": 5, "act_dim": 3, "max_ep_len": 16}
        ),
        named(
            states=normal((2, 4, 5)),
            actions=normal((2, 4, 3)),
            returns_to_go=normal((2, 4, 1)),
            timesteps=whole(16, (2, 4)),
            attention_mask=lambda: (torch.ones(2, 4, dtype=torch.long),),
        ),
    ),
}


def _entry(kind: str, head: str, more: dict[str, Any], inputs: Inputs) -> Entry:
    return Entry("transformers", kind, partial(build, kind.partition("-global")[0], head, more), inputs)


_IMAGE_HEADS = {"deit": "DeiTForImageClassification"}

ENTRIES = [
    *(_entry(kind, LM, more, text) for group in (DECODERS, EXPERTS, STATES) for kind, more in group.items()),
    *(_entry(kind, CLASSES, more, sentence) for kind, more in ENCODERS.items()),
    _entry("fnet", MASKED, {}, text),
    _entry("qwen3_next", LM, _HYBRID, one_text),
    _entry("longt5-global", PAIRS, _GLOBAL, masked_pairs),
    *(_entry(kind, PAIRS, more, pairs) for kind, more in BOTH.items()),
    *(_entry(kind, _IMAGE_HEADS.get(kind, IMAGES), more, image) for kind, more in VISION.items()),
    _entry("poolformer", IMAGES, {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1]}, image64),
    *(_entry(kind, SOUNDS, more, sound) for kind, more in AUDIO.items()),
    _spectrogram(),
    *(Entry("transformers", kind, make, inputs) for kind, (make, inputs) in OTHERS.items()),
]

transformers.utils.logging.set_verbosity_error()
