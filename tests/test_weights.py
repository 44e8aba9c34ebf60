"""Weights read tensor by tensor: shards and their faults, base + adapter as one, and what memory it takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import write_tokenizer
from tiny_lora import merged_by_peft, new_adapter, new_base

from myna.adapters.files import WEIGHTS
from myna.errors import ModelError
from myna.export.gguf import write_gguf
from myna.export.safetensors_file import write_folder
from myna.export.weights import open_adapted, open_weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = new_base(tmp_path_factory.mktemp("base"))
    write_tokenizer(folder)
    return folder


# --- shards


def shard(base: Path, folder: Path, **changes: str) -> dict[str, str]:
    """Two files and an index, which says of the tensors in `changes` that they lie elsewhere."""
    tensors = load_file(base / "model.safetensors")
    placed = {name: f"model-{name.count('layers.0')}.safetensors" for name in sorted(tensors)}
    folder.mkdir()
    for file in set(placed.values()):
        save_file({name: tensors[name] for name in tensors if placed[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed | changes}))
    return placed


def test_shards_are_one_model(base: Path, tmp_path: Path) -> None:
    shard(base, tmp_path / "m")
    with open_weights(tmp_path / "m") as parts, open_weights(base) as whole:
        assert dict(parts.shapes) == dict(whole.shapes)
        assert len(set(parts.paths.values())) == 2
        for name in whole.shapes:
            assert np.array_equal(parts.rows(name), whole.rows(name))


def test_a_single_file_is_taken_before_an_index_as_transformers_does(base: Path, tmp_path: Path) -> None:
    placed = shard(base, tmp_path / "m")
    name = "model.norm.weight"
    save_file(
        load_file(base / "model.safetensors") | {name: torch.full((64,), 7.0)},
        tmp_path / "m/model.safetensors",
    )
    with open_weights(tmp_path / "m") as weights:
        assert set(weights.shapes) == set(placed)
        assert weights.rows(name)[0, 0] == 7.0


def refuse(folder: Path, reason: str) -> None:
    with pytest.raises(ModelError, match=reason), open_weights(folder):
        pass


def test_a_shard_is_missing(base: Path, tmp_path: Path) -> None:
    shard(base, tmp_path / "m")
    (tmp_path / "m/model-1.safetensors").unlink()
    refuse(tmp_path / "m", "model-1.safetensors: there is no such file")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("model-1.safetensors", "model.norm.weight lies in model-1.safetensors, where it is not"),
        ("../model.safetensors", "no file of this folder"),
        ("/model.safetensors", "no file of this folder"),
    ],
)
def test_an_index_that_is_wrong(base: Path, tmp_path: Path, file: str, reason: str) -> None:
    shard(base, tmp_path / "m", **{"model.norm.weight": file})
    refuse(tmp_path / "m", reason)


def test_an_index_that_names_what_no_file_has(base: Path, tmp_path: Path) -> None:
    shard(base, tmp_path / "m", lost="model-1.safetensors")
    refuse(tmp_path / "m", "says that lost lies in model-1.safetensors, where it is not")


def test_a_tensor_in_two_shards(base: Path, tmp_path: Path) -> None:
    placed = shard(base, tmp_path / "m")
    path = tmp_path / "m/model-0.safetensors"
    other = next(name for name, file in placed.items() if file == "model-1.safetensors")
    save_file(load_file(path) | {other: torch.zeros(2)}, path)
    refuse(tmp_path / "m", f"{other} lies in two files: model-0.safetensors and model-1.safetensors")


def test_files_that_are_none(base: Path, tmp_path: Path) -> None:
    refuse(tmp_path, "model.safetensors: there is no such file")
    shard(base, tmp_path / "m")
    path = tmp_path / "m/model-0.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuse(tmp_path / "m", "model-0.safetensors: cannot be read")
    (tmp_path / "m/model.safetensors.index.json").write_text("{}")
    refuse(tmp_path / "m", "no weight_map")


# --- base + adapter


SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 5, "v_proj": 3}},
    "both ends": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "one layer": {"layers_to_transform": [1], "target_modules": ["down_proj"]},
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_peft_s_to_the_last_bit(base: Path, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Base and adapter in float32, and both in bfloat16, which are summed in float32 all the same."""
    adapter = new_adapter(base, tmp_path / "adapter", **SETTINGS[kind])
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    for source, target in ((base, folder / "model.safetensors"), (adapter, adapter / WEIGHTS)):
        tensors = load_file(source / target.name)
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, target, {"format": "pt"})
    merged = merged_by_peft(folder, adapter).state_dict()
    with open_adapted(folder, adapter) as adapted:
        changed = 0
        for name in adapted.shapes:
            assert np.array_equal(adapted.rows(name).reshape(merged[name].shape), merged[name].numpy()), name
            changed += not np.array_equal(adapted.rows(name), adapted.base.rows(name))
    assert changed == len(adapted.lora.pairs) > 0


