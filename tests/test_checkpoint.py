"""Checkpoints: what is read back is what was written, and what is damaged is set aside and said."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from myna.checkpoint import (
    MANIFEST,
    find_newest,
    leftovers,
    list_checkpoints,
    prune,
    read_manifest,
    read_snapshot,
    save_checkpoint,
    tidy,
    verify_checkpoint,
)
from myna.engine.scaling import Scaling
from myna.errors import CheckpointError, DataError
from myna.run import file_sha256
from myna.state import (
    AdapterState,
    OptimizerState,
    Owners,
    Position,
    Progress,
    RandomState,
    Snapshot,
    State,
    gather,
    restore,
)

Parameters = dict[str, torch.nn.Parameter]
MADE_FROM = {"run": "an id", "plan": {"sha256": "0", "entries": {"threads": 2}}}


def trained(steps: int) -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    torch.manual_seed(0)
    parameters = {"b": torch.nn.Parameter(torch.randn(3, 2)), "a": torch.nn.Parameter(torch.randn(4))}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(steps):
        step(parameters, optimizer)
    return parameters, optimizer


def step(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW) -> None:
    loss = sum((p * torch.randn_like(p)).sum() for p in parameters.values())
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def owners_of(parameters: Parameters, optimizer: torch.optim.AdamW, step: int = 0) -> Owners:
    return {
        "adapter": AdapterState(parameters),
        "optimizer": OptimizerState(parameters, optimizer),
        "random": RandomState(),
        "scale": Scaling(None),
        "position": Position(step),
        "progress": Progress(),
    }


def saved(folder: Path, *steps: int) -> None:
    for number in steps:
        save_checkpoint(folder, gather(number, owners_of(*trained(number), number)), MADE_FROM)


def newest_state(folder: Path) -> Snapshot:
    found = find_newest(folder)
    assert found.path is not None and found.said == ()
    return read_snapshot(found.path)


def test_going_on_from_a_checkpoint_is_going_on(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    straight, _ = trained(5)
    parameters, optimizer = trained(0)
    torch.manual_seed(99)
    owners = owners_of(parameters, optimizer)
    restore(newest_state(tmp_path), owners)
    assert owners["position"] == Position(3)
    for _ in range(2):
        step(parameters, optimizer)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, straight[name])


def test_another_adapter_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    other = {"a": torch.nn.Parameter(torch.zeros(4)), "b": torch.nn.Parameter(torch.zeros(2, 3))}
    with pytest.raises(
        CheckpointError, match=r"another adapter .* b is \[3, 2\] in float32 there and \[2, 3\]"
    ):
        restore(newest_state(tmp_path), owners_of(other, torch.optim.AdamW(other.values())))


def test_a_checkpoint_of_the_first_format_is_read(tmp_path: Path) -> None:
    """As they were before owners had names: no step in the manifest, torch's generator alone."""
    saved(tmp_path, 3)
    path = tmp_path / "step-000003"
    tensors = load_file(path / "optimizer.safetensors")
    old = {k.removeprefix("optimizer/"): v for k, v in tensors.items() if k.startswith("optimizer/")}
    save_file(old | {"rng/torch": tensors["random/torch"]}, path / "optimizer.safetensors")
    (path / "state.json").write_text('{"step": 3, "epoch": 1}')
    names = ("adapter.safetensors", "optimizer.safetensors", "state.json")
    files = {n: {"bytes": (path / n).stat().st_size, "sha256": file_sha256(path / n)} for n in names}
    (path / MANIFEST).write_text(json.dumps({"made": "2026", "files": files}))
    straight, _ = trained(5)
    parameters, optimizer = trained(0)
    owners = owners_of(parameters, optimizer)
    restore(newest_state(tmp_path), owners)
    assert owners["position"] == Position(3, 1)
    for _ in range(2):
        step(parameters, optimizer)
    assert all(torch.equal(parameter, straight[name]) for name, parameter in parameters.items())


def truncate(path: Path) -> None:
    file = path / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip(path: Path) -> None:
    file = path / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def edit_manifest(path: Path, **values: Any) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | values))


def swap(name: str) -> Callable[[Path], object]:
    return lambda path: shutil.copyfile(path.with_name("step-000001") / name, path / name)


def become_a_folder(path: Path) -> None:
    (path / "state.json").unlink()
    (path / "state.json").mkdir()


def become_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


def become_the_one_before(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-000001"), path)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "adapter.safetensors has"),
    "one bit": (flip, "optimizer.safetensors is not what was written"),
    "missing file": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "edited": (lambda path: (path / "state.json").write_text('{"step": 4}'), "state.json has"),
    "a folder": (become_a_folder, "state.json is missing"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), "it has no MANIFEST.json"),
    "empty manifest": (lambda path: (path / MANIFEST).write_text(""), "MANIFEST.json cannot be read"),
    "odd manifest": (lambda path: (path / MANIFEST).write_text('{"files": [1]}'), "MANIFEST.json cannot"),
    "no files": (lambda path: (path / MANIFEST).write_text('{"files": {}}'), "does not name adapter.safe"),
    "another date": (lambda path: edit_manifest(path, made="2020"), "MANIFEST.json is not what was written"),
    "another run": (lambda path: edit_manifest(path, run="other"), "MANIFEST.json is not what was written"),
    "adapter swapped": (swap("adapter.safetensors"), "adapter.safetensors is not what was written"),
    "manifest swapped": (swap(MANIFEST), "MANIFEST.json is that of step 1"),
    "whole one swapped": (become_the_one_before, "MANIFEST.json is that of step 1"),
    "a file": (become_a_file, "it is no folder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, 1, 2)
    harm, told = DAMAGES[damage]
    harm(tmp_path / "step-000002")
    assert verify_checkpoint(tmp_path / "step-000001") is None
    found = find_newest(tmp_path)
    assert found.path == tmp_path / "step-000001"
    assert found.said[0].startswith("step-000002 is damaged (") and told in found.said[0]
    assert "renamed to step-000002.damaged" in found.said[0]
    assert leftovers(tmp_path) == [tmp_path / "step-000002.damaged"]
    assert find_newest(tmp_path).said == ()


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    """Flipped one after another, each makes the checkpoint a damaged one."""
    saved(tmp_path, 1)
    manifest = tmp_path / "step-000001" / MANIFEST
    whole = manifest.read_bytes()
    silent = []
    for place in range(0, 8 * len(whole), 5):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        manifest.write_bytes(data)
        # a space or a line break less or more outside of the values says the same
        if verify_checkpoint(manifest.parent) is None and json.loads(data) != json.loads(whole):
            silent.append(place)
    assert silent == []


def test_one_that_a_newer_version_wrote_is_neither_used_nor_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import myna.checkpoint

    with monkeypatch.context() as patch:
        patch.setattr(myna.checkpoint, "FORMAT", 3)
        saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match="written by a newer Myna") as caught:
        find_newest(tmp_path)
    assert caught.value.exit_code == 4 and (tmp_path / "step-000001").is_dir()


