"""Checkpoints: directories written aside, synced, named last. Safetensors and JSON, nothing pickled.

    checkpoints/step-000120/   adapter.safetensors optimizer.safetensors state.json MANIFEST.json

MANIFEST.json holds size and SHA-256 of every other file, what the run was made from, and its own digest: a checkpoint
without one, or that does not match it, is no checkpoint. Loading takes the newest that verifies; a damaged one is renamed to
NAME.damaged and said.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.errors import CheckpointError, DataError
from myna.model.folders import PICKLED, WHY_NO_PICKLE
from myna.run import file_sha256, new_directory, put_back, read_json, sync_file, timestamp, write_json
from myna.state import Snapshot, State

FORMAT = 2
NAME = re.compile(r"step-(\d+)")
MANIFEST = "MANIFEST.json"
OF_ADAPTER, OF_OTHERS, FACTS = "adapter.safetensors", "optimizer.safetensors", "state.json"
SMALL_FILES_BYTES = 1 << 20  # state.json, MANIFEST.json, headers of tensors, the directory itself


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    found = NAME.fullmatch(path.name)
    assert found, path
    return int(found[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first; those set aside and half-written ones are not among them."""
    return sorted((path for path in folder.glob("step-*") if NAME.fullmatch(path.name)), key=step_of)


# Writing


def save_checkpoint(folder: Path, snapshot: Snapshot, made_from: Mapping[str, Any]) -> Path:
    """Writes checkpoints/step-NNNNNN; MachineError, and nothing under that name, where it cannot be written.

    `made_from` goes into the manifest: recipe, plan, base, data and versions of the run.
    """
    from safetensors.torch import save_file

    path = folder / f"step-{snapshot.step:06d}"
    with new_directory(path) as temporary:
        for name, tensors in _tensor_files(snapshot).items():
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / name)
        facts = {name: dict(state.facts) for name, state in snapshot.states.items()}
        write_json(temporary / FACTS, {"step": snapshot.step, "states": facts})
        files = sorted(temporary.iterdir())
        for file in files:
            sync_file(file)
        entries = {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in files}
        manifest = {"format": FORMAT, "step": snapshot.step, "made": timestamp(), "files": entries}
        write_json(temporary / MANIFEST, _signed(manifest | dict(made_from)))
    return path


def _tensor_files(snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    """The tensors of each file by name: the adapter's have one of their own, others' names begin with the owner's."""
    adapter = dict(snapshot.states["adapter"].tensors)
    others = {
        f"{owner}/{name}": tensor
        for owner, state in snapshot.states.items()
        for name, tensor in state.tensors.items()
        if owner != "adapter"
    }
    return {OF_ADAPTER: adapter, OF_OTHERS: others}


def num_bytes_of(snapshot: Snapshot) -> int:
    """What a checkpoint takes on disk, at most."""
    tensors = (tensor for state in snapshot.states.values() for tensor in state.tensors.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) + SMALL_FILES_BYTES


def _signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the SHA-256 of all else in it, written without spaces and its keys in order."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return {**manifest, "sha256": hashlib.sha256(text.encode()).hexdigest()}


# Keeping


def prune(folder: Path, *, newest: int, best_step: int | None = None, every: int | None = None) -> None:
    """Removes all checkpoints but the `newest` ones, the best, and those whose step is a multiple of `every`.

    To be called after a commit only. One that is being removed has another name first: a kill leaves no half of one.
    """
    found = list_checkpoints(folder)
    for path in found[:-newest]:
        step = step_of(path)
        if step == best_step or (every and step % every == 0):
            continue
        leaving = path.with_name(f".tmp-pruned-{path.name}")
        with contextlib.suppress(OSError):  # somebody else's hand was faster
            os.replace(path, leaving)
        _remove(leaving)


def tidy(folder: Path) -> None:
    """Cleans up after a process that was killed while it saved or pruned."""
    for old in folder.glob(".old-step-*"):
        put_back(old.with_name(old.name.removeprefix(".old-")))
    for left in leftovers(folder):
        if not left.name.endswith(".damaged"):
            _remove(left)


def _remove(path: Path) -> None:
    """What can be removed of it; something may have been faster, or hold it."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """What is no checkpoint: damaged ones that were set aside, and what a kill left half-done."""
    found = list(folder.iterdir()) if folder.is_dir() else []
    return sorted(
        path for path in found if path.name.startswith((".tmp-", ".old-")) or path.suffix == ".damaged"
    )


# Reading


def verify_checkpoint(path: Path) -> str | None:
    """None where every file is as the manifest says, else what is wrong, naming the file.

    CheckpointError where it was written by a newer Myna.
    """
    if not path.is_dir():
        return "it is no folder"
    try:
        manifest = read_manifest(path)
    except DataError as error:
        return error.message
    try:
        for name, entry in manifest["files"].items():
            fault = _file_fault(path / name, entry["bytes"], entry["sha256"])
            if fault:
                return f"{name} {fault}"
        missing = {OF_ADAPTER, OF_OTHERS, FACTS} - manifest["files"].keys()
    except (KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    return f"{MANIFEST} does not name {min(missing)}" if missing else None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; DataError where it is not whole, or is of another step than the folder's name.

    CheckpointError where it was written by a newer Myna.
    """
    if not (path / MANIFEST).is_file():
        raise DataError(f"it has no {MANIFEST}{_pickles_in(path)}")
    try:
        manifest = read_json(path / MANIFEST)
    except (DataError, OSError) as error:
        raise DataError(f"{MANIFEST} cannot be read ({_reason(error)})") from None
    if "format" not in manifest and "sha256" not in manifest:  # of the first format: nothing more to compare
        return manifest
    unsigned = {name: value for name, value in manifest.items() if name != "sha256"}
    if _signed(unsigned) != manifest:
        raise DataError(f"{MANIFEST} is not what was written")
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            f"was written by a newer Myna (its format is {manifest['format']}, this one reads up to {FORMAT})",
            where=str(path),
            help="pip install --upgrade myna",
        )
    if NAME.fullmatch(path.name) and manifest["step"] != step_of(path):
        raise DataError(f"{MANIFEST} is that of step {manifest['step']}")
    return manifest


