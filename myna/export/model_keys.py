"""The keys of a GGUF file that say what the model is: sizes, rope, windows; and what llama.cpp could not run, refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from myna.errors import ModelError
from myna.export.encoder import Floats
from myna.model.families import Family

# What transformers assumes where a yarn setting is left out, and llama.cpp always does.
_YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None}
_NEEDED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "rms_norm_eps", "vocab_size"),
)


@dataclass(frozen=True)
class Rope:
    """A model's rotary positions: transformers' `rope_parameters`, older spellings resolved."""

    kind: str
    theta: float
    settings: Mapping[str, Any]


def read_rope(config: Mapping[str, Any], family: Family, where: str) -> Rope:
    """The rope of a config; ModelError naming a scaling that the family's architecture in llama.cpp lacks."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = settings.get("rope_type", settings.get("type", "default"))
    if any(isinstance(value, Mapping) for value in settings.values()):
        kind = "one for each kind of layer"
    elif settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        kind = "over a part of each head"
    elif kind == "yarn":
        odd = [key for key, value in _YARN_DEFAULTS.items() if settings.get(key, value) != value]
        odd += [key for key in ("mscale", "mscale_all_dim") if settings.get(key)]
        kind = f"yarn with {' and '.join(odd)}" if odd else kind
    if kind not in family.rope_types:
        known = ", ".join(family.rope_types)
        raise ModelError(
            f"rope {kind!r} cannot be written for {family.architecture}; known: {known}", where=where
        )
    return Rope(kind, float(settings.get("rope_theta", config.get("rope_theta", 10000.0))), settings)


def llama3_factors(rope: Rope, num_dims: int) -> Floats:
    """[D/2]: what each rotary frequency is divided by, as transformers' `_compute_llama3_parameters` has
    it."""
    wavelengths = 2 * np.pi * rope.theta ** (np.arange(0, num_dims, 2) / num_dims)
    factor, low, high = (
        float(rope.settings[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    turns = float(rope.settings["original_max_position_embeddings"]) / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: Floats = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors


def head_dim(config: Mapping[str, Any]) -> int:
    """D: values of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def check_config(config: Mapping[str, Any], where: str) -> None:
    """ModelError where a config lacks a size or asks for what these architectures of llama.cpp do not do."""
    missing = [key for key in _NEEDED if config.get(key) is None]
    if missing:
        raise ModelError(f"the config has no {', '.join(missing)}", where=where)
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(
            f"hidden_act {activation!r}: llama.cpp runs these families with silu only", where=where
        )


def add_model_keys(
    writer: Any, config: Mapping[str, Any], rope: Rope, name: str, num_parameters: int
) -> None:
    from gguf import GGML_QUANT_VERSION, RopeScalingType, size_label

    num_heads = int(config["num_attention_heads"])
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(size_label(num_parameters, 0, 0, 0))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or num_heads))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(rope.theta)
    # Not only where it differs from hidden_size / heads, so that a reader need not know the family's own default.
    if config.get("head_dim") is not None:
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
    if rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope.kind))
        writer.add_rope_scaling_factor(float(rope.settings["factor"]))
    if rope.kind == "yarn":
        original = rope.settings.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(int(original))


def _context_length(config: Mapping[str, Any]) -> int:
    """Tokens the file is good for: with a sliding window, as many as it spans.

    In these architectures llama.cpp looks back over all tokens, which is the same only up to there.
    """
    window = config.get("sliding_window")
    windowed = config.get("use_sliding_window", config["model_type"] == "mistral")
    return min(int(config["max_position_embeddings"]), int(window) if window and windowed else 1 << 31)