def test_all_damaged_is_an_error_now_and_later(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    for path in list_checkpoints(tmp_path):
        truncate(path)
    for _ in range(2):
        with pytest.raises(CheckpointError) as caught:
            find_newest(tmp_path)
        assert caught.value.exit_code == 4


def test_a_folder_that_is_not_ours_is_left_as_it_is(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    truncate(tmp_path / "step-000002")
    found = find_newest(tmp_path, set_aside=False)
    assert found.path == tmp_path / "step-000001" and "renamed" not in found.said[0]
    assert len(list_checkpoints(tmp_path)) == 2


def test_no_checkpoint_is_the_beginning(tmp_path: Path) -> None:
    assert find_newest(tmp_path / "none").path is None
    (tmp_path / ".tmp-step-000003").mkdir()  # a process died while writing it
    assert find_newest(tmp_path).path is None


def steps_in(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder)]


def test_the_newest_the_best_and_every_nth_stay(tmp_path: Path) -> None:
    for number in (1, 2, 3, 4, 5, 6, 8, 1_000_000, 10_000_000):
        (tmp_path / f"step-{number:06d}").mkdir()
    prune(tmp_path, newest=2, best_step=3, every=4)
    assert steps_in(tmp_path) == [3, 4, 8, 1_000_000, 10_000_000]
    prune(tmp_path, newest=1)
    assert steps_in(tmp_path) == [10_000_000]
    assert list(tmp_path.glob(".*")) == []


def test_pruning_does_not_mind_another_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1, 2, 3)
    honest = os.replace

    def vanished(source: Any, target: Any) -> None:
        shutil.rmtree(source)
        honest(source, target)

    monkeypatch.setattr(os, "replace", vanished)
    prune(tmp_path, newest=1)
    assert steps_in(tmp_path) == [3] and verify_checkpoint(tmp_path / "step-000003") is None


def test_what_a_kill_left_is_cleaned_up(tmp_path: Path) -> None:
    """Half-written, half-pruned, half-replaced, with the old one whole or no longer needed."""
    saved(tmp_path, 1, 2, 3, 4)
    (tmp_path / "step-000001").rename(tmp_path / ".tmp-pruned-step-000001")
    (tmp_path / ".tmp-pruned-step-000001" / MANIFEST).unlink()
    (tmp_path / "step-000002").rename(tmp_path / ".old-step-000002")  # the new one never came
    shutil.copytree(tmp_path / "step-000003", tmp_path / ".old-step-000003")
    shutil.copytree(tmp_path / "step-000003", tmp_path / ".tmp-step-000005-abc")
    (tmp_path / ".tmp-file").write_text("")
    (tmp_path / "step-000004").rename(tmp_path / "step-000004.damaged")
    tidy(tmp_path)
    assert steps_in(tmp_path) == [2, 3] and verify_checkpoint(tmp_path / "step-000002") is None
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert (tmp_path / "step-000004.damaged").is_dir()


def test_the_manifest_says_what_it_is_of(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    manifest = read_manifest(tmp_path / "step-000002")
    assert manifest["step"] == 2 and MADE_FROM.items() <= manifest.items()
    with pytest.raises(DataError, match="it has no MANIFEST"):
        read_manifest(tmp_path)


def test_nothing_in_it_is_pickled(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    names = sorted(path.name for path in (tmp_path / "step-000001").iterdir())
    assert names == ["MANIFEST.json", "adapter.safetensors", "optimizer.safetensors", "state.json"]
    assert read_snapshot(tmp_path / "step-000001").states["scale"] == State()


def test_everything_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No power cut can be made here, so the order is looked at: files, manifest, folder, the name, the folder above."""
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(
            ("sync", "folder" if path.name.startswith(".tmp-step") else path.name.removeprefix(".tmp-"))
        )
        fsync(descriptor)

    def renamed(source: Any, target: Any) -> None:
        calls.append(("name", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    saved(tmp_path / "checkpoints", 1)
    named = calls.index(("name", "step-000001"))
    manifest = calls.index(("sync", MANIFEST))
    for name in ("adapter.safetensors", "optimizer.safetensors", "state.json"):
        assert calls.index(("sync", name)) < manifest, "the manifest is written last"
    assert calls.index(("name", MANIFEST)) < named
    assert calls[named - 1] == ("sync", "folder"), "the last before the name"
    assert calls[named + 1] == ("sync", "checkpoints")
