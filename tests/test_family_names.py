"""Names of families and their tensors."""

from __future__ import annotations

import gguf
import pytest

from myna.errors import ModelError
from myna.model.families import FAMILIES, family_of, gguf_name


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
    for inner in (*family.tensors, *family.optional):
        name = f"model.layers.2.{inner}"
        assert gguf_name(family, name) == upstream.get_name(name, try_suffixes=(".weight", ".bias"))


def test_an_unknown_family_names_the_known() -> None:
    with pytest.raises(ModelError, match="llama, mistral, qwen2, qwen3"):
        family_of({"model_type": "rwkv"})
