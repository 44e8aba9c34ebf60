"""FAMILIES and PRE_TOKENIZERS: what transformers calls a thing, and what GGUF calls it. One line each.

A family is a `model_type` of transformers that llama.cpp runs too. Names, the permutation of q and k, and
which rope scalings an architecture reads follow llama.cpp's converter (`conversion/`) and its loaders
(`src/models/`). A pre-tokenizer is how text is cut before byte-level BPE; GGUF keeps its name only
(`src/llama-vocab.cpp`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from myna.errors import ModelError

# One block: the name under `model.layers.N.` and the name under `blk.N.`, in the order of the file we write.
BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
QKV_BIASES = {f"self_attn.{x}_proj.bias": f"attn_{x}.bias" for x in "qkv"}
OTHER_BIASES = {"self_attn.o_proj.bias": "attn_output.bias"} | {
    f"mlp.{x}_proj.bias": f"ffn_{x}.bias" for x in ("gate", "up", "down")
}
QK_NORMS = {f"self_attn.{x}_norm.weight": f"attn_{x}_norm.weight" for x in "qk"}
# Outside the blocks, in the order of the file. `lm_head` is not written where it is the embeddings (tied).
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# Buffers that old checkpoints carry; llama.cpp makes its own.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|\.(masked_)?attn\.bias$|\.attention\.masked_bias$")


@dataclass(frozen=True)
class Family:
    """How one `model_type` is written.

    `architecture`: GGUF's name. `tensors`: what each block must have. `optional`: what it may have.
    `permuted`: q and k rows go from transformers' halves (x0, x1…, y0, y1…) to neighbours (x0, y0, x1, y1…).
    `rope_types`: the rope scalings the architecture computes as transformers does.
    """

    architecture: str
    tensors: Mapping[str, str] = field(default_factory=lambda: BLOCK)
    optional: Mapping[str, str] = field(default_factory=dict)
    permuted: bool = False
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")


_LLAMA3 = ("default", "linear", "yarn", "llama3")

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", optional=QKV_BIASES | OTHER_BIASES, permuted=True, rope_types=_LLAMA3),
    "mistral": Family("llama", permuted=True, rope_types=_LLAMA3),
    "qwen2": Family("qwen2", BLOCK | QKV_BIASES),
    "qwen3": Family("qwen3", BLOCK | QK_NORMS),
}


def family_of(config: Mapping[str, Any], where: str | None = None) -> Family:
    """The line of FAMILIES for a `config.json`; ModelError naming the known ones where there is none."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(
            f"models of type {model_type!r} cannot be written as GGUF; these can: {', '.join(FAMILIES)}",
            where=where,
            help="take a base model of one of these types",
        )
    return FAMILIES[model_type]


def gguf_name(family: Family, name: str) -> str | None:
    """GGUF's name for one of transformers' (`model.layers.3.mlp.up_proj.weight`); None where it has none."""
    if name in TOP:
        return TOP[name]
    parts = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    inner = parts and (family.tensors.get(parts[2]) or family.optional.get(parts[2]))
    return f"blk.{parts[1]}.{inner}" if parts and inner else None


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
