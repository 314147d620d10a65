"""A tokenizer as llama.cpp reads it: byte-level BPE, which it calls "gpt2".

Without one, a vocabulary stands in that has the right length and no text: the model then runs on token ids alone.
"""

from __future__ import annotations

import json
from typing import Any

import gguf

from lotion_fx.deploy.content import Content

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PRE_TOKENIZERS = {
    rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
}
"""The expressions that split text, and what llama.cpp calls them."""


def tell(writer: gguf.GGUFWriter, content: Content, pre_tokenizer: str | None) -> None:
    """Writes the tokenizer of a model, or what stands in for it.

    Raises:
        ValueError: llama.cpp has no tokenizer of this kind under that name.
    """
    size = int(content.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    if content.tokenizer is None:
        _stand_in(writer, content, size)
        return
    backend = getattr(content.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"tokenizer={type(content.tokenizer).__name__}: layout='gguf' takes fast tokenizers, byte-level BPE alone"
        )
    told = json.loads(backend.to_str())
    model = told["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or not _byte_level(told["pre_tokenizer"]):
        raise ValueError(
            f"tokenizer={type(content.tokenizer).__name__}: layout='gguf' writes byte-level BPE, and this is "
            f"{model['type']}; leave it out and give llama.cpp token ids"
        )
    added = {each["id"]: each for each in told["added_tokens"]}
    tokens = {number: token for token, number in model["vocab"].items()} | {n: e["content"] for n, e in added.items()}
    if max(tokens) >= size:
        raise ValueError(f"tokenizer: it has token {max(tokens)}, and the model a vocabulary of {size}")
    types = [_type(number in tokens, added.get(number)) for number in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer or _pre(told["pre_tokenizer"]))
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(content.tokenizer, f"{kind}_token_id", None)
        if number is not None:
            writer.add_key_value(f"tokenizer.ggml.{_NAMES[kind]}_token_id", int(number), gguf.GGUFValueType.UINT32)
    writer.add_add_bos_token(bool(getattr(content.tokenizer, "add_bos_token", False)))
    if getattr(content.tokenizer, "chat_template", None):
        writer.add_chat_template(content.tokenizer.chat_template)


_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _type(known: bool, added: dict[str, Any] | None) -> int:
    if not known:
        return int(gguf.TokenType.UNUSED)
    if added is None:
        return int(gguf.TokenType.NORMAL)
    return int(gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED)


def _steps(pre: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]


def _byte_level(pre: dict[str, Any] | None) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(pre))


def _pre(pre: dict[str, Any]) -> str:
    splits = [step["pattern"].get("Regex") for step in _steps(pre) if step["type"] == "Split"]
    if not splits and all(step.get("use_regex", True) for step in _steps(pre)):
        return "gpt-2"
    if len(splits) == 1 and splits[0] in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[splits[0]]
    raise ValueError(
        f"tokenizer: it splits text by {splits}, for which no name of llama.cpp's is known here; pass pre_tokenizer=, "
        "such as 'llama-bpe', or leave the tokenizer out"
    )


def _stand_in(writer: gguf.GGUFWriter, content: Content, size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{number}>" for number in range(size)])
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * size)
    writer.add_token_merges(["< 0"])
    config: Any = content.model.config
    for add, number in ((writer.add_bos_token_id, config.bos_token_id), (writer.add_eos_token_id, config.eos_token_id)):
        first = number[0] if isinstance(number, (list, tuple)) else number
        add(int(first) if first is not None and first < size else 0)
    writer.add_add_bos_token(False)
