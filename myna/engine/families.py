"""What a decoder layer of each family is made of: one small function a family, over transformers' own modules.

Each returns the layer's blocks with the modules' weights behind them. A contract test holds every line of FAST against
the plain forward of transformers and peft.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from myna.engine.blocks import AttentionBlock, MlpBlock
from myna.engine.kernels import ActivationName, AttentionSpec, Norm
from myna.engine.lora import LoraGroup

ACTIVATIONS: Mapping[str, ActivationName] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclass(frozen=True)
class DecoderLayer:
    """A layer's blocks; `parallel`: both read the layer's input, and both are added to it (GPT-NeoX)."""

    attention: AttentionBlock
    mlp: MlpBlock
    parallel: bool = False


@dataclass(frozen=True)
class FastFamily:
    """How a family's base model is taken apart."""

    layer: Callable[[Any, Any, int], DecoderLayer]
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    rope_by_layer_type: bool = False


def rms_norm(module: Any, plus_one: bool = False) -> Norm:
    """A transformers RMSNorm; Gemma's multiply by 1 + weight."""
    weight = _exact(module.weight)
    eps = getattr(module, "variance_epsilon", None)
    return Norm(weight + 1 if plus_one else weight, None, float(module.eps if eps is None else eps))


def layer_norm(module: Any) -> Norm:
    return Norm(_exact(module.weight), _exact(module.bias), float(module.eps), centred=True)


def _exact(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)


def _stacked(
    attention: Any, config: Any, *, window: int | None, softcap: float | None = None
) -> AttentionSpec:
    """q, k and v one above the other, their heads side by side."""
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        rotary_dim=rotary_dim(config, width),
        scale=float(attention.scaling),
        query_at=0,
        query_step=width,
        key_at=heads * width,
        value_at=(heads + kv_heads) * width,
        kv_step=width,
        window=window,
        softcap=softcap,
    )


def rotary_dim(config: Any, head_dim: int) -> int:
    """How many of a head's columns are turned; the rest pass as they are."""
    rope = getattr(config, "rope_parameters", None) or {}
    return int(head_dim * float(rope.get("partial_rotary_factor") or 1.0))


def _window(config: Any, index: int) -> int | None:
    """A layer's sliding window, where it has one."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[index] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _llama(layer: Any, config: Any, index: int) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    spec = _stacked(attention, config, window=_window(config, index))
    return DecoderLayer(
        AttentionBlock(
            norm=rms_norm(layer.input_layernorm),
            inner=LoraGroup([attention.q_proj, attention.k_proj, attention.v_proj]),
            spec=spec,
            outer=LoraGroup([attention.o_proj]),
        ),
        MlpBlock(
            norm=rms_norm(layer.post_attention_layernorm),
            inner=LoraGroup([mlp.gate_proj, mlp.up_proj]),
            activation=ACTIVATIONS[config.hidden_act],
            gated=True,
            outer=LoraGroup([mlp.down_proj]),
        ),
    )


def _qwen3(layer: Any, config: Any, index: int) -> DecoderLayer:
    attention = layer.self_attn
    spec = replace(
        _stacked(attention, config, window=_window(config, index)),
        query_norm=rms_norm(attention.q_norm),
        key_norm=rms_norm(attention.k_norm),
    )
    plain = _llama(layer, config, index)
    return replace(plain, attention=replace(plain.attention, spec=spec))


def _gemma(layer: Any, config: Any, index: int) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    return DecoderLayer(
        AttentionBlock(
            norm=rms_norm(layer.input_layernorm, plus_one=True),
            inner=LoraGroup([attention.q_proj, attention.k_proj, attention.v_proj]),
            spec=_stacked(attention, config, window=_window(config, index)),
            outer=LoraGroup([attention.o_proj]),
        ),
        MlpBlock(
            norm=rms_norm(layer.post_attention_layernorm, plus_one=True),
            inner=LoraGroup([mlp.gate_proj, mlp.up_proj]),
            # transformers reads hidden_activation where a Gemma's config has one
            activation=ACTIVATIONS[getattr(config, "hidden_activation", None) or config.hidden_act],
            gated=True,
            outer=LoraGroup([mlp.down_proj]),
        ),
    )


def _gemma2(layer: Any, config: Any, index: int) -> DecoderLayer:
    plain = _gemma(layer, config, index)
    spec = replace(plain.attention.spec, softcap=getattr(config, "attn_logit_softcapping", None))
    return DecoderLayer(
        replace(
            plain.attention, spec=spec, post_norm=rms_norm(layer.post_attention_layernorm, plus_one=True)
        ),
        replace(
            plain.mlp,
            norm=rms_norm(layer.pre_feedforward_layernorm, plus_one=True),
            post_norm=rms_norm(layer.post_feedforward_layernorm, plus_one=True),
        ),
    )


def _gemma3(layer: Any, config: Any, index: int) -> DecoderLayer:
    plain = _gemma2(layer, config, index)
    attention = layer.self_attn
    spec = replace(
        plain.attention.spec,
        query_norm=rms_norm(attention.q_norm, plus_one=True),
        key_norm=rms_norm(attention.k_norm, plus_one=True),
    )
    return replace(plain, attention=replace(plain.attention, spec=spec, rope_name=config.layer_types[index]))


def _phi3(layer: Any, config: Any, index: int) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    return DecoderLayer(
        AttentionBlock(
            norm=rms_norm(layer.input_layernorm),
            inner=LoraGroup([attention.qkv_proj]),
            spec=_stacked(attention, config, window=_window(config, index)),
            outer=LoraGroup([attention.o_proj]),
        ),
        MlpBlock(
            norm=rms_norm(layer.post_attention_layernorm),
            inner=LoraGroup([mlp.gate_up_proj]),
            activation=ACTIVATIONS[config.hidden_act],
            gated=True,
            outer=LoraGroup([mlp.down_proj]),
        ),
    )


def _gpt_neox(layer: Any, config: Any, index: int) -> DecoderLayer:
    attention, mlp = layer.attention, layer.mlp
    heads, width = config.num_attention_heads, attention.head_size
    spec = AttentionSpec(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width,
        rotary_dim=rotary_dim(config, width),
        scale=float(attention.scaling),
        query_at=0,
        query_step=3 * width,  # q, k and v of one head side by side
        key_at=width,
        value_at=2 * width,
        kv_step=3 * width,
    )
    return DecoderLayer(
        AttentionBlock(
            norm=layer_norm(layer.input_layernorm),
            inner=LoraGroup([attention.query_key_value]),
            spec=spec,
            outer=LoraGroup([attention.dense]),
        ),
        MlpBlock(
            norm=layer_norm(layer.post_attention_layernorm),
            inner=LoraGroup([mlp.dense_h_to_4h]),
            activation=ACTIVATIONS[config.hidden_act],
            gated=False,
            outer=LoraGroup([mlp.dense_4h_to_h]),
        ),
        parallel=bool(config.use_parallel_residual),
    )


FAST: Mapping[str, FastFamily] = {
    "llama": FastFamily(_llama),
    "mistral": FastFamily(_llama),
    "qwen2": FastFamily(_llama),
    "qwen3": FastFamily(_qwen3),
    "gemma": FastFamily(_gemma),
    "gemma2": FastFamily(_gemma2),
    "gemma3_text": FastFamily(_gemma3, rope_by_layer_type=True),
    "phi3": FastFamily(_phi3),
    "gpt_neox": FastFamily(_gpt_neox, embedding="embed_in", final_norm="final_layer_norm"),
}
