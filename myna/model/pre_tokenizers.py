"""PRE_TOKENIZERS: how text is cut before byte-level BPE, by the name that GGUF keeps of it. One line each.

GGUF has the name only (`src/llama-vocab.cpp`); a tokenizer.json has the thing itself, and ours is decided from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PreTokenizer:
    """The `pre_tokenizer` of a tokenizer.json; `ignores_merges`: a piece that is a token is taken whole."""

    value: Mapping[str, Any]
    ignores_merges: bool = False


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, _bytes(use_regex=False)]}


# The two patterns differ in how many digits go together: up to three, or one.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = {"type": "Digits", "individual_digits": True}

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "smollm": PreTokenizer({"type": "Sequence", "pretokenizers": [_DIGITS, _bytes(use_regex=True)]}),
    "gpt-2": PreTokenizer(_bytes(use_regex=True)),
    "llama-bpe": PreTokenizer(_split(_PATTERN % "{1,3}"), ignores_merges=True),
    "smaug-bpe": PreTokenizer(_split(_PATTERN % "{1,3}")),
    "qwen2": PreTokenizer(_split(_PATTERN % "")),
}


def pre_tokenizer_name(value: object, ignores_merges: bool = False) -> str | None:
    """The name GGUF has for a `pre_tokenizer` value; None for one that is not in PRE_TOKENIZERS."""
    wanted = _essence(value)
    for name, known in PRE_TOKENIZERS.items():
        if _essence(known.value) == wanted and known.ignores_merges == ignores_merges:
            return name
    return None


def pre_tokenizer_json(pre: str) -> dict[str, Any] | None:
    """The other way: the `pre_tokenizer` for a GGUF's `tokenizer.ggml.pre`; None for an unknown one."""
    known = PRE_TOKENIZERS.get(pre)
    return dict(known.value) if known else None


def _essence(value: object) -> object:
    """The value without what changes no token: offsets, defaults left out, a sequence of one."""
    if not isinstance(value, Mapping):
        return value
    if value.get("type") == "Sequence":
        steps = [_essence(step) for step in value.get("pretokenizers", ())]
        return steps[0] if len(steps) == 1 else steps
    kept = {key: inner for key, inner in value.items() if key != "trim_offsets"}
    if kept.get("type") == "ByteLevel":
        kept.setdefault("use_regex", True)
    return kept
