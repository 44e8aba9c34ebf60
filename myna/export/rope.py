"""Rotary positions as GGUF has them, from transformers' `rope_parameters`; what llama.cpp would turn otherwise, refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from myna.errors import ModelError
from myna.export.encoder import Floats
from myna.model.families import Family

# What transformers assumes where a yarn setting is left out, and llama.cpp always does.
_YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None}
# Kinds of layers that may turn differently, as `layer_types` names them.
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Rope:
    """A model's rotary positions. `num_dims` of each head's values are turned.

    `local_theta`: the base of the layers with a sliding window, where theirs is another.
    """

    kind: str
    theta: float
    num_dims: int
    settings: Mapping[str, Any]
    local_theta: float | None = None


def head_dim(config: Mapping[str, Any]) -> int:
    """D: values of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def read_rope(config: Mapping[str, Any], family: Family, where: str) -> Rope:
    """The rope of a config (transformers' own reading of it); ModelError for one that the architecture lacks."""
    settings = config.get("rope_parameters") or {}
    local_theta = None
    if any(isinstance(value, Mapping) for value in settings.values()):
        local_theta, settings = _by_layer(settings, family, where)
    kind = settings.get("rope_type", "default")
    part = float(settings.get("partial_rotary_factor") or 1.0)
    num_dims = int(head_dim(config) * part)
    if num_dims % 2 or (part != 1.0 and not family.partial_rotary):
        kind = f"over a part of each head ({num_dims} of {head_dim(config)} values)"
    elif kind == "yarn":
        odd = [key for key, value in _YARN_DEFAULTS.items() if settings.get(key, value) != value]
        odd += [key for key in ("mscale", "mscale_all_dim") if settings.get(key)]
        kind = f"yarn with {' and '.join(odd)}" if odd else kind
    if kind not in family.rope_types:
        raise _refused(kind, family, where)
    theta = float(settings.get("rope_theta") or 10000.0)
    if kind == "longrope":
        settings = _longrope(settings, config)
    return Rope(kind, theta, num_dims, settings, local_theta)


def _refused(kind: str, family: Family, where: str) -> ModelError:
    known = ", ".join(family.rope_types)
    return ModelError(
        f"rope {kind!r} cannot be written for {family.architecture}; known: {known}", where=where
    )


def _by_layer(
    settings: Mapping[str, Any], family: Family, where: str
) -> tuple[float | None, Mapping[str, Any]]:
    """(base of the layers with a window, settings of the others): only the latter may be scaled in llama.cpp."""
    whole, local = settings.get(_GLOBAL), settings.get(_LOCAL)
    if family.window != "layers" or not whole or not local or set(settings) - {_GLOBAL, _LOCAL}:
        raise _refused("one for each kind of layer", family, where)
    if local.get("rope_type", "default") != "default":
        raise _refused(f"{local['rope_type']} in {_LOCAL}", family, where)
    return float(local["rope_theta"]), whole


def _longrope(settings: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings with `attention_factor` and the original context filled in as `_compute_longrope_parameters` has them."""
    original = int(
        settings.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )
    factor = settings.get("factor") or config["max_position_embeddings"] / original
    attention = settings.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
    return {**settings, "attention_factor": attention, "original_max_position_embeddings": original}


def add_rope_keys(writer: Any, rope: Rope, config: Mapping[str, Any]) -> None:
    """Adds the `*.rope.*` keys to a gguf.GGUFWriter."""
    from gguf import RopeScalingType

    writer.add_rope_dimension_count(rope.num_dims)
    writer.add_rope_freq_base(rope.theta)
    if rope.local_theta is not None:
        writer.add_rope_freq_base_swa(rope.local_theta)
    if rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope.kind))
        writer.add_rope_scaling_factor(float(rope.settings["factor"]))
    original = config.get("original_max_position_embeddings")  # Phi-3's, where nothing is scaled too
    if rope.kind in ("yarn", "longrope"):
        original = rope.settings.get("original_max_position_embeddings") or config["max_position_embeddings"]
    if original:
        writer.add_rope_scaling_orig_ctx_len(int(original))
    if rope.kind == "longrope":
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_attn_factors(float(rope.settings["attention_factor"]))


def rope_tensors(rope: Rope) -> dict[str, Floats]:
    """Tensors that a rope scaling is written as, by GGUF's name: one row [1, D/2] each of factors of the wavelengths."""
    if rope.kind == "llama3":
        return {"rope_freqs.weight": llama3_factors(rope)[None]}
    if rope.kind == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.asarray([rope.settings[f"{kind}_factor"]], np.float32)
            for kind in ("long", "short")
        }
    return {}


def llama3_factors(rope: Rope) -> Floats:
    """[D/2]: what each rotary frequency is divided by, as transformers' `_compute_llama3_parameters` has
    it."""
    wavelengths = 2 * np.pi * rope.theta ** (np.arange(0, rope.num_dims, 2) / rope.num_dims)
    factor, low, high = (
        float(rope.settings[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    turns = float(rope.settings["original_max_position_embeddings"]) / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: Floats = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors
