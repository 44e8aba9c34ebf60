"""Every line of FAMILIES in llama.cpp itself.

A tiny random model of transformers in its family's real shape, written as GGUF, must say there what it says
here: the same tokens, the same log-probabilities, after prompts longer than every window and original context.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from llama_server import llama_cpp
from tiny_families import SHAPES, family_config, greedy, log_probabilities, new_model, with_ggml_gelu
from tiny_gguf import VOCAB_SIZE, write_tokenizer
from tokenizers import Tokenizer

from myna.backends.llama_cpp import LlamaCppBackend
from myna.errors import ModelError
from myna.export.gguf import write_gguf
from myna.model.families import FAMILIES

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="llama.cpp is reached on a unix socket")

TOLERANCE = 2e-4
# ggml looks GELU up in a table of halves: what that adds, and what is left where transformers does it too, since a
# sum that differs in its last bit may become another half. Measured: up to 0.004 and 0.0011.
GELU_TOLERANCE, TWIN_TOLERANCE = 0.01, 2e-3
ROPE_BASE = {"rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 500.0},
    "linear": {"rope_theta": 500.0, "factor": 4.0},
    "yarn": ROPE_BASE,
    "llama3": ROPE_BASE | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def has_gelu(model_type: str) -> bool:
    return "gelu" in str(FAMILIES[model_type].only)


def least_move(model_type: str) -> float:
    """What a change must do to the answer to be seen for sure."""
    return 5 * (TWIN_TOLERANCE if has_gelu(model_type) else TOLERANCE)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, "gpt-2")
    return folder, Tokenizer.from_file(str(folder / "tokenizer.json"))


def prompt_for(model: Any, tokenizer: Tokenizer, length: int = 100) -> list[int]:
    """At most `length` tokens after which the likeliest is a character: the server tells nothing of others."""
    generator = torch.Generator().manual_seed(1)
    ids: list[int] = torch.randint(2, 297, (length,), generator=generator).tolist()
    while not (text := tokenizer.decode([int(log_probabilities(model, ids).argmax())])) or not text.isascii():
        ids.pop()
    assert len(ids) > 0.6 * length
    return ids


def assert_alike(
    folder: Path, model_type: str, tokenizer: Tokenizer, model: Any, length: int = 100, context: int = 256
) -> None:
    """llama.cpp on `folder`/m.gguf says what the model says: exactly so but for GELU, and nearly so with it."""
    prompt = prompt_for(model, tokenizer, length)
    with llama_cpp(folder / "m.gguf", folder, context) as server:
        there_V = server.log_probabilities(prompt, VOCAB_SIZE)
        tokens = server.greedy(prompt, 16)
    here_V = log_probabilities(model, prompt)
    bound = GELU_TOLERANCE if has_gelu(model_type) else TOLERANCE
    print(f"{model_type}: {float((there_V - here_V).abs().max()):.1e}")
    torch.testing.assert_close(there_V, here_V, rtol=0, atol=bound)
    if has_gelu(model_type):
        twin_V = log_probabilities(with_ggml_gelu(model), prompt)
        torch.testing.assert_close(there_V, twin_V, rtol=0, atol=TWIN_TOLERANCE)
    assert tokens == greedy(model, prompt, 16)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_says_the_same_in_llama_cpp(
    model_type: str, tokenizer: tuple[Path, Tokenizer], tmp_path: Path
) -> None:
    model = new_model(tmp_path, model_type, VOCAB_SIZE)
    write_gguf(tmp_path, tokenizer[0], tmp_path / "m.gguf", "F32", name="tiny")
    assert_alike(tmp_path, model_type, tokenizer[1], model)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *[
        (kind, {"rope_parameters": {"rope_type": rope} | ROPES[rope]})
        for kind in FAMILIES
        for rope in FAMILIES[kind].rope_types
        if rope in ROPES and kind != "gemma3_text"
    ],
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("mistral", {"head_dim": 32, "num_key_value_heads": 4}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    ("gemma2", {"layer_types": ["full_attention"] * 2}),
    ("gemma2", {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}),
    ("gemma2", {"layer_types": ["sliding_attention"] * 2}),
    ("gemma3_text", {"layer_types": ["full_attention"] * 6}),
    ("gemma3_text", {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}),
    ("gemma3_text", {"final_logit_softcapping": 6.0, "tie_word_embeddings": False}),
    ("gemma3_text", {"rope_parameters": None}),
    ("phi3", {"sliding_window": None, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("phi3", {"rope_parameters": ROPES["default"] | {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    ("falcon", {"num_ln_in_parallel_attn": 1, "ffn_hidden_size": 96, "tie_word_embeddings": False}),
    ("falcon", {"new_decoder_architecture": False, "num_kv_heads": None}),
    ("falcon", {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": None}),
    ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    ("gpt_neox", {"rope_parameters": ROPES["yarn"] | {"rope_type": "yarn", "partial_rotary_factor": 0.5}}),
    ("gpt_neox", {"hidden_act": "gelu_new"}),
]


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_variants_of_a_family(
    model_type: str, changes: dict[str, Any], tokenizer: tuple[Path, Tokenizer], tmp_path: Path
) -> None:
    model = new_model(tmp_path, model_type, VOCAB_SIZE, **changes)
    write_gguf(tmp_path, tokenizer[0], tmp_path / "m.gguf", "F32", name="tiny")
    assert_alike(tmp_path, model_type, tokenizer[1], model)


@pytest.mark.parametrize("model_type", ["mistral", "phi3"])
def test_up_to_its_window_a_model_is_the_same(
    model_type: str, tokenizer: tuple[Path, Tokenizer], tmp_path: Path
) -> None:
    """llama.cpp knows of no window for these; it keeps to the context that the file names."""
    model = new_model(tmp_path, model_type, VOCAB_SIZE, sliding_window=90)
    write_gguf(tmp_path, tokenizer[0], tmp_path / "m.gguf", "F32", name="tiny")
    assert_alike(tmp_path, model_type, tokenizer[1], model, length=70)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields[f"{FAMILIES[model_type].architecture}.context_length"].contents() == 90


def test_up_to_the_original_context_phi3_turns_by_its_short_factors(
    tokenizer: tuple[Path, Tokenizer], tmp_path: Path
) -> None:
    """transformers chooses by the length of the text, llama.cpp by the room it was started with."""
    lengths = {"original_max_position_embeddings": 256, "max_position_embeddings": 512}
    model = new_model(tmp_path, "phi3", VOCAB_SIZE, **lengths)
    write_gguf(tmp_path, tokenizer[0], tmp_path / "m.gguf", "F32", name="tiny")
    assert_alike(tmp_path, "phi3", tokenizer[1], model, context=256)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_backend_scores_as_transformers_does(
    model_type: str, tokenizer: tuple[Path, Tokenizer], tmp_path: Path
) -> None:
    """Through the pipeline's own backend, whose cache holds halves: every position, caps on logits and all."""
    model = new_model(tmp_path, model_type, VOCAB_SIZE)
    write_gguf(tmp_path, tokenizer[0], tmp_path / "m.gguf", "F32", name="tiny")
    prompt = prompt_for(model, tokenizer[1])
    backend = LlamaCppBackend(tmp_path / "m.gguf", context=128)
    try:
        there_TV = torch.from_numpy(backend.score(prompt))
    finally:
        backend.close()
    with torch.no_grad():
        here_TV = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    difference_TV = (there_TV - here_TV).abs()
    print(f"{model_type}: {float(difference_TV.max()):.1e}, mean {float(difference_TV.mean()):.1e}")
    assert float(difference_TV.max()) < 0.1 and float(difference_TV.mean()) < 0.01


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_tensor_moves_the_answer(
    model_type: str, tokenizer: tuple[Path, Tokenizer], tmp_path: Path
) -> None:
    """So that a tensor that is off by a tenth, or has its rows in another order, could not pass unseen above."""
    model = new_model(tmp_path, model_type, VOCAB_SIZE)
    prompt = prompt_for(model, tokenizer[1])
    before_V = log_probabilities(model, prompt)
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        noise = 1 + 0.1 * torch.randn(kept.shape, generator=torch.Generator().manual_seed(0))
        for changed in (kept * noise, kept.roll(1, 0)):
            with torch.no_grad():
                parameter.copy_(changed)
            moved = float((log_probabilities(model, prompt) - before_V).abs().max())
            assert moved > least_move(model_type), (name, moved)
        with torch.no_grad():
            parameter.copy_(kept)


