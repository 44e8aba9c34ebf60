"""PRE_TOKENIZERS: how text is cut before byte-level BPE, by the name that GGUF keeps of it. One line each.

GGUF has the name only (`src/llama-vocab.cpp`); a tokenizer.json has the thing itself, and ours is decided from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PreTokenizer:
    """The `pre_tokenizer` of a tokenizer.json.

    `ignores_merges`: a piece that is a token is taken whole. `adds_bos`: what llama.cpp does where a file does not say.
    `unlike`: why llama.cpp cuts otherwise under this name, so that it is read from a file but not written into one.
    """

    value: Mapping[str, Any]
    ignores_merges: bool = False
    adds_bos: bool = False
    unlike: str = ""


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(*patterns: str, digits: bool = False) -> dict[str, Any]:
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return {
        "type": "Sequence",
        "pretokenizers": [*cuts, *([_DIGITS] if digits else []), _bytes(use_regex=False)],
    }


_DIGITS = {"type": "Digits", "individual_digits": True}
# The patterns differ in how many digits go together (up to three, or one) and in what else is a word.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MARKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CODE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}"
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# Capitals begin a word: %s is what may follow a word, and how many digits go together.
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FALCON = [
    {"type": "Punctuation", "behavior": "Contiguous"},
    _bytes(use_regex=True),
    {"type": "Digits", "individual_digits": False},
    {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": False},
]
_NO_MARKS = "llama.cpp cuts at combining marks under this name, and so Hindi, Thai or Arabic otherwise"
_NO_SPACES = (
    "llama.cpp knows ASCII's spaces only under this name, and cuts at those of Chinese or Japanese otherwise"
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "smollm": PreTokenizer({"type": "Sequence", "pretokenizers": [_DIGITS, _bytes(use_regex=True)]}),
    "gpt-2": PreTokenizer(_bytes(use_regex=True)),
    "llama-bpe": PreTokenizer(_split(_PATTERN % "{1,3}"), ignores_merges=True, adds_bos=True),
    "smaug-bpe": PreTokenizer(_split(_PATTERN % "{1,3}")),
    "qwen2": PreTokenizer(_split(_PATTERN % "")),
    "qwen35": PreTokenizer(_split(_MARKS)),
    "falcon": PreTokenizer({"type": "Sequence", "pretokenizers": _FALCON}),
    "deepseek-coder": PreTokenizer(
        _split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", digits=True), unlike=_NO_SPACES
    ),
    "deepseek-v3": PreTokenizer(_split(r"\p{N}{1,3}", _CJK, _DEEPSEEK3)),
    "seed-coder": PreTokenizer(_split(_CODE)),
    "tekken": PreTokenizer(
        _split(_CASED % ("", "", "")), ignores_merges=True, adds_bos=True, unlike=_NO_MARKS
    ),
    "gpt-4o": PreTokenizer(_split(_CASED % (_SHORT, _SHORT, "{1,3}")), unlike=_NO_MARKS),
}

# Other names under which llama.cpp does the same.
ALIASES: dict[str, tuple[str, ...]] = {
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "exaone4", "gigachat", "mellum", "trillion", "granite-docling"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "smaug-bpe": ("dbrx", "glm4", "chatglm-bpe"),
    "qwen2": ("deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "kormo", "f2llmv2"),
    "deepseek-v3": ("hunyuan-dense",),
    "gpt-4o": ("llama4", "kanana2"),
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


def known_name(pre: str) -> str | None:
    """The name in PRE_TOKENIZERS for a GGUF's `tokenizer.ggml.pre`; None for an unknown one."""
    if pre in PRE_TOKENIZERS:
        return pre
    return next((name for name, others in ALIASES.items() if pre in others), None)


def _essence(value: object) -> object:
    """The value without what changes no token: offsets, defaults left out, a sequence of one."""
    if not isinstance(value, Mapping):
        return value
    if value.get("type") == "Sequence":
        steps = [_essence(step) for step in value.get("pretokenizers", ())]
        cuts = [step for step in steps if isinstance(step, dict) and step["type"] == "Split"]
        if len(cuts) == 1 and (cuts[0]["behavior"], cuts[0]["invert"]) == ("Removed", True):
            # All but the matches removed: where everything matches, as in all patterns here, the matches isolated.
            cuts[0] |= {"behavior": "Isolated", "invert": False}
        return steps[0] if len(steps) == 1 else steps
    kept = {key: inner for key, inner in value.items() if key != "trim_offsets"}
    if kept.get("type") == "ByteLevel":
        kept.setdefault("use_regex", True)
    return kept
