"""A copy of each checkpoint elsewhere, because hosted notebooks vanish and disks die; and the way back from one.

    FOLDER/NAME/   checkpoints/step-000120/ …   metrics.jsonl   recipe.yaml   mirror.json (which run it is of)

A mirror may lie on a drive that can neither rename folders nor sync: then a checkpoint's manifest is copied last, and one
without a manifest is none.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.checkpoint import (
    MANIFEST,
    NAME,
    find_newest,
    list_checkpoints,
    read_manifest,
    read_snapshot,
    step_of,
    verify_checkpoint,
)
from myna.errors import CheckpointError, DataError, MachineError, RecipeError, UsageError
from myna.model.sources import Say
from myna.run import Run, new_directory, read_json, sync_dir, sync_file, write_lines


@dataclass
class Mirror:
    """The folder that a run's checkpoints are copied to. What fails there is said; training goes on."""

    folder: Path

    def follow(self, run: Run, checkpoint: Path, say: Say) -> None:
        """Copies a checkpoint that was committed, and removes from the mirror what the run no longer keeps."""
        folder = self.folder / "checkpoints"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            copy_checkpoint(checkpoint, folder)
            for path in (run.metrics_path, run.recipe_path):
                _copy_file(path, self.folder / path.name)
            kept = {path.name for path in list_checkpoints(run.checkpoints_dir)}
            for old in list_checkpoints(folder):
                if old.name not in kept:
                    # without its manifest it is no checkpoint, however much of the rest a kill leaves
                    (old / MANIFEST).unlink(missing_ok=True)
                    shutil.rmtree(old, ignore_errors=True)
        except (OSError, CheckpointError) as error:
            reason = error.message if isinstance(error, CheckpointError) else (error.strerror or str(error))
            say(f"{checkpoint.name} could not be copied to {self.folder}: {reason}; training goes on without")


def open_mirror(run: Run, folder: str | None) -> Mirror | None:
    """The mirror of a run, made where it is not there; None where the recipe names no folder.

    RecipeError where it lies in the run, or is that of another run; MachineError where it cannot be written.
    """
    if folder is None:
        return None
    mirror = Path(folder).absolute() / run.name
    if run.path.resolve() in (mirror.resolve(), *mirror.resolve().parents):
        raise RecipeError(
            "checkpoint.mirror lies in the run itself: a copy there would go with it",
            where=folder,
            help="--set checkpoint.mirror=FOLDER, on another disk or drive",
        )
    told, identity = mirror / "mirror.json", run.info().get("id")
    if told.is_file() and read_json(told).get("run") != identity:
        raise RecipeError(
            f"holds the checkpoints of another run that is called {run.name}",
            where=str(mirror),
            help="--set checkpoint.mirror=FOLDER names another place; --resume-from takes that run's checkpoint",
        )
    try:
        mirror.mkdir(parents=True, exist_ok=True)
        write_lines(told, [f'{{"run": "{identity}"}}\n'])
    except (OSError, MachineError) as error:
        raise MachineError(
            f"checkpoint.mirror cannot be written: {error}",
            where=folder,
            help="mount it, or --set checkpoint.mirror=FOLDER",
        ) from error
    return Mirror(mirror)


def copy_checkpoint(source: Path, folder: Path) -> None:
    """Copies a checkpoint into another folder, its manifest last, and reads the copy back.

    CheckpointError where the copy is not the checkpoint; OSError as they come.
    """
    target, temporary = folder / source.name, folder / f".tmp-{source.name}"
    for path in (temporary, target):
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    _copy_files(source, temporary)
    try:
        os.replace(temporary, target)
    except OSError:  # a drive that cannot rename a folder
        _copy_files(source, target)
        shutil.rmtree(temporary, ignore_errors=True)
    with contextlib.suppress(OSError):
        sync_dir(folder)
    fault = verify_checkpoint(target)
    if fault:
        raise CheckpointError(f"the copy is not what was saved ({fault})", where=str(target))


def _copy_file(source: Path, target: Path) -> None:
    """A file that is replaced as a whole, where the drive can do that."""
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.copyfile(source, temporary)
    try:
        os.replace(temporary, target)
    except OSError:
        shutil.copyfile(source, target)
        temporary.unlink(missing_ok=True)


