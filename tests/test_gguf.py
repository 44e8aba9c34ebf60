"""write_gguf: what the file says, and what is refused before a file is there."""

from __future__ import annotations

import hashlib
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from tiny_gguf import CONFIG, VOCAB_SIZE, weights, write_model, write_tokenizer

from myna.errors import MachineError, ModelError, UsageError
from myna.export.gguf import GgufSummary, write_gguf


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def write(model_dir: Path, tokenizer_dir: Path, path: Path, file_type: str = "Q4_K_M") -> GgufSummary:
    return write_gguf(model_dir, tokenizer_dir, path, file_type, name="Tiny")


def keys_of(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


# --- the file


def test_the_keys_of_a_file(model_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    write(model_dir, tokenizer_dir, tmp_path / "m.gguf")
    keys = {key: value for key, value in keys_of(tmp_path / "m.gguf").items() if not key.startswith("GGUF.")}
    for key in ("tokens", "token_type", "merges"):
        keys.pop(f"tokenizer.ggml.{key}")
    assert keys == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Tiny",
        "general.size_label": "1.3M",
        "general.quantization_version": 2,
        "general.file_type": 15,
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 50000.0,
        "llama.vocab_size": VOCAB_SIZE,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def test_the_summary_is_true(model_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "m.gguf"
    summary = write(model_dir, tokenizer_dir, path)
    tensors = gguf.GGUFReader(path).tensors
    assert summary.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (summary.path, summary.bytes, summary.num_tensors) == (path, path.stat().st_size, len(tensors))
    kinds = [tensor.tensor_type.name for tensor in tensors]
    assert summary.types == {kind: kinds.count(kind) for kind in set(kinds)}
    assert summary.types == {"F32": 5, "Q4_K": 12, "Q6_K": 3}  # the head, and attn_v and ffn_down of block 1
    assert [file.name for file in path.parent.iterdir()] == ["m.gguf"]


def test_the_same_model_gives_the_same_bytes(model_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    files = [write(model_dir, tokenizer_dir, tmp_path / name).sha256 for name in ("a.gguf", "b.gguf")]
    assert files[0] == files[1]


def test_progress_counts_bytes(model_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = tmp_path / "m.gguf"
    write_gguf(model_dir, tokenizer_dir, path, "Q8_0", name="x", progress=lambda *done: seen.append(done))
    sizes = [int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors]
    assert seen == [(sum(sizes[: index + 1]), sum(sizes)) for index in range(len(sizes))]


def test_tied_embeddings_are_written_once(model_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    write(model_dir, tokenizer_dir, tmp_path / "tied.gguf")
    untied = write_model(tmp_path / "untied", tie_word_embeddings=False)
    write(untied, tokenizer_dir, tmp_path / "untied.gguf")
    names = [
        {t.name for t in gguf.GGUFReader(tmp_path / f"{kind}.gguf").tensors} for kind in ("tied", "untied")
    ]
    assert names[1] - names[0] == {"output.weight"}


def test_shards_and_halves_are_read_alike(model_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in weights(CONFIG).items()}
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    for folder in (whole, shards):
        folder.mkdir()
        shutil.copy(model_dir / "config.json", folder)
    save_file({name: tensor.float() for name, tensor in halves.items()}, whole / "model.safetensors")
    parts = ("model-1.safetensors", "model-2.safetensors")
    placed = {name: parts[index % 2] for index, name in enumerate(halves)}
    for part in parts:
        save_file({name: halves[name] for name in halves if placed[name] == part}, shards / part)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    files = [write(folder, tokenizer_dir, tmp_path / f"{folder.name}.gguf") for folder in (whole, shards)]
    assert files[0].sha256 == files[1].sha256


def test_memory_is_a_tensors_and_not_a_models(tokenizer_dir: Path, tmp_path: Path) -> None:
    deep = write_model(tmp_path / "deep", num_hidden_layers=24)
    write(deep, tokenizer_dir, tmp_path / "warm.gguf", "F16")
    tracemalloc.start()
    summary = write(deep, tokenizer_dir, tmp_path / "m.gguf", "F16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = 512 * 256 * 4
    assert summary.bytes > 20 * largest
    assert peak < 5 * largest


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            {"type": "yarn", "factor": 4.0, "original_context_length": 32},
        ),
        (
            {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0},
            {"type": "yarn", "factor": 2.0, "original_context_length": 128},
        ),
    ],
)
def test_rope_scalings(
    rope: dict[str, Any], expected: dict[str, Any], tokenizer_dir: Path, tmp_path: Path
) -> None:
    write(
        write_model(tmp_path / "m", rope_parameters=rope | {"rope_theta": 7.0}),
        tokenizer_dir,
        tmp_path / "m.gguf",
    )
    keys = keys_of(tmp_path / "m.gguf")
    assert keys["llama.rope.freq_base"] == 7.0
    scaling = {key.rsplit(".", 1)[1]: value for key, value in keys.items() if ".rope.scaling." in key}
    assert scaling == expected


def test_older_spellings_of_rope_and_head_dim(tokenizer_dir: Path, tmp_path: Path) -> None:
    older = {"rope_parameters": None, "rope_theta": 9.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    write(write_model(tmp_path / "m", head_dim=128, **older), tokenizer_dir, tmp_path / "m.gguf", "Q8_0")
    keys = keys_of(tmp_path / "m.gguf")
    assert (keys["llama.rope.freq_base"], keys["llama.rope.scaling.factor"]) == (9.0, 2.0)
    assert keys["llama.attention.key_length"] == keys["llama.attention.value_length"] == 128
    assert keys["llama.rope.dimension_count"] == 128


@pytest.mark.parametrize(
    ("model_type", "changes", "length"),
    [
        ("mistral", {"sliding_window": 32}, 32),
        ("mistral", {"sliding_window": None}, 128),
        ("mistral", {"sliding_window": 4096}, 128),
        ("llama", {"sliding_window": 32, "use_sliding_window": False}, 128),
    ],
)
def test_a_sliding_window_ends_the_context(
    model_type: str, changes: dict[str, Any], length: int, tokenizer_dir: Path, tmp_path: Path
) -> None:
    write(write_model(tmp_path / "m", model_type=model_type, **changes), tokenizer_dir, tmp_path / "m.gguf")
    assert keys_of(tmp_path / "m.gguf")["llama.context_length"] == length


# --- what is refused


def refused(
    error: type[Exception], said: str, model: Path, tokenizer: Path, tmp_path: Path, kind: str = "F16"
) -> None:
    folder = tmp_path / "gguf"
    with pytest.raises(error, match=said):
        write(model, tokenizer, folder / "m.gguf", kind)
    assert not folder.exists() or not list(folder.iterdir())


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 64}
GEMMA2 = GEMMA | {"model_type": "gemma2"}
GEMMA3 = GEMMA | {"model_type": "gemma3_text", "rope_parameters": None}
PHI3 = {"model_type": "phi3", "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "rope_theta": 5e5, "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
FALCON = {"model_type": "falcon", "activation": "gelu", "head_dim": ...}  # ... is left out
NEOX = {"model_type": "gpt_neox", "hidden_act": "gelu"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "gpt2.*llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': llama.cpp runs llama with silu"),
        ({"hidden_size": None}, "its config.json is refused.*hidden_size"),
        ({"hidden_size": 128}, "hidden_size 128"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "yarn with beta_fast"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "yarn with mscale"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "part of each head"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "each kind of layer"),
        ({"model_type": "qwen2", "rope_parameters": LLAMA3}, "llama3.*qwen2"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "has model.layers.1.*no place"),
        ({"model_type": "qwen3"}, "lacks model.layers.0.self_attn.q_norm.weight"),
        ({"tie_word_embeddings": False}, "lacks lm_head.weight"),
        ({"vocab_size": 310}, "not the number of embeddings"),
        ({"vocab_size": 290}, "ids up to 296|not the number of embeddings"),
        (GEMMA2 | {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
        (GEMMA2 | {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        (GEMMA2 | {"attn_logit_softcapping": None}, "attn_logit_softcapping None"),
        (GEMMA2 | {"final_logit_softcapping": None}, "final_logit_softcapping None"),
        (GEMMA2 | {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar 256.* of 2 layers with 64 only"),
        (GEMMA2 | {"num_hidden_layers": 46, "query_pre_attn_scalar": 99}, "of 46 layers with 64 only"),
        (GEMMA2 | {"tie_word_embeddings": False}, "tie_word_embeddings False"),
        (
            GEMMA2 | {"num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2},
            "layer_types full_attention, sliding_attention",
        ),
        (GEMMA2 | {"sliding_window": None}, "there is no sliding_window"),
        (GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        (
            GEMMA3 | {"rope_parameters": {"sliding_attention": LONGROPE, "full_attention": LLAMA3}},
            "longrope in sliding_attention",
        ),
        (
            GEMMA3 | {"rope_parameters": {"sliding_attention": None, "full_attention": LLAMA3}},
            "llama3.*gemma3",
        ),
        (PHI3 | {"rope_parameters": LONGROPE | {"long_factor": [2.0] * 31}}, "validate_rope"),
        (FALCON | {"alibi": True}, "alibi True"),
        (FALCON | {"bias": True}, "bias True"),
        (FALCON | {"activation": "relu"}, "activation 'relu'"),
        (FALCON, "lacks transformer.word_embeddings.weight"),
        (NEOX | {"hidden_act": "relu"}, "hidden_act 'relu'"),
        (NEOX | {"rotary_pct": 0.3}, "part of each head"),
    ],
)
def test_configs_refused(
    changes: dict[str, Any], said: str, model_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "model"
    changed.mkdir()
    (changed / "model.safetensors").symlink_to(model_dir / "model.safetensors")
    config = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    (changed / "config.json").write_text(json.dumps(config))
    refused(ModelError, said, changed, tokenizer_dir, tmp_path)


def test_an_unknown_file_type_is_refused(model_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    refused(UsageError, "Q3_K", model_dir, tokenizer_dir, tmp_path, "Q3_K")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (torch.full((256,), torch.nan), "output_norm.weight: .*not finite"),
        (torch.ones(256, dtype=torch.int8), "int8"),
    ],
)
def test_bad_weights_leave_no_file(
    bad: torch.Tensor, said: str, model_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """output_norm is the last tensor: all others have been written by then."""
    changed = tmp_path / "model"
    changed.mkdir()
    shutil.copy(model_dir / "config.json", changed)
    save_file(weights(CONFIG) | {"model.norm.weight": bad}, changed / "model.safetensors")
    refused(ModelError, said, changed, tokenizer_dir, tmp_path)


def test_a_broken_or_missing_weights_file_is_named(
    model_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "model"
    changed.mkdir()
    shutil.copy(model_dir / "config.json", changed)
    refused(ModelError, r"model\.safetensors", changed, tokenizer_dir, tmp_path)
    (changed / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    refused(ModelError, r"model\.safetensors", changed, tokenizer_dir, tmp_path)


def test_room_is_looked_at_first(
    model_dir: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    refused(MachineError, "no room for the F32 file", model_dir, tokenizer_dir, tmp_path, "F32")


def test_an_interrupted_write_keeps_the_old_file(
    model_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(model_dir, tokenizer_dir, path, "F16", name="x", progress=stop)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("m.gguf", b"old")]
