"""What a model folder may hold: links of the hub's cache work, others do not; what transformers knows needs no code."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from myna.adapters.files import load_adapter
from myna.adapters.folders import check_adapter_folder, check_adapter_patterns
from myna.data.conversation import Conversation, Message
from myna.data.render import load_chat_tokenizer, render_example
from myna.errors import DataError, MachineError, ModelError
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


def test_sizes_that_say_there_is_none_pass(folder: Path) -> None:
    change(folder / "config.json", num_local_experts=0, sliding_window=False)
    check_model_folder(folder)
    change(folder / "config.json", intermediate_size=0)
    with pytest.raises(ModelError, match="intermediate_size is '0'"):
        check_model_folder(folder)


def test_an_index_without_metadata_is_refused_with_its_cure(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    with pytest.raises(ModelError, match="has no metadata") as error:
        check_model_folder(folder)
    assert error.value.help == 'add "metadata": {} to it'


def add_token(folder: Path, content: str, number: int, *, special: bool = True) -> None:
    value = json.loads((folder / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    value["added_tokens"].append({"id": number, "content": content, **plain})
    (folder / "tokenizer.json").write_text(json.dumps(value))


def test_an_added_token_beyond_the_embeddings_is_refused_in_raw_text_only(folder: Path) -> None:
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    size = load_chat_tokenizer(folder).vocab_size
    for number in range(size, rows + 1):  # tokenizers numbers added tokens one after the other
        add_token(folder, f"<soft-{number}>", number)
    check_model_folder(folder)
    tokenizer = load_chat_tokenizer(folder)
    assert tokenizer.encode(f"<soft-{size}>" if size < rows else "a")
    with pytest.raises(DataError, match=f"holds '<soft-{rows}>', a token .* no embedding for"):
        tokenizer.encode(f"look at <soft-{rows}> here")
    talk = Conversation((Message("user", "a"), Message("assistant", f"<soft-{rows}>")))
    example = render_example(
        talk, tokenizer, 100
    )  # what a message says is text, also where it spells a token
    assert max(example.input_ids_T) < rows and f"<soft-{rows}>" in tokenizer.decode(
        example.input_ids_T.tolist()
    )
    value = json.loads((folder / "tokenizer.json").read_text())
    value["model"]["vocab"]["beyond"] = rows
    (folder / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(ModelError, match="has a token with the number"):
        check_model_folder(folder)


def test_a_trained_adalora_adapter_merges(tiny_base: Path, tmp_path: Path) -> None:
    from peft import AdaLoraConfig, get_peft_model

    names = ["k_proj", "v_proj"]
    steps = {"total_step": 12, "tinit": 1, "tfinal": 2, "deltaT": 1}
    config = AdaLoraConfig(task_type="CAUSAL_LM", target_modules=names, init_r=4, target_r=2, **steps)
    torch.manual_seed(0)
    model = get_peft_model(load_base(tiny_base, "fp32"), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(12):
        ids = torch.randint(0, 200, (2, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    ranks = json.loads(path.read_text())["rank_pattern"]
    assert ranks and all(isinstance(kept, bool) for kept in next(iter(ranks.values())))
    check_adapter_folder(tmp_path)
    merged = load_adapter(load_base(tiny_base, "fp32"), tmp_path).merge_and_unload()
    ids = torch.arange(8)[None]
    model.eval()
    torch.testing.assert_close(
        merged(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5
    )
    for changes in ({"peft_type": "LORA"}, {"rank_pattern": {"q": [True] * 10**5}}):
        change(path, rank_pattern=ranks)
        change(path, **changes)
        with pytest.raises(ModelError, match="rank_pattern is"):
            check_adapter_folder(tmp_path)
        change(path, peft_type="ADALORA")


def test_a_pattern_is_given_processor_time_and_not_the_clocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "python"  # a machine so busy that the interpreter comes up late
    slow.write_text(f'#!/bin/sh\nsleep 1.5\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"target_modules": r"a+\.q_proj"}))
    check_adapter_patterns(tmp_path, ["aa.q_proj"])