def _pickles_in(path: Path) -> str:
    """What is said of a folder that another trainer wrote; nothing of others."""
    names = [file.name for file in path.iterdir() if PICKLED.fullmatch(file.name)] if path.is_dir() else []
    if not names:
        return ""
    return f"; {min(names)} is pickled: {WHY_NO_PICKLE}; its own checkpoints are safetensors and JSON"


def _file_fault(file: Path, num_bytes: int, sha256: str) -> str | None:
    try:
        if not file.is_file():
            return "is missing"
        if file.stat().st_size != num_bytes:
            return f"has {file.stat().st_size:,} bytes and not {num_bytes:,}"
        return None if file_sha256(file) == sha256 else "is not what was written"
    except OSError as error:
        return f"cannot be read ({_reason(error)})"


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, DataError) else str(getattr(error, "strerror", None) or error)


@dataclass(frozen=True)
class Found:
    """The newest good checkpoint, if any, and what was set aside on the way to it."""

    path: Path | None
    said: tuple[str, ...]


def find_newest(folder: Path, *, set_aside: bool = True) -> Found:
    """The newest checkpoint that verifies. CheckpointError where there are some and all are damaged.

    Damaged ones are renamed and said; without `set_aside` they are said alone (a folder that is not ours to change).
    """
    said: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        fault = verify_checkpoint(path)
        if fault is None:
            return Found(path, tuple(said))
        aside = _set_aside(path) if set_aside else None
        said.append(
            f"{path.name} is damaged ({fault})" + (f"; it was renamed to {aside.name}" if aside else "")
        )
    if said or any(path.suffix == ".damaged" for path in leftovers(folder)):
        raise CheckpointError(
            "every checkpoint is damaged: " + "; ".join(said or ["all were set aside before"]),
            where=str(folder),
            help="--resume-from takes one from a copy (checkpoint.mirror); to start afresh remove the run directory, or "
            "--set run.name=NAME",
        )
    return Found(None, ())


def _set_aside(path: Path) -> Path | None:
    """Its new name; None where the folder cannot be written, which hides nothing: it is passed over again next time."""
    for aside in _free_names(path):
        try:
            path.rename(aside)
        except OSError:
            return None
        return aside
    return None


def _free_names(path: Path) -> Iterator[Path]:
    names = [f"{path.name}.damaged", *(f"{path.name}-{number}.damaged" for number in range(2, 1000))]
    yield from (path.with_name(name) for name in names if not path.with_name(name).exists())


def read_snapshot(path: Path) -> Snapshot:
    """The state of every owner as a checkpoint that was verified holds it."""
    from safetensors.torch import load_file

    facts = read_json(path / FACTS)
    states = {"adapter": State(load_file(path / OF_ADAPTER))}
    tensors = load_file(path / OF_OTHERS)
    if "states" not in facts:
        return _of_first_format(facts, states, tensors)
    for owner, values in facts["states"].items():
        own = {k.removeprefix(f"{owner}/"): v for k, v in tensors.items() if k.startswith(f"{owner}/")}
        states[owner] = State(own or states.get(owner, State()).tensors, values)
    return Snapshot(facts["step"], states)


def _of_first_format(
    facts: Mapping[str, Any], states: Mapping[str, State], tensors: Mapping[str, Any]
) -> Snapshot:
    """Checkpoints of before each owner had a name: step, epoch and loss scale side by side, torch's generator alone."""
    moments = {name: tensor for name, tensor in tensors.items() if name != "rng/torch"}
    return Snapshot(
        facts["step"],
        {
            **states,
            "optimizer": State(moments),
            "random": State({"torch": tensors["rng/torch"]}),
            "scale": State(facts=facts.get("loss_scale", {})),
            "position": State(facts={"step": facts["step"], "epoch": facts["epoch"]}),
            "progress": State(),
        },
    )
