"""The keys of a GGUF file that say what the model is: sizes, windows, caps; and what llama.cpp could not run, refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from myna.errors import ModelError
from myna.export.rope import Rope, add_rope_keys, head_dim
from myna.model.families import Family, family_of, num_kv_heads
from myna.run import read_json

_NEEDED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "vocab_size"),
)
_EPSILON = {"rms": "rms_norm_eps", "layer": "layer_norm_eps"}
# Layers in a row of which the last one looks back over all tokens: what llama.cpp takes where a file does not say.
_WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6}
# Models of these numbers of layers (the largest of their family) scale attention by hidden_size / heads in llama.cpp.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


def read_model_config(model_dir: Path) -> tuple[Family, dict[str, Any]]:
    """(family, config.json as transformers reads it: defaults filled in, older spellings resolved).

    ModelError for a family, a size or a setting that llama.cpp does not run as transformers does.
    """
    from myna.model.load import read_config

    where = str(model_dir / "config.json")
    family = family_of(read_json(model_dir / "config.json"), where)
    config: dict[str, Any] = read_config(model_dir).to_dict()
    check_config(config, family, where)
    return family, config


def check_config(config: Mapping[str, Any], family: Family, where: str) -> None:
    """ModelError where a config lacks a size or asks for what its architecture in llama.cpp does not do."""
    needed = (*_NEEDED, _EPSILON[family.norm])
    missing = [family.spelling.get(key, key) for key in needed if family.setting(config, key) is None]
    if missing:
        raise ModelError(f"the config has no {', '.join(missing)}", where=where)
    for key, values in family.only.items():
        if config.get(key) not in values:
            known = ", ".join(str(value) for value in values if value is not None)
            raise ModelError(
                f"{key} {config.get(key)!r}: llama.cpp runs {family.architecture} with {known or 'none'} only",
                where=where,
            )
    if family.head == "tied" and not config.get("tie_word_embeddings", True):
        raise ModelError(
            f"tie_word_embeddings False: llama.cpp knows no head but the embeddings for {family.architecture}",
            where=where,
        )
    for check in (_check_caps, _check_attention_scale, window_period):
        check(config, family, where)


def _check_caps(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Gemma 2 has caps on attention scores and logits; llama.cpp always applies them."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if family.architecture == "gemma2" and not config.get(key):
            raise ModelError(f"{key} {config.get(key)!r}: llama.cpp runs gemma2 with a cap only", where=where)


def _check_attention_scale(config: Mapping[str, Any], family: Family, where: str) -> None:
    """llama.cpp reads no `query_pre_attn_scalar`: it knows Gemma's sizes."""
    scalar = config.get("query_pre_attn_scalar")
    if scalar is None or family.architecture not in _SCALED_BY_WIDTH:
        return
    by_width = config["num_hidden_layers"] == _SCALED_BY_WIDTH[family.architecture]
    known = config["hidden_size"] // config["num_attention_heads"] if by_width else head_dim(config)
    if scalar != known:
        raise ModelError(
            f"query_pre_attn_scalar {scalar}: llama.cpp runs {family.architecture} of "
            f"{config['num_hidden_layers']} layers with {known} only",
            where=where,
        )


def window_period(config: Mapping[str, Any], family: Family, where: str = "") -> int | None:
    """Layers in a row of which the last one looks back over all tokens and the others over the window only.

    None where no layer has a window. ModelError for `layer_types` in another order.
    """
    kinds: Sequence[str] = config.get("layer_types") or ()
    if family.window != "layers" or "sliding_attention" not in kinds:
        return None
    if not config.get("sliding_window"):
        raise ModelError(
            "layer_types names layers with a window, and there is no sliding_window", where=where
        )
    periods: list[int] = [_WINDOW_PERIODS[family.architecture], *range(2, len(kinds) + 2)]
    for period in periods:
        if all((kind == "full_attention") == (i % period == period - 1) for i, kind in enumerate(kinds)):
            return period
    raise ModelError(
        f"layer_types {', '.join(kinds[:8])}…: llama.cpp runs {family.architecture} with every nth layer full only",
        where=where,
    )


def add_model_keys(
    writer: Any, config: Mapping[str, Any], family: Family, rope: Rope, name: str, num_parameters: int
) -> None:
    """Adds the `general.*` keys and the architecture's own to a gguf.GGUFWriter."""
    from gguf import GGML_QUANT_VERSION, size_label

    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(size_label(num_parameters, 0, 0, 0))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(context_length(config, family))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(family.setting(config, "intermediate_size")))
    writer.add_head_count(int(config["num_attention_heads"]))
    writer.add_head_count_kv(num_kv_heads(family, config))
    epsilon = float(family.setting(config, _EPSILON[family.norm]))
    (writer.add_layer_norm_rms_eps if family.norm == "rms" else writer.add_layer_norm_eps)(epsilon)
    writer.add_vocab_size(int(config["vocab_size"]))
    # Not only where it differs from hidden_size / heads, so that a reader need not know the family's own default.
    if config.get("head_dim") is not None:
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
    add_rope_keys(writer, rope, config)
    _add_special_keys(writer, config, family)


def _add_special_keys(writer: Any, config: Mapping[str, Any], family: Family) -> None:
    """What only some architectures have."""
    period = window_period(config, family)
    if period is not None:
        writer.add_sliding_window(int(config["sliding_window"]))
        if period != _WINDOW_PERIODS[family.architecture]:
            writer.add_sliding_window_pattern(period)
    elif family.architecture == "gemma2":
        # llama.cpp takes 4,096 where nothing is said, and cannot do without
        writer.add_sliding_window(context_length(config, family))
    if family.architecture == "phi3":
        # llama.cpp does not use it yet; its older versions guessed where it was left out
        writer.add_sliding_window(int(config.get("sliding_window") or 0))
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if family.window == "layers" and config.get(key):
            add(float(config[key]))
    if family.architecture == "gptneox":
        writer.add_parallel_residual(bool(config.get("use_parallel_residual", True)))
    if family.architecture == "falcon":
        writer.add_tensor_data_layout("jploski")  # upstream's name for the order of rows in attn_qkv


def context_length(config: Mapping[str, Any], family: Family) -> int:
    """Tokens the file is good for: as many as the window spans, where llama.cpp does not know of it."""
    longest = int(config["max_position_embeddings"])
    window = config.get("sliding_window")
    if family.window == "context" and window and config.get("use_sliding_window", True):
        return min(longest, int(window))
    return longest
