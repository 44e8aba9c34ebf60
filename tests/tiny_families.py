"""A tiny random model of each line of FAMILIES in its real config's shape, all that it has switched on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_ROPE = {"rope_type": "default", "rope_theta": 500.0}
# What a family has beyond sizes: windows shorter than the prompts, caps that bend, heads wider than hidden / heads.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32, "num_key_value_heads": 1},
    "gemma2": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 6.0,
    },
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 24,
        "num_hidden_layers": 6,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        },
    },
    "phi3": {
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0 + 0.1 * i for i in range(6)],
            "long_factor": [2.0 + i for i in range(6)],
        },
    },
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "gpt_neox": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.25}},
}


def family_config(model_type: str, vocab_size: int, **changes: Any) -> Any:
    from transformers import AutoConfig

    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(model_type, **(sizes | SHAPES[model_type] | changes))


def new_model(folder: Path, model_type: str, vocab_size: int, **changes: Any) -> Any:
    """Random weights, wide enough that each one moves the answer; biases and norms too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = family_config(model_type, vocab_size, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def log_probabilities(model: Any, prompt: Sequence[int]) -> torch.Tensor:
    """[V] of the token after `prompt`."""
    answer: torch.Tensor = model(torch.tensor([list(prompt)])).logits[0, -1].log_softmax(-1)
    return answer


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + count and (len(ids) == len(prompt) or ids[-1] != 1):
        ids.append(int(log_probabilities(model, ids).argmax()))
    return ids[len(prompt) :]


class GgmlGelu(torch.nn.Module):
    """GELU as ggml computes it on a CPU: the one by tanh, looked up in a table of halves (`ggml_vec_gelu_f32`)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x.to(torch.float16).to(torch.float32)
        table = torch.nn.functional.gelu(half, approximate="tanh").to(torch.float16).to(torch.float32)
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, table))


def with_ggml_gelu(model: Any) -> Any:
    """A copy of the model that differs from llama.cpp in nothing but the order of its sums."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name in ("act", "act_fn"):
            if "GELU" in type(getattr(module, name, None)).__name__:
                setattr(module, name, GgmlGelu())
    return twin
