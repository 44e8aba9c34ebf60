"""Which base an adapter goes on: named, beside it, in the hub's cache; and which adapters are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Command
from hub_server import Hub, running_hub
from tiny_adapters import lora, write_adapter

from myna.model.load import load_base
from myna.run import read_json


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "theirs", tiny_base, lora())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("MYNA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def renamed(folder: Path, adapter: Path, **changes: Any) -> Path:
    """A copy of an adapter whose config says something else."""
    shutil.copytree(adapter, folder)
    config = read_json(folder / "adapter_config.json") | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import close_session, constants

    with running_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running
    close_session()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_base_is_looked_for_beside_the_adapter_and_in_the_hubs_cache(
    myna: Command, tmp_path: Path, adapter: Path, tiny_base: Path, hub: Hub
) -> None:
    shutil.copytree(tiny_base, tmp_path / "models/base")
    renamed(tmp_path / "models/near", adapter, base_model_name_or_path="../base")
    assert myna("merge", "models/near").returncode == 0
    commit = hub.add("org/tiny", files_of(tiny_base), "v1")
    renamed(tmp_path / "far", adapter, base_model_name_or_path="org/tiny", revision="v1")
    unknown = myna("merge", "far")
    assert unknown.returncode == 3 and "--base hf:org/tiny@v1 fetches it" in unknown.stderr
    assert hub.asked == []  # nobody asked for that
    assert not (tmp_path / "runs/far").exists()
    asked = myna("merge", "far", "--base", "hf:org/tiny@v1")
    assert asked.returncode == 0, asked.stderr
    base = read_json(tmp_path / "runs/far/run.json")["base"]
    assert (base["name"], base["commit"]) == ("hf:org/tiny@v1", commit)
    assert f"base: hf:org/tiny@{commit}" in (tmp_path / "runs/far/recipe.yaml").read_text()
    num_asked = len(hub.asked)
    cached = myna("merge", "far", "--name", "cached")
    assert cached.returncode == 0 and len(hub.asked) == num_asked
    assert read_json(tmp_path / "runs/cached/run.json")["base"]["commit"] == commit


def test_an_adapter_comes_from_the_hub(
    myna: Command, tmp_path: Path, adapter: Path, tiny_base: Path, hub: Hub
) -> None:
    junk = {"README.md": b"x", "optimizer.pt": b"x" * 30_000, "adapter_model.bin": b"x" * 30_000}
    commit = hub.add("me/orders", files_of(adapter) | junk)
    done = myna("merge", "hf:me/orders", "--base", str(tiny_base))
    assert done.returncode == 0, done.stderr
    source = read_json(tmp_path / "runs/orders/run.json")["source"]
    assert (source["kind"], source["path"]) == ("adapter", f"hf:me/orders@{commit}")
    assert not any("optimizer" in path or ".bin" in path for path in hub.paths())
    whole = hub.add("org/tiny", files_of(tiny_base))
    refused = myna("merge", "hf:org/tiny")
    assert refused.returncode == 2 and "nothing to merge" in refused.stderr
    exported = myna("export", "hf:org/tiny@main", "--quantize", "Q8_0")
    assert exported.returncode == 0, exported.stderr
    assert read_json(tmp_path / "runs/tiny/run.json")["base"]["commit"] == whole


def test_a_wrong_base_is_refused_and_leaves_no_run(
    myna: Command, tmp_path: Path, adapter: Path, tiny_base: Path
) -> None:
    from myna.adapters.files import load_adapter, save_adapter
    from myna.model.sources import resolve_base

    shutil.copytree(adapter, tmp_path / "theirs")
    tiny.write_base(tmp_path / "wide", hidden_size=128, head_dim=32)
    wrong = myna("merge", "theirs", "--base", "wide")
    assert wrong.returncode == 3 and "does not fit" in wrong.stderr
    assert not (tmp_path / "runs/theirs").exists()
    # of the same shapes, and Myna wrote down which it was
    ours = load_adapter(load_base(tiny_base, "fp32"), adapter)
    save_adapter(ours, tmp_path / "ours", base_sha256=resolve_base(str(tiny_base)).sha256)
    tiny.write_base(tmp_path / "other", initializer_range=0.3)
    for command in (("merge", "ours"), ("chat", "ours", "--once", "x")):
        other = myna(*command, "--base", "other")
        assert other.returncode == 3 and "trained on other weights than those of other" in other.stderr
    assert myna("merge", "ours", "--base", str(tiny_base)).returncode == 0


def _prompt_tuning() -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "prompt tuning": (_prompt_tuning, {}, "PROMPT_TUNING cannot be merged"),
    "activated": (lora, {"alora_invocation_tokens": [5, 6]}, "activated LoRA"),
    "no such method": (lora, {"peft_type": "MAGIC"}, "peft has no method 'MAGIC'"),
    "no base": (lora, {"base_model_name_or_path": None}, "names no base model"),
    "a base that is gone": (lora, {"base_model_name_or_path": "./gone"}, "is not on this disk"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("command", [("merge",), ("chat", "--once", "x")])
def test_an_adapter_that_cannot_be_used_is_refused(
    myna: Command, tmp_path: Path, tiny_base: Path, name: str, command: tuple[str, ...]
) -> None:
    config, changes, message = REFUSED[name]
    renamed(tmp_path / "theirs", write_adapter(tmp_path / "saved", tiny_base, config()), **changes)
    done = myna(command[0], "theirs", *command[1:])
    assert done.returncode == 3 and message in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()


def test_chat_answers_through_base_and_adapter(
    myna: Command, tmp_path: Path, adapter: Path, tiny_base: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "theirs")
    question = ("--once", "I want the red lamp.", "--max-tokens", "6", "--temperature", "0", "--json")
    said = myna("chat", "theirs", *question)
    assert said.returncode == 0, said.stderr
    assert myna("merge", "theirs").returncode == 0
    merged = myna("chat", "runs/theirs/merged", *question)
    base = myna("chat", str(tiny_base), *question)
    answers = [json.loads(done.stdout)["text"] for done in (said, merged, base)]
    assert answers[0] == answers[1] != answers[2]
    flag = myna("chat", str(tiny_base), "--base", "x", *question)
    assert flag.returncode == 2 and "--base is for an adapter" in flag.stdout
