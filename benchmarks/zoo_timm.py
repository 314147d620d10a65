"""Models of the `timm` library: the smallest of each family, or one scaled down by its arguments; weights random."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm import layers
from timm.models import convmixer, focalnet, metaformer, mlp_mixer
from torch import nn
from zoo_entry import Entry, normal

_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
_SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}

# By name: (pixels on a side, arguments).
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    # convolutions
    "resnet10t": (32, {}),
    "resnetv2_18": (32, {}),
    "seresnet18": (32, {}),
    "res2net50_14w_8s": (32, {}),
    "regnetx_002": (32, {}),
    "convnext_atto": (32, {"depths": (1, 1, 1, 1), "dims": (16, 32, 32, 48)}),
    "convnextv2_atto": (32, {"depths": (1, 1, 1, 1), "dims": (16, 32, 32, 48)}),
    "tinynet_e": (32, {}),
    "mobilenetv2_035": (32, {}),
    "mobilenetv3_small_050": (32, {}),
    "lcnet_035": (32, {}),
    "ghostnet_050": (32, {}),
    "densenet121": (32, {"block_config": (2, 2, 2, 2), "growth_rate": 8}),
    "inception_next_atto": (64, {}),
    "nf_regnet_b0": (32, {}),
    "repvgg_a0": (32, {}),
    "repvit_m0_9": (32, {}),
    "hgnetv2_b0": (32, {}),
    "dla46_c": (32, {}),
    "rexnetr_100": (32, {"width_mult": 0.3}),
    "starnet_s050": (32, {}),
    "fasternet_t0": (32, {}),
    "mambaout_femto": (32, {"depths": (1, 1, 1, 1), "dims": (16, 32, 32, 48)}),
    # transformers
    "vit_tiny_patch16_224": (32, _VIT),
    "vit_relpos_small_patch16_224": (32, _VIT),
    "deit_tiny_distilled_patch16_224": (32, _VIT),
    "eva02_tiny_patch14_224": (32, _VIT),
    "beit_base_patch16_224": (32, _VIT),
    "cait_xxs24_224": (32, _VIT),
    "xcit_nano_12_p16_224": (32, _VIT),
    "swin_tiny_patch4_window7_224": (32, _SWIN),
    "swinv2_tiny_window8_256": (32, _SWIN),
    "pvt_v2_b0": (32, {}),
    "twins_svt_small": (32, {"embed_dims": (16, 16, 32, 32), "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)}),
    # both
    "levit_128s": (64, {"img_size": 64, "embed_dim": (32, 48, 64), "depth": (1, 1, 1), "num_heads": (2, 2, 2)}),
    "coat_tiny": (32, {"img_size": 32}),
    "convit_tiny": (
        32,
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 3, "local_up_to_layer": 2},
    ),
    "mobilevit_xxs": (64, {}),
    "edgenext_xx_small": (64, {}),
    "fastvit_t8": (64, {}),
    "efficientvit_b0": (64, {}),
    "tiny_vit_5m_224": (64, {"embed_dims": (16, 32, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}),
    "maxvit_rmlp_pico_rw_256": (64, {"img_size": 64}),
    "davit_tiny": (32, {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2)}),
    "sequencer2d_s": (
        32,
        {"img_size": 32, "layers": (1, 1, 1, 1), "embed_dims": (32, 32, 32, 32), "hidden_sizes": (8, 8, 8, 8)},
    ),
}

_FOUR = {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}
_MIXER = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 2}

# Whose functions take no sizes: by class.
CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixer": (mlp_mixer.MlpMixer, _MIXER),
    "resmlp": (
        mlp_mixer.MlpMixer,
        {**_MIXER, "mlp_ratio": 4, "block_layer": mlp_mixer.ResBlock, "norm_layer": mlp_mixer.Affine},
    ),
    "gmlp": (
        mlp_mixer.MlpMixer,
        {**_MIXER, "mlp_ratio": 4, "block_layer": mlp_mixer.SpatialGatingBlock, "mlp_layer": layers.GatedMlp},
    ),
    "convmixer": (convmixer.ConvMixer, {"dim": 32, "depth": 2, "patch_size": 4}),
    "poolformer": (metaformer.MetaFormer, {**_FOUR, "token_mixers": metaformer.Pooling}),
    "caformer": (
        metaformer.MetaFormer,
        {
            **_FOUR,
            "token_mixers": [metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
            "norm_layers": [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
        },
    ),
    "focalnet": (
        focalnet.FocalNet,
        {"depths": (1, 1), "embed_dim": 16, "focal_levels": (2, 2), "focal_windows": (3, 3)},
    ),
}

_OFF = {"num_classes": 10}


def _made(make: Callable[..., nn.Module], **arguments: Any) -> nn.Module:
    """A model whose head is not zero, as some are made: nothing would reach the output."""
    model = make(**arguments)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


ENTRIES = [
    Entry(
        "timm",
        name,
        partial(_made, partial(timm.create_model, name), pretrained=False, **{**_OFF, **more}),
        normal((2, 3, pixels, pixels)),
    )
    for name, (pixels, more) in MODELS.items()
] + [
    Entry("timm", name, partial(_made, make, **{**_OFF, **more}), normal((2, 3, 32, 32)))
    for name, (make, more) in CLASSES.items()
]
