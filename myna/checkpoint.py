"""Checkpoints: directories written aside, synced, named last. Safetensors and JSON, nothing pickled.

    checkpoints/step-000120/   adapter.safetensors optimizer.safetensors state.json MANIFEST.json

MANIFEST.json holds size and SHA-256 of every other file: a checkpoint without one, or that does not match it, is no
checkpoint. Loading takes the newest that verifies; a damaged one is renamed to NAME.damaged and said.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from myna.errors import CheckpointError, DataError
from myna.run import file_sha256, new_directory, read_json, timestamp, write_json

TENSORS = ("adapter", "optimizer")


class StateOwner(Protocol):
    """An optimizer: by parameter, its tensors by name, as torch.optim.Optimizer has them."""

    @property
    def state(self) -> Mapping[Any, Any]: ...


@dataclass(frozen=True)
class TrainState:
    """All that training needs to go on: the adapter, the optimizer, how far it came, the random generator."""

    step: int
    adapter: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]


def collect_state(
    step: int,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: StateOwner,
    facts: Mapping[str, Any],
) -> TrainState:
    """Gathers the state after `step`; tensors are the live ones, to be saved before the next step."""
    moments: dict[str, torch.Tensor] = {"rng/torch": torch.get_rng_state()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            # one count of steps may stand for all: safetensors refuses tensors that share their memory
            moments[f"{key}/{name}"] = value if value.ndim else value.clone()
    adapter = {name: parameter.detach() for name, parameter in parameters.items()}
    return TrainState(step, adapter, moments, facts)


def restore_state(
    state: TrainState, parameters: Mapping[str, torch.nn.Parameter], optimizer: StateOwner
) -> None:
    """Puts a state back, bit for bit. CheckpointError where its names or shapes are not this adapter's."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.adapter.items()}
    if shapes != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
        raise CheckpointError(
            f"the checkpoint of step {state.step} holds another adapter than the recipe makes"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.adapter[name])
    for key, tensor in state.optimizer.items():
        kind, _, name = key.partition("/")
        if name not in parameters:
            continue
        held = optimizer.state[parameters[name]]
        if kind in held:
            held[kind].copy_(tensor)
        else:
            held[kind] = tensor.clone()
    torch.set_rng_state(state.optimizer["rng/torch"])


def save_checkpoint(folder: Path, state: TrainState, keep: int) -> Path:
    """Writes checkpoints/step-NNNNNN and then removes all but the newest `keep`."""
    from safetensors.torch import save_file

    path = folder / f"step-{state.step:06d}"
    with new_directory(path) as temporary:
        for part in TENSORS:
            tensors = {k: v.detach().cpu().contiguous() for k, v in getattr(state, part).items()}
            save_file(tensors, temporary / f"{part}.safetensors")
        write_json(temporary / "state.json", {"step": state.step, **state.facts})
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
            for file in sorted(temporary.iterdir())
        }
        write_json(temporary / "MANIFEST.json", {"made": timestamp(), "files": files})
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first; damaged and half-written ones are not among them."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.suffix != ".damaged")


def verify_checkpoint(path: Path) -> str | None:
    """None where every file is as the manifest says, else what is wrong."""
    manifest_path = path / "MANIFEST.json"
    if not manifest_path.is_file():
        return "it has no MANIFEST.json"
    try:
        files = read_json(manifest_path)["files"]
        for name, entry in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
                return f"{name} is not what was written"
    except (DataError, KeyError, TypeError, AttributeError) as error:
        return f"its MANIFEST.json cannot be read ({error})"
    return None


@dataclass(frozen=True)
class Found:
    """The newest good checkpoint, if any, and what was set aside on the way to it."""

    state: TrainState | None
    said: tuple[str, ...]


def load_newest(folder: Path) -> Found:
    """The newest checkpoint that verifies; damaged ones are renamed and said. CheckpointError where all are damaged."""
    said: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        fault = verify_checkpoint(path)
        if fault is None:
            return Found(_read_state(path), tuple(said))
        aside = _set_aside(path)
        said.append(f"{path.name} is damaged ({fault}); it was renamed to {aside.name}")
    if said or any(folder.glob("*.damaged")):
        raise CheckpointError(
            "every checkpoint is damaged: " + "; ".join(said or ["all were set aside before"]),
            where=str(folder),
            help="remove the run directory to start afresh, or give the run another run.name",
        )
    return Found(None, ())


def _set_aside(path: Path) -> Path:
    aside = path.with_name(f"{path.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}-{number}.damaged")
    path.rename(aside)
    return aside


def _read_state(path: Path) -> TrainState:
    from safetensors.torch import load_file

    facts = read_json(path / "state.json")
    adapter, optimizer = (load_file(path / f"{part}.safetensors") for part in TENSORS)
    return TrainState(int(facts.pop("step")), adapter, optimizer, facts)
