"""A LoRA as a GGUF file of its own: base file + adapter file = merged, in llama.cpp itself."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import with_ggml_gelu
from tiny_gguf import write_tokenizer
from tiny_lora import merged_by_peft, new_adapter, new_base

from myna.adapters.files import WEIGHTS
from myna.backends.llama_cpp import LlamaCppBackend
from myna.backends.llama_server import Child
from myna.errors import ModelError
from myna.export.adapter_gguf import write_adapter_gguf
from myna.export.gguf import write_gguf
from myna.model.families import FAMILIES

IDS = [(7 * i + 3 * (i // 5)) % 290 + 2 for i in range(40)]
# llama.cpp as Myna's own child has it for scores, but with its cache in float32, so that only the files can differ.
SERVE = """
import sys, xllamacpp as x
p = x.CommonParams()
p.model.path, p.hostnames, p.port, p.api_keys = sys.argv[1], [sys.argv[3]], 1, ["key"]
p.lora_adapters = [x.CommonAdapterLoraInfo(sys.argv[2], 1.0)]
p.n_ctx, p.n_parallel, p.warmup, p.ui, p.fit_params, p.verbosity = 128, 1, False, False, False, 1
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
p.embedding, p.pooling_type, p.embd_normalize = True, x.llama_pooling_type.LLAMA_POOLING_TYPE_NONE, -1
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
server = x.Server(p)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def exact_backend(base: Path, adapter: Path) -> Iterator[LlamaCppBackend]:
    folder = Path(tempfile.mkdtemp(prefix="myna-", dir="/tmp"))
    command = [sys.executable, "-c", SERVE, str(base), str(adapter), str(folder / "s.sock")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    backend = LlamaCppBackend(base, context=128, adapter=adapter)
    backend._children["score"] = Child(process, f"unix://{folder / 's.sock'}", "key", folder)
    try:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == "ready\n", process.stderr.read()[-2000:]
        yield backend
    finally:
        backend.close()
        process.stderr.close()


def log_probabilities(model: Any) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        answer: np.ndarray[Any, Any] = model(torch.tensor([IDS])).logits[0].log_softmax(-1).numpy()
    return answer


def require_same(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """Base file + adapter file says what peft's merged says, and the base alone something else."""
    write_tokenizer(base_dir)
    write_gguf(base_dir, base_dir, tmp_path / "base.gguf", "F32", name="tiny")
    write_adapter_gguf(adapter_dir, base_dir, tmp_path / "adapter.gguf", name="tiny")
    # ggml looks GELU up in a table of halves: where sums differ in the last bit, some values fall into the next line
    bound = 5e-3 if "gelu" in (base_dir / "config.json").read_text() else 5e-4
    merged = log_probabilities(with_ggml_gelu(merged_by_peft(base_dir, adapter_dir)))
    with exact_backend(tmp_path / "base.gguf", tmp_path / "adapter.gguf") as backend:
        np.testing.assert_allclose(backend.score(IDS), merged, rtol=0, atol=bound)
        backend._child("score").post("/lora-adapters", [{"id": 0, "scale": 0.0}])
        assert np.abs(backend.score(IDS) - merged).max() > 0.5


@pytest.mark.skipif(sys.platform == "win32", reason="llama.cpp is reached on a unix socket")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_base_and_adapter_are_merged(model_type: str, tmp_path: Path) -> None:
    base_dir = new_base(tmp_path / "base", model_type)
    require_same(base_dir, new_adapter(base_dir, tmp_path / "adapter"), tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="llama.cpp is reached on a unix socket")
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3}},
        {
            "alpha_pattern": {"v_proj": 3, "layers.0.self_attn.k_proj": 20},
            "use_rslora": True,
            "rank_pattern": {"k_proj": 3},
        },
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    ],
    ids=["rslora", "ranks", "alphas", "head and embeddings"],
)
def test_scales_by_layer_and_both_ends(settings: dict[str, Any], tmp_path: Path) -> None:
    base_dir = new_base(tmp_path / "base")
    require_same(base_dir, new_adapter(base_dir, tmp_path / "adapter", **settings), tmp_path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return new_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])


