"""Checkpoints: what is read back is what was written, and what is damaged is set aside and said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from myna.checkpoint import (
    TrainState,
    collect_state,
    list_checkpoints,
    load_newest,
    restore_state,
    save_checkpoint,
    verify_checkpoint,
)
from myna.errors import CheckpointError


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


def saved(folder: Path, *steps: int, keep: int = 9) -> None:
    for number in steps:
        parameters, optimizer = trained(number)
        save_checkpoint(folder, collect_state(number, parameters, optimizer, {"epoch": 0}), keep)


def test_going_on_from_a_checkpoint_is_going_on(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    straight, _ = trained(5)
    parameters, optimizer = trained(0)
    torch.manual_seed(99)
    found = load_newest(tmp_path)
    assert found.state is not None and found.said == ()
    restore_state(found.state, parameters, optimizer)
    for _ in range(2):
        step(parameters, optimizer)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, straight[name])


def test_another_adapter_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    state = load_newest(tmp_path).state
    assert isinstance(state, TrainState)
    other = {"a": torch.nn.Parameter(torch.zeros(4)), "b": torch.nn.Parameter(torch.zeros(2, 3))}
    with pytest.raises(CheckpointError, match="another adapter"):
        restore_state(state, other, torch.optim.AdamW(other.values()))


def truncate(path: Path) -> None:
    file = path / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip(path: Path) -> None:
    file = path / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "one bit": flip,
    "missing file": lambda path: (path / "state.json").unlink(),
    "edited": lambda path: (path / "state.json").write_text('{"step": 4}'),
    "no manifest": lambda path: (path / "MANIFEST.json").unlink(),
    "empty manifest": lambda path: (path / "MANIFEST.json").write_text(""),
    "odd manifest": lambda path: (path / "MANIFEST.json").write_text('{"files": [1]}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, 1, 2)
    DAMAGES[damage](tmp_path / "step-000002")
    assert verify_checkpoint(tmp_path / "step-000001") is None
    found = load_newest(tmp_path)
    assert found.state is not None and found.state.step == 1
    assert "step-000002 is damaged" in found.said[0]
    assert (tmp_path / "step-000002.damaged").is_dir()


def test_all_damaged_is_an_error_now_and_later(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    for path in list_checkpoints(tmp_path):
        truncate(path)
    for _ in range(2):
        with pytest.raises(CheckpointError) as caught:
            load_newest(tmp_path)
        assert caught.value.exit_code == 4


def test_no_checkpoint_is_the_beginning(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "none").state is None
    (tmp_path / ".tmp-step-000003").mkdir()  # a process died while writing it
    assert load_newest(tmp_path).state is None


def test_the_newest_stay(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 10, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000003", "step-000010"]


def test_nothing_in_it_is_pickled(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    names = sorted(path.name for path in (tmp_path / "step-000001").iterdir())
    assert names == ["MANIFEST.json", "adapter.safetensors", "optimizer.safetensors", "state.json"]
