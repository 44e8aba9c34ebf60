"""Names of families and their tensors."""

from __future__ import annotations

import gguf
import pytest

from myna.errors import ModelError
from myna.model.families import FAMILIES, block_tensors, family_of, gguf_name, num_kv_heads


def test_names_of_tensors() -> None:
    llama = FAMILIES["llama"]
    assert gguf_name(llama, "model.layers.12.mlp.down_proj.weight") == "blk.12.ffn_down.weight"
    assert gguf_name(llama, "lm_head.weight") == "output.weight"
    assert gguf_name(llama, "model.layers.0.self_attn.q_norm.weight") is None
    assert (
        gguf_name(FAMILIES["qwen3"], "model.layers.0.self_attn.q_norm.weight") == "blk.0.attn_q_norm.weight"
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_are_the_ones_gguf_knows(model_type: str) -> None:
    family = family_of({"model_type": model_type})
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    upstream = gguf.get_tensor_name_map(architecture, 3)
    blocks = (family.tensors, family.optional, *family.choices)
    inner = [f"{family.layers}2.{name}" for tensors in blocks for name in tensors]
    for name in (*family.top, *inner):
        assert gguf_name(family, name) == upstream.get_name(name, try_suffixes=(".weight", ".bias"))


def test_an_unknown_family_names_the_known() -> None:
    with pytest.raises(
        ModelError, match="llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, phi3, falcon, gpt_neox"
    ):
        family_of({"model_type": "rwkv"})


@pytest.mark.parametrize(
    ("config", "norms", "kv_heads"),
    [
        ({}, {"attn_norm"}, 1),
        ({"num_kv_heads": 8}, {"attn_norm"}, 1),
        ({"multi_query": False}, {"attn_norm"}, 8),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, {"attn_norm", "attn_norm_2"}, 2),
        (
            {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "num_kv_heads": 2},
            {"attn_norm"},
            2,
        ),
    ],
)
def test_falcons_generations(config: dict[str, object], norms: set[str], kv_heads: int) -> None:
    falcon = FAMILIES["falcon"]
    config = {"num_attention_heads": 8} | config
    names = {name.partition(".")[0] for name in block_tensors(falcon, config).values()}
    assert {name for name in names if "norm" in name} == norms
    assert num_kv_heads(falcon, config) == kv_heads