def test_what_the_file_says(base: Path, adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    summary = write_adapter_gguf(adapter, base, path, name="Orders")
    reader = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert keys == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "Orders",
        "general.file_type": 0,
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    stored = load_file(adapter / WEIGHTS)
    start = "base_model.model.model.layers.1.self_attn"
    assert list(tensors)[-2:] == ["blk.1.attn_v.weight.lora_a", "blk.1.attn_v.weight.lora_b"]
    assert np.array_equal(tensors["blk.1.attn_v.weight.lora_b"], stored[f"{start}.v_proj.lora_B.weight"])
    assert np.array_equal(tensors["blk.1.attn_q.weight.lora_a"], stored[f"{start}.q_proj.lora_A.weight"])
    turned = stored[f"{start}.q_proj.lora_B.weight"].reshape(4, 2, 8, 4).swapaxes(1, 2).reshape(64, 4)
    assert np.array_equal(tensors["blk.1.attn_q.weight.lora_b"], turned)
    assert (summary.num_tensors, summary.types) == (8, {"F32": 8})
    assert summary.bytes == path.stat().st_size


def test_the_weights_of_the_base_are_not_needed(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    digests = [
        write_adapter_gguf(adapter, place, tmp_path / "a.gguf", name="x").sha256 for place in (base, tmp_path)
    ]
    assert digests[0] == digests[1]


# --- what is refused


def peft_configs() -> dict[str, Callable[[], Any]]:
    import peft

    lora = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    target = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    return {
        "magnitudes": lambda: peft.LoraConfig(**lora, use_dora=True),
        "whole layers": lambda: peft.LoraConfig(**lora, modules_to_save=["lm_head"]),
        "biases of the base": lambda: peft.LoraConfig(**lora, bias="all"),
        "single tokens": lambda: peft.LoraConfig(**lora, trainable_token_indices=[3, 4]),
        "that pissa had changed": lambda: peft.LoraConfig(**lora, init_lora_weights="pissa"),
        "that olora had changed": lambda: peft.LoraConfig(**lora, init_lora_weights="olora"),
        "method is IA3": lambda: peft.IA3Config(
            target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"
        ),
        "method is LOKR": lambda: peft.LoKrConfig(**target),
        "method is LOHA": lambda: peft.LoHaConfig(**target),
        "method is ADALORA": lambda: peft.AdaLoraConfig(**target, total_step=10),
        "method is PREFIX_TUNING": lambda: peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3
        ),
    }


@pytest.mark.parametrize("reason", peft_configs())
def test_other_methods_are_refused_with_the_reason_and_the_way(
    base: Path, tmp_path: Path, reason: str
) -> None:
    adapter = new_adapter(base, tmp_path / "adapter", peft_configs()[reason]())
    with pytest.raises(ModelError, match=reason) as refused:
        write_adapter_gguf(adapter, base, tmp_path / "a.gguf", name="x")
    assert "myna merge" in (refused.value.help or "")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lora_bias": True}, "B has biases"),
        ({"fan_in_fan_out": True}, "turned round"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers"),
        ({"alora_invocation_tokens": [5]}, "middle of a text"),
        ({"target_parameters": ["experts.w"]}, "no layers"),
        ({"use_something_new": True}, "use_something_new"),
        ({"lora_alpha": 0}, "alpha is 0"),
        ({"r": 8}, "rank 8"),
        ({"r": 0}, "no number"),
        ({"lora_alpha": "much"}, "no number"),
        ({"rank_pattern": {"(": 4}}, "no number"),
        ({"peft_type": None}, "method is None"),
    ],
)
def test_settings_that_change_more_than_pairs(
    base: Path, adapter: Path, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=reason):
        write_adapter_gguf(adapter, base, tmp_path / "a.gguf", name="x")


def test_an_adapter_of_another_base(adapter: Path, tmp_path: Path) -> None:
    for name, changes, said in (
        ("wide", {"hidden_size": 128}, "is .128, 128. there"),
        ("shallow", {"num_hidden_layers": 1}, "model.layers.1.self_attn.q_proj.weight .* is not in it"),
    ):
        other = new_base(tmp_path / name, **changes)
        with pytest.raises(ModelError, match=said):
            write_adapter_gguf(adapter, other, tmp_path / "a.gguf", name="x")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_ends_that_are_tied(tmp_path: Path, target: str) -> None:
    base_dir = new_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = new_adapter(base_dir, tmp_path / "adapter", target_modules=["q_proj", target])
    with pytest.raises(ModelError, match="one tensor in this base"):
        write_adapter_gguf(adapter, base_dir, tmp_path / "a.gguf", name="x")


def test_a_file_that_lacks_a_half_or_brings_more(base: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    lost = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    for changed, reason in (
        (
            {name: tensor for name, tensor in tensors.items() if name != lost},
            "has lora_A, not lora_A and lora_B",
        ),
        (
            tensors | {"base_model.model.lm_head.weight": torch.zeros(2, 2)},
            "brings base_model.model.lm_head.weight",
        ),
        (tensors | {lost: torch.full((64, 4), float("nan"))}, "finite|NaN|nan"),
        ({}, "no tensors"),
    ):
        save_file(changed, adapter / WEIGHTS)
        with pytest.raises(ModelError, match=reason):
            write_adapter_gguf(adapter, base, tmp_path / "a.gguf", name="x")
    assert not list(tmp_path.glob("*a.gguf"))


def test_folders_that_are_no_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="never loaded"):
        write_adapter_gguf(adapter, base, tmp_path / "a.gguf", name="x")
    with pytest.raises(ModelError, match="no PEFT adapter"):
        write_adapter_gguf(base, base, tmp_path / "a.gguf", name="x")