SETTINGS = [
    (model_type, key)
    for model_type, shape in SHAPES.items()
    for key in shape
    if key.endswith(("softcapping", "scalar", "window", "parameters")) and shape[key] is not None
]


@pytest.mark.parametrize(("model_type", "key"), SETTINGS)
def test_every_setting_moves_the_answer(
    model_type: str, key: str, tokenizer: tuple[Path, Tokenizer], tmp_path: Path
) -> None:
    """The same weights without the setting: a key that llama.cpp did not read could not pass unseen above."""
    from transformers import AutoModelForCausalLM

    model = new_model(tmp_path, model_type, VOCAB_SIZE)
    prompt = prompt_for(model, tokenizer[1])
    plain: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 400.0}}
    without = plain.get(key, 64.0 if key.endswith("capping") else 64)
    other = family_config(model_type, VOCAB_SIZE, **{key: without})
    changed = AutoModelForCausalLM.from_config(other, dtype=torch.float32).eval()
    changed.load_state_dict(model.state_dict())
    moved = float((log_probabilities(changed, prompt) - log_probabilities(model, prompt)).abs().max())
    assert moved > least_move(model_type)


@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        (
            "falcon",
            {"new_decoder_architecture": False, "parallel_attn": False},
            "has .*post_attention_layernorm",
        ),
        ("gpt_neox", {"attention_bias": False}, "lacks .*query_key_value.bias"),
        ("gemma2", {"attention_bias": True}, "has .*q_proj.bias.*gemma2 has no place for"),
    ],
)
def test_tensors_that_llama_cpp_has_no_place_for(
    model_type: str, changes: dict[str, Any], said: str, tokenizer: tuple[Path, Tokenizer], tmp_path: Path
) -> None:
    new_model(tmp_path, model_type, VOCAB_SIZE, **changes)
    with pytest.raises(ModelError, match=said):
        write_gguf(tmp_path, tokenizer[0], tmp_path / "m.gguf", "F32", name="tiny")
