"""FAMILIES: what transformers calls a model's tensors, and what GGUF calls them. One line each.

A family is a `model_type` of transformers that llama.cpp runs too. Names, the permutation of q and k, and
which rope scalings an architecture reads follow llama.cpp's converter (`conversion/`) and its loaders
(`src/models/`).
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