def _copy_files(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir(), key=lambda file: file.name == MANIFEST):
        shutil.copyfile(file, target / file.name)
        with contextlib.suppress(OSError):  # a drive that cannot sync
            sync_file(target / file.name)


# The way back


@dataclass(frozen=True)
class Taken:
    """A checkpoint that lies outside of its run: where, what its manifest says, and the metrics beside it, if any."""

    path: Path
    manifest: dict[str, Any]
    metrics_path: Path | None
    said: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return step_of(self.path)


def find_taken(place: Path, name: str) -> Taken:
    """The checkpoint that `--resume-from` means: one by itself, or the newest good one of a mirror or of a run.

    `name` is the run's, where a mirror holds several. UsageError where there is none; CheckpointError where the one that is
    named is damaged, or all of a folder are.
    """
    if NAME.fullmatch(place.name) or (place / MANIFEST).is_file():
        fault = verify_checkpoint(place) if NAME.fullmatch(place.name) else "its folder is named otherwise"
        if fault:
            raise CheckpointError(f"is damaged: {fault}", where=str(place), help="name another checkpoint")
        return _taken(place)
    folder = _checkpoints_in(place, name)
    found = find_newest(folder, set_aside=False)
    if found.path is None:
        raise UsageError("holds no checkpoint", where=str(folder), help="--resume-from CHECKPOINT or MIRROR")
    return _taken(found.path, found.said)


def _checkpoints_in(place: Path, name: str) -> Path:
    if not place.is_dir():
        raise UsageError(
            "--resume-from: there is no such folder", where=str(place), help="is its drive mounted?"
        )
    if list_checkpoints(place):
        return place
    for folder in (place / "checkpoints", place / name / "checkpoints"):
        if folder.is_dir():
            return folder
    runs = sorted(place.glob("*/checkpoints"))
    if len(runs) == 1:
        return runs[0]
    names = ", ".join(path.parent.name for path in runs)
    raise UsageError(
        f"holds {len(runs)} runs: {names}" if runs else "holds no checkpoint",
        where=str(place),
        help=f"--resume-from {runs[0].parent}" if runs else "--resume-from CHECKPOINT or MIRROR",
    )


def _taken(path: Path, said: tuple[str, ...] = ()) -> Taken:
    manifest = read_manifest(path)
    if "plan" not in manifest:
        raise DataError("was written before checkpoints said what they are of", where=str(path))
    metrics = path.parent.parent / "metrics.jsonl"
    return Taken(path, manifest, metrics if metrics.is_file() else None, said)


def bring_in(run: Run, taken: Taken, say: Say) -> None:
    """Copies a checkpoint into its run, with the metrics up to it where the run has none.

    UsageError where the run has a newer one of its own.
    """
    for sentence in taken.said:
        say(sentence)
    own = [path for path in list_checkpoints(run.checkpoints_dir) if verify_checkpoint(path) is None]
    if own and step_of(own[-1]) > taken.step:
        raise UsageError(
            f"the run has a newer checkpoint, {own[-1].name}, than {taken.path}",
            where=str(run.path),
            help="--resume goes on from it; with --set run.name=NAME the old one begins another run",
        )
    best = _best_beside(taken)
    for path in (*([best] if best else []), taken.path):  # the one to go on from last: with it the run can
        _take_in(run, path)
    if taken.metrics_path is not None and not run.metrics_path.exists():
        shutil.copyfile(taken.metrics_path, run.metrics_path)
    say(f"took {taken.path.name} from {taken.path.parent}" + (f", and {best.name}, the best" if best else ""))


def _best_beside(taken: Taken) -> Path | None:
    """The checkpoint with the best validation loss up to then, where it is another one and is there."""
    best_step = read_snapshot(taken.path).states["progress"].facts.get("best_step")
    beside = [path for path in list_checkpoints(taken.path.parent) if step_of(path) == best_step]
    return next((path for path in beside if path != taken.path and verify_checkpoint(path) is None), None)


def _take_in(run: Run, source: Path) -> None:
    target = run.checkpoints_dir / source.name
    if target.resolve() == source.resolve():
        return
    with new_directory(target) as temporary:
        for name in (*read_manifest(source)["files"], MANIFEST):
            shutil.copyfile(source / name, temporary / name)
    fault = verify_checkpoint(target)
    if fault:
        raise CheckpointError(f"the copy of {source} is damaged: {fault}", where=str(target))
