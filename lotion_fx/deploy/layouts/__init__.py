"""The layouts of exported models, each in a file: what it writes, what it refuses, and how its client reads it back."""

from __future__ import annotations

from importlib import import_module

from lotion_fx.deploy.layout import Layout

LAYOUTS = {
    "lotion": "lotion_fx.deploy.layouts.lotion:Lotion",
    "compressed-tensors": "lotion_fx.deploy.layouts.compressed_tensors:CompressedTensors",
    "bitsandbytes": "lotion_fx.deploy.layouts.bitsandbytes:BitsAndBytes",
    "modelopt": "lotion_fx.deploy.layouts.modelopt:ModelOpt",
    "torchao": "lotion_fx.deploy.layouts.torchao:TorchAO",
    "gguf": "lotion_fx.deploy.layouts.gguf:Gguf",
    "onnx": "lotion_fx.deploy.layouts.onnx:Onnx",
    "aoti": "lotion_fx.deploy.layouts.aoti:Aoti",
}
"""Where each is: imported when asked for, for each stands on libraries of its own."""


def layout_of(name: object) -> Layout:
    """The layout of this name.

    Raises:
        ValueError: there is none.
        ModuleNotFoundError: a library that it stands on is missing.
    """
    if not isinstance(name, str) or name not in LAYOUTS:
        raise ValueError(f"layout={name!r}: expected one of {', '.join(LAYOUTS)}")
    module, _, attribute = LAYOUTS[name].partition(":")
    layout: Layout = getattr(import_module(module), attribute)()
    layout.check_packages()
    return layout
