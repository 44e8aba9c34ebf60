"""The tokenizer inside a .gguf file as a Hugging Face folder: tokenizer.json, tokenizer_config.json, chat template.

Built from the file's `tokenizer.*` keys to cut text as llama.cpp does with the same keys (`src/llama-vocab.cpp`);
transformers' own reading gives every file of an architecture the same treatment of spaces and digits.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from myna.errors import ModelError
from myna.model.pre_tokenizers import PRE_TOKENIZERS, known_name, pre_tokenizer_json

# Ours: these steps as JSON, where the standard keys say less than a tokenizer.json.
KEPT_KEY = "myna.tokenizer.%s"
KEPT_STEPS = ("normalizer", "pre_tokenizer", "decoder")
# llama.cpp strips white space behind all special tokens but these in a model of such a name.
STRIPS_BY_NAME = re.compile("(?i)phi-?3")
RSTRIP_EXCEPT = frozenset({"<unk>", "<s>", "<|endoftext|>"})

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_SPACE = "▁"
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def write_gguf_tokenizer(gguf_path: Path, folder: Path) -> None:
    """Writes the tokenizer inside a .gguf file into `folder`, with its chat template.

    Raises ModelError for a file that has none, and for a kind of tokenizer or a `tokenizer.ggml.pre` not known here.
    """
    where = str(gguf_path)
    try:
        keys = _read_keys(gguf_path)
        value = _tokenizer_json(keys, where)
        settings = _settings(keys)
    except (ValueError, TypeError, KeyError, OSError, IndexError, AttributeError, struct.error) as error:
        # whatever a broken header makes of itself: the keys of a file are anything
        raise ModelError(f"its tokenizer cannot be read: {error}", where=where) from error
    _check(value, where)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8"
    )
    template = keys.get("tokenizer.chat_template")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _read_keys(gguf_path: Path) -> dict[str, Any]:
    """`general.name` and everything under `tokenizer.` and `myna.`."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf_path).fields
    wanted = ("general.name", "tokenizer.", "myna.tokenizer.")
    return {name: field.contents() for name, field in fields.items() if name.startswith(wanted)}


def _tokenizer_json(keys: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = keys.get("tokenizer.ggml.model")
    texts = keys.get("tokenizer.ggml.tokens")
    if not isinstance(texts, list) or not texts:
        raise ModelError("there is no tokenizer in this file", where=where)
    types = keys.get("tokenizer.ggml.token_type") or [1] * len(texts)
    tokens = [text or f"[EMPTY_{index}]" for index, text in enumerate(texts)]
    if kind == "llama":
        model = _sentencepiece_model(keys, tokens, types)
        steps = _sentencepiece_steps(keys)
    elif kind == "gpt2":
        pre = _pre(keys, where)
        model = _byte_level_model(keys, tokens, pre)
        steps = {"normalizer": None, "pre_tokenizer": pre_tokenizer_json(pre), "decoder": _BYTE_LEVEL}
    else:
        raise ModelError(
            f"its tokenizer is of kind {kind!r}; read are llama (SentencePiece) and gpt2 (byte-level BPE)",
            where=where,
        )
    for name in KEPT_STEPS:
        if KEPT_KEY % name in keys:
            steps[name] = json.loads(keys[KEPT_KEY % name])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(keys, tokens, types),
        **steps,
        "post_processor": _ends(keys, tokens, kind),
        "model": model,
    }


def _sentencepiece_model(
    keys: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> dict[str, Any]:
    vocab = {text: index for index, text in enumerate(tokens)}
    scores = keys.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    matched = {
        text for text, kind in zip(tokens, types, strict=True) if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    }
    merges = []
    for text, index in vocab.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab and not matched & {left, right, text}:
                merges.append((-scores[index], index, cut, left, right))
    merges.sort()
    unknown = keys.get("tokenizer.ggml.unknown_token_id", 0)
    return {
        "type": "BPE",
        "unk_token": tokens[unknown] if unknown < len(tokens) else None,
        "fuse_unk": True,
        "byte_fallback": _BYTE in types,
        "vocab": vocab,
        "merges": [[left, right] for *_, left, right in merges],
    }


def _sentencepiece_steps(keys: Mapping[str, Any]) -> dict[str, Any]:
    has_prefix = bool(keys.get("tokenizer.ggml.add_space_prefix", True))
    replace = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]} if has_prefix else _REPLACE,
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
    }


def _pre(keys: Mapping[str, Any], where: str) -> str:
    named = keys.get("tokenizer.ggml.pre")
    pre = known_name(str(named))
    if pre is None:
        raise ModelError(
            f"text is cut by {named!r} before merging (tokenizer.ggml.pre), which is not known here; "
            f"known are {', '.join(PRE_TOKENIZERS)}",
            where=where,
        )
    return pre


def _byte_level_model(keys: Mapping[str, Any], tokens: Sequence[str], pre: str) -> dict[str, Any]:
    merges = [line.split(" ") for line in keys.get("tokenizer.ggml.merges") or ()]
    return {
        "type": "BPE",
        "ignore_merges": PRE_TOKENIZERS[pre].ignores_merges,
        "vocab": {text: index for index, text in enumerate(tokens)},
        "merges": merges,
    }


def _added_tokens(
    keys: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> list[dict[str, Any]]:
    strips = bool(STRIPS_BY_NAME.search(str(keys.get("general.name"))))
    return [
        {
            "id": index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": strips and text not in RSTRIP_EXCEPT,
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for index, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]


def _special_token(keys: Mapping[str, Any], kind: str) -> str | None:
    index = keys.get(f"tokenizer.ggml.{_SPECIAL[kind]}_token_id")
    return None if index is None else keys["tokenizer.ggml.tokens"][index]


def _ends(keys: Mapping[str, Any], tokens: Sequence[str], kind: str) -> dict[str, Any] | None:
    pre = PRE_TOKENIZERS.get(known_name(str(keys.get("tokenizer.ggml.pre"))) or "")
    adds_bos = keys.get("tokenizer.ggml.add_bos_token", kind == "llama" or bool(pre and pre.adds_bos))
    pieces: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    named = {}
    for side, is_added in (("bos", adds_bos), ("eos", keys.get("tokenizer.ggml.add_eos_token", False))):
        text = _special_token(keys, side)
        if is_added and text is not None:
            special = {"SpecialToken": {"id": text, "type_id": 0}}
            pieces = [special, *pieces] if side == "bos" else [*pieces, special]
            named[text] = {"id": text, "ids": [tokens.index(text)], "tokens": [text]}
    if not named:
        return None
    pair = [*pieces, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": pieces, "pair": pair, "special_tokens": named}


def _settings(keys: Mapping[str, Any]) -> dict[str, Any]:
    named = {f"{kind}_token": _special_token(keys, kind) for kind in _SPECIAL}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: text for name, text in named.items() if text is not None},
    }


def _check(value: Mapping[str, Any], where: str) -> None:
    """ModelError where `tokenizers` would not take it: a merge of what is no token, a pattern that is none."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(json.dumps(value))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelError(f"its tokenizer cannot be read: {error}", where=where) from error
