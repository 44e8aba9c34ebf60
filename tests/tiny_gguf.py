"""A small model folder and a tokenizer for what writes GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from myna.model.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_json

WORDS = "the quick brown fox jumps over the lazy dog; it's 12 o'clock\n" * 20
VOCAB_SIZE = 300
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB_SIZE,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
}


def write_tokenizer(folder: Path, pre: str = "smollm") -> dict[str, Any]:
    """A byte-level BPE of 297 tokens: two special ones first, a user-defined one last, and then a hole."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(ignore_merges=PRE_TOKENIZERS[pre].ignores_merges))
    tokenizer.decoder = decoders.ByteLevel()
    value = json.loads(tokenizer.to_str()) | {"pre_tokenizer": pre_tokenizer_json(pre)}
    tokenizer = Tokenizer.from_str(json.dumps(value))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=296, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    tokenizer.add_tokens(["<call>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    loaded: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    return loaded


def weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    width, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries, keys = (config["head_dim"] * config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, width),
        "model.norm.weight": (width,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (width,),
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "post_attention_layernorm": (width,),
            "mlp.gate_proj": (ffn, width),
            "mlp.up_proj": (ffn, width),
            "mlp.down_proj": (width, ffn),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def write_model(folder: Path, **changes: Any) -> Path:
    config = CONFIG | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(config), folder / "model.safetensors")
    return folder
