"""What a model folder may hold: links of the hub's cache work, others do not; what transformers knows needs no code."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from myna.adapters.folders import check_adapter_patterns
from myna.errors import MachineError, ModelError
from myna.model.folders import check_model_folder
from myna.model.load import load_base, refuse_not_finite


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "model"))


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_sound_folder_passes_quickly(folder: Path) -> None:
    started = time.thread_time()
    check_model_folder(folder)
    assert time.thread_time() - started < 0.1


def in_hub_cache(folder: Path, cache: Path) -> Path:
    """The folder as huggingface_hub keeps it: a snapshot of links to blobs."""
    snapshot, blobs = cache / "models--org--tiny/snapshots/abc", cache / "models--org--tiny/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_links_of_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(folder, tmp_path / "cache")
    check_model_folder(snapshot)
    (tmp_path / "shortcut").symlink_to(snapshot)  # the folder itself may be named by a link
    check_model_folder(tmp_path / "shortcut")


def test_a_link_out_of_the_hubs_cache_is_not(folder: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(folder, tmp_path / "cache")
    config = snapshot / "config.json"
    shutil.copy(config, tmp_path / "outside.json")
    config.unlink()
    config.symlink_to(tmp_path / "outside.json")
    with pytest.raises(ModelError, match="link out of its folder"):
        check_model_folder(snapshot)


def test_files_that_are_not_read_may_be_anything(folder: Path, tmp_path: Path) -> None:
    (folder / "notes.txt").symlink_to("/nowhere")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (folder / "onnx").mkdir()
    check_model_folder(folder)


def test_code_for_a_model_that_transformers_knows_is_not_needed(folder: Path) -> None:
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    (folder / "modeling_mine.py").write_text("raise SystemExit('this code was run')")
    check_model_folder(folder)
    assert type(load_base(folder, "fp32")).__module__.startswith("transformers.")


def test_a_folder_with_model_and_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="which of the two"):
        check_model_folder(folder)


def test_shards_pass_and_a_tensor_in_two_does_not(folder: Path, tiny_base: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for shard, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_model_folder(folder)
    expected = load_base(tiny_base, "fp32").state_dict()
    torch.testing.assert_close(load_base(folder, "fp32").state_dict(), expected)
    save_file(tensors, folder / "b.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"is in a\.safetensors and in b\.safetensors"):
        check_model_folder(folder)


def test_fewer_layers_than_the_weights_have_are_a_model(folder: Path) -> None:
    change(folder / "config.json", num_hidden_layers=1)
    check_model_folder(folder)


def test_values_that_are_large_and_finite_pass() -> None:
    large = torch.full((8, 8), torch.finfo(torch.float16).max, dtype=torch.float16)
    refuse_not_finite([("large", large), ("whole", torch.arange(3))], Path("here"))
    with pytest.raises(ModelError, match="2 of the 64 values of a are not finite"):
        bad = large.clone()
        bad[0, 0], bad[7, 7] = torch.nan, -torch.inf
        refuse_not_finite([("large", large), ("a", bad)], Path("here"))


def test_a_model_that_memory_cannot_hold_is_the_machines_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    def full(*_: Any, **__: Any) -> None:
        torch.empty(1 << 50)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(MachineError, match="no room in memory"):
        load_base(folder, "fp32")


def test_patterns_that_end_pass(tmp_path: Path) -> None:
    config = {
        "target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(q|up)_proj",
        "rank_pattern": {"q_proj": 4},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    check_adapter_patterns(tmp_path, [f"model.layers.{n}.self_attn.q_proj" for n in range(32)])
