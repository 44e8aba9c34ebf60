"""FAMILIES: what transformers calls a model's tensors, and what GGUF calls them. One line each.

A family is a `model_type` of transformers that llama.cpp runs too. Names, the order of rows, which settings and
which rope scalings an architecture computes follow llama.cpp's converter (`conversion/`) and its loaders (`src/models/`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from myna.errors import ModelError


def _both(theirs: str, ours: str) -> dict[str, str]:
    """A weight and its bias."""
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}


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
# Gemma 2 and 3 have four norms a block, and what the others call ffn_norm is the second of them here.
FOUR_NORMS = BLOCK | {
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
}
# q, k and v in one tensor, gate and up in another.
PHI3 = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.qkv_proj.weight": "attn_qkv.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
FALCON = {
    "self_attention.query_key_value.weight": "attn_qkv.weight",
    "self_attention.dense.weight": "attn_output.weight",
    "mlp.dense_h_to_4h.weight": "ffn_up.weight",
    "mlp.dense_4h_to_h.weight": "ffn_down.weight",
}
ONE_NORM = _both("input_layernorm", "attn_norm")
TWO_NORMS = _both("ln_mlp", "attn_norm") | _both("ln_attn", "attn_norm_2")
GPT_NEOX = {
    **_both("input_layernorm", "attn_norm"),
    **_both("attention.query_key_value", "attn_qkv"),
    **_both("attention.dense", "attn_output"),
    **_both("post_attention_layernorm", "ffn_norm"),
    **_both("mlp.dense_h_to_4h", "ffn_up"),
    **_both("mlp.dense_4h_to_h", "ffn_down"),
}
# Outside the blocks: embeddings first, then norms; heads are apart, since a tied one is written as the embeddings or not.
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
FALCON_TOP = {
    "transformer.word_embeddings.weight": "token_embd.weight",
    **_both("transformer.ln_f", "output_norm"),
}
GPT_NEOX_TOP = {
    "gpt_neox.embed_in.weight": "token_embd.weight",
    **_both("gpt_neox.final_layer_norm", "output_norm"),
}
HEADS = ("lm_head.weight", "embed_out.weight")
# Buffers that old checkpoints carry; llama.cpp makes its own.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|\.(masked_)?(attn|attention)\.(masked_)?bias$")


_SILU: Mapping[str, tuple[object, ...]] = {"hidden_act": ("silu", "swish")}


@dataclass(frozen=True)
class Family:
    """How one `model_type` is written.

    architecture    GGUF's name
    tensors         what each block must have; `optional`: what it may have; `choices`: sets of which it has one
    layers, top     what stands before a block's names, and what is outside the blocks
    head            whether llama.cpp takes the embeddings where no head is written (optional), wants it written
                    (needed), or knows no head but the embeddings (tied)
    row_order       how rows of q and k, or of a fused qkv, are turned: `turned` in export/gguf.py
    norm            root mean square, or LayerNorm; `norm_offset` is added to each norm's weight, since the family's
                    own code adds it while it runs
    rope_types      the rope scalings that are computed as in transformers; `partial_rotary`: also over a part of a head
    window          a sliding window is written for the layers that have one (layers); or it ends the file's context
                    (context), since llama.cpp looks back over all tokens, which is the same only up to there
    spelling        its names for settings that have others elsewhere
    only            settings and the values of them that llama.cpp computes
    """

    architecture: str
    tensors: Mapping[str, str] = field(default_factory=lambda: BLOCK)
    optional: Mapping[str, str] = field(default_factory=dict)
    choices: tuple[Mapping[str, str], ...] = ()
    layers: str = "model.layers."
    top: Mapping[str, str] = field(default_factory=lambda: TOP)
    head: Literal["optional", "needed", "tied"] = "optional"
    row_order: Literal["", "neighbours", "grouped"] = ""
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    partial_rotary: bool = False
    window: Literal["", "context", "layers"] = ""
    spelling: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, tuple[object, ...]] = field(default_factory=lambda: _SILU)

    def setting(self, config: Mapping[str, Any], name: str) -> Any:
        """A setting of a config by the name that most families use; None where it has none."""
        return config.get(self.spelling.get(name, name))


_LLAMA3 = ("default", "linear", "yarn", "llama3")
_NO = (False, None)
_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
# Falcon and GPT-NeoX were trained with the exact GELU; llama.cpp computes the one by tanh, at most 5e-4 away from it.
_GELU = ("gelu", *_TANH)
_GEMMA = {"hidden_activation": _TANH, "use_bidirectional_attention": _NO}
_LAYER_NORM_EPS = "layer_norm_epsilon"

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", optional=QKV_BIASES | OTHER_BIASES, row_order="neighbours", rope_types=_LLAMA3),
    "mistral": Family("llama", row_order="neighbours", rope_types=_LLAMA3, window="context"),
    "qwen2": Family("qwen2", BLOCK | QKV_BIASES, window="context"),
    "qwen3": Family("qwen3", BLOCK | QK_NORMS, window="context"),
    "gemma": Family(
        *("gemma", BLOCK),
        head="tied",
        norm_offset=1.0,
        only={"hidden_act": _TANH, "use_bidirectional_attention": _NO},
    ),
    "gemma2": Family("gemma2", FOUR_NORMS, head="tied", norm_offset=1.0, window="layers", only=_GEMMA),
    "gemma3_text": Family(
        *("gemma3", FOUR_NORMS | QK_NORMS),
        norm_offset=1.0,
        rope_types=("default", "linear"),
        window="layers",
        only=_GEMMA | {"attn_logit_softcapping": (None,)},
    ),
    "phi3": Family("phi3", PHI3, rope_types=("default", "longrope"), partial_rotary=True, window="context"),
    "falcon": Family(
        *("falcon", FALCON),
        choices=(ONE_NORM, TWO_NORMS),
        layers="transformer.h.",
        top=FALCON_TOP,
        row_order="grouped",
        norm="layer",
        spelling={
            "intermediate_size": "ffn_hidden_size",
            "layer_norm_eps": _LAYER_NORM_EPS,
            "num_key_value_heads": "num_kv_heads",
        },
        only={"activation": _GELU, "alibi": _NO, "bias": _NO},
    ),
    "gpt_neox": Family(
        *("gptneox", GPT_NEOX),
        layers="gpt_neox.layers.",
        top=GPT_NEOX_TOP,
        head="needed",
        row_order="grouped",
        norm="layer",
        partial_rotary=True,
        spelling={"num_key_value_heads": "num_attention_heads"},
        only={"hidden_act": _GELU},
    ),
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


def block_tensors(family: Family, config: Mapping[str, Any]) -> Mapping[str, str]:
    """What each block of this model must have: `tensors`, and of Falcon's norms one or both, as its config has it."""
    if not family.choices:
        return family.tensors
    grouped = config.get("new_decoder_architecture")
    two = bool(grouped) and (config.get("num_ln_in_parallel_attn") or 2) == 2
    return {**family.tensors, **family.choices[two]}


def num_kv_heads(family: Family, config: Mapping[str, Any]) -> int:
    """Heads of k and v: one for all of q in Falcon's first generation, whatever its config says of them."""
    if family.architecture == "falcon" and not config.get("new_decoder_architecture"):
        return 1 if config.get("multi_query", True) else int(config["num_attention_heads"])
    return int(family.setting(config, "num_key_value_heads") or config["num_attention_heads"])


def gguf_name(family: Family, name: str) -> str | None:
    """GGUF's name for one of transformers' (`model.layers.3.mlp.up_proj.weight`); None where it has none."""
    if name in HEADS:
        return "output.weight"
    if name in family.top:
        return family.top[name]
    parts = re.fullmatch(re.escape(family.layers) + r"(\d+)\.(.+)", name)
    if parts is None:
        return None
    for tensors in (family.tensors, family.optional, *family.choices):
        if parts[2] in tensors:
            return f"blk.{parts[1]}.{tensors[parts[2]]}"
    return None