@pytest.mark.parametrize("file_type", ["F32", "F16", "Q4_K_M"])
def test_a_file_straight_from_the_adapter_is_the_file_of_merged(
    base: Path, tmp_path: Path, file_type: str
) -> None:
    adapter = new_adapter(base, tmp_path / "adapter")
    merged_by_peft(base, adapter).save_pretrained(tmp_path / "merged")
    with open_adapted(base, adapter) as adapted:
        straight = write_gguf(base, base, tmp_path / "a.gguf", file_type, name="x", weights=adapted)
    through = write_gguf(tmp_path / "merged", base, tmp_path / "m.gguf", file_type, name="x")
    assert straight.sha256 == through.sha256
    assert write_gguf(base, base, tmp_path / "b.gguf", file_type, name="x").sha256 != straight.sha256


def test_a_sum_that_is_not_finite(base: Path, tmp_path: Path) -> None:
    adapter = new_adapter(base, tmp_path / "adapter")
    tensors = load_file(adapter / WEIGHTS)
    name = next(name for name in tensors if "q_proj.lora_B" in name)
    save_file(tensors | {name: torch.full_like(tensors[name], float("inf"))}, adapter / WEIGHTS)
    with (
        open_adapted(base, adapter) as adapted,
        pytest.raises(ModelError, match=r"q_proj\.weight: .* not finite"),
    ):
        adapted.rows("model.layers.0.self_attn.q_proj.weight")


def test_an_adapter_that_is_more_is_not_summed(base: Path, tmp_path: Path) -> None:
    adapter = new_adapter(base, tmp_path / "adapter", use_dora=True)
    with pytest.raises(ModelError, match="DoRA"), open_adapted(base, adapter):
        pass


# --- files written tensor by tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_file_is_the_one_that_safetensors_writes(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    with open_weights(base) as weights:
        write_folder(tmp_path, weights, list(tensors), dtype)
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_shards_are_read_by_transformers(base: Path, tmp_path: Path) -> None:
    from myna.model.load import load_base

    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with open_weights(base) as weights:
        write_folder(tmp_path, weights, list(weights.shapes), torch.float32, shard_bytes=60_000)
    sizes = [path.stat().st_size for path in tmp_path.glob("model-*-of-*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 90_000  # the embeddings alone take 76,800 bytes
    assert not (tmp_path / "model.safetensors").exists()
    loaded, whole = load_base(tmp_path, "fp32").state_dict(), load_base(base, "fp32").state_dict()
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)


# --- memory

MEASURE = """
import re, sys
from pathlib import Path
from myna.export.gguf import write_gguf
from myna.export.safetensors_file import write_folder
from myna.export.weights import open_adapted
import torch

def peak(key="VmHWM"):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def run(base, adapter, out):
    with open_adapted(base, adapter) as weights:
        write_folder(out, weights, list(weights.shapes), torch.float32)
        write_gguf(base, base, out / "m.gguf", "Q8_0", name="x", weights=weights)

small, small_adapter, base, adapter, out = map(Path, sys.argv[1:])
run(small, small_adapter, out)  # what libraries, tokenizer and encoder take
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = peak("VmRSS")
run(base, adapter, out)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """Merged/ and a file straight from the adapter, of a model many times as large as its largest tensor."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "tie_word_embeddings": True,
        "num_hidden_layers": 24,
    }
    arguments: list[Path] = []
    for name, changes in (("small", {}), ("large", sizes)):
        base = new_base(tmp_path / name, vocab_size=4096, **changes)
        write_tokenizer(base)
        arguments += [base, new_adapter(base, tmp_path / f"{name}-adapter")]
    largest = 4096 * 256 * 4
    whole = (arguments[2] / "model.safetensors").stat().st_size
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", MEASURE, *map(str, [*arguments, out])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    grown = int(re.findall(r"\d+", done.stdout)[-1])
    assert grown < 4 * largest + (8 << 20) < whole / 3, f"{grown / 1e6:.0f} MB"
