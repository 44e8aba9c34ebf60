"""What was written, read back by others: gguf's decoder tensor by tensor, and transformers' own GGUF reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from myna.export.gguf import write_gguf
from myna.export.quantize import QUANT_TYPES

HEADS = {"attn_q": 4, "attn_k": 2}
# Relative error by norm of each type on normal weights, a quarter above what is measured.
BOUNDS = {
    "F32": 0.0,
    "F16": 3e-4,
    "BF16": 2.5e-3,
    "Q8_0": 0.007,
    "Q6_K": 0.025,
    "Q5_K": 0.045,
    "Q5_1": 0.05,
    "Q5_0": 0.055,
    "Q4_K": 0.09,
    "Q4_1": 0.098,
    "IQ4_NL": 0.095,
    "IQ4_XS": 0.095,
    "Q4_0": 0.12,
    "Q3_K": 0.19,
    "Q2_K": 0.37,
}
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}


def new_model(folder: Path, model_type: str, **changes: Any) -> dict[str, torch.Tensor]:
    """A random model with a tokenizer of bytes in `folder`; returns its tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": letters[0]}))
    sizes = {
        "vocab_size": 256,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(sizes | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    return dict(model.state_dict())


def source_of(name: str, tensors: dict[str, torch.Tensor], permuted: bool) -> np.ndarray[Any, Any]:
    """The tensor of transformers that GGUF's `name` should hold, its rows where llama.cpp wants them."""
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    *block, inner, suffix = name.split(".")
    renamed = f"model.layers.{block[1]}.{NAMES[inner]}" if block else top[inner]
    source = tensors[f"{renamed}.{suffix}"].numpy()
    if not permuted or inner not in HEADS:
        return source
    size = len(source) // HEADS[inner]
    rows = [
        head * size + half * size // 2 + i
        for head in range(HEADS[inner])
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return source[rows]


def even_importance(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """One for each column of each matrix, for the type that is not written without."""
    write_gguf(folder, folder, folder / "f32.gguf", "F32", name="x")
    tensors = gguf.GGUFReader(folder / "f32.gguf").tensors
    return {
        tensor.name: np.ones(int(tensor.shape[0]), np.float32) for tensor in tensors if len(tensor.shape) == 2
    }


@pytest.mark.parametrize("file_type", QUANT_TYPES)
@pytest.mark.parametrize("width", [256, 96])
def test_each_tensor_decodes_near_its_source(width: int, file_type: str, tmp_path: Path) -> None:
    tensors = new_model(tmp_path, "llama", hidden_size=width, attention_bias=True)
    importance = even_importance(tmp_path) if QUANT_TYPES[file_type].needs_importance else None
    summary = write_gguf(tmp_path, tmp_path, tmp_path / "m.gguf", file_type, name="x", importance=importance)
    written = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    assert len(written) == summary.num_tensors == len(tensors)
    for tensor in written:
        decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        source = source_of(tensor.name, tensors, permuted=True)
        error = np.linalg.norm(decoded - source) / np.linalg.norm(source)
        assert decoded.shape == source.shape
        assert error <= BOUNDS[tensor.tensor_type.name], (tensor.name, tensor.tensor_type.name, error)


@pytest.mark.parametrize(("model_type", "head_dim"), [("llama", 64), ("qwen2", 64), ("qwen3", 128)])
def test_transformers_reads_the_same_model_back(model_type: str, head_dim: int, tmp_path: Path) -> None:
    """Its reader undoes names and permutation by code of its own (and takes every qwen3 head for one of 128)."""
    from transformers import AutoModelForCausalLM, GgufConfig

    tensors = new_model(tmp_path, model_type, head_dim=head_dim)
    write_gguf(tmp_path, tmp_path, tmp_path / "m.gguf", "F32", name="x")
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, quantization_config=plain
    )
    read = model.state_dict()
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0)
