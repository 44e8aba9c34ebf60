"""A small disk that is filled to the brim: a tmpfs of its own, since a full disk of the machine would be everybody's."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from myna.checkpoint import list_checkpoints, verify_checkpoint
from myna.run import Run
from survival.nursery import Job, Nursery
from survival.proofs import TORCH, Shown, differences, go_on, straight
from survival.runs import Kind, write_run

DISK_MB = 160  # merging asks for 64 MB more than the model
LEFT = 8192  # bytes that a full disk still has: less than a checkpoint


class NoMount(Exception):
    """This process may not mount a tmpfs."""


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of DISK_MB at `folder`. NoMount where it cannot be had."""
    folder.mkdir(parents=True)
    if shutil.which("mount") is None:
        raise NoMount("there is no mount here")
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoMount(done.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Inside, the disk has LEFT bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        num_bytes = shutil.disk_usage(disk).free - LEFT
        while num_bytes > 0:
            num_bytes -= file.write(bytes(min(num_bytes, 1 << 20)))
    try:
        yield
    finally:
        ballast.unlink()


def full_disk(nursery: Nursery, folder: Path, base: Path, *, stages: bool = True) -> Shown:
    """Train, merge and export on a disk that is full, by the look before the work, and without one (blind).

    Seen beforehand it is told before the first step; unseen, training goes on until three checkpoints in a row failed.
    """
    shown = Shown()
    kind = Kind("full", {"train": {"save_every_steps": 1, "keep_checkpoints": 2}})
    expected = straight(nursery, write_run(folder / "wide", base, kind, name="straight"), TORCH)
    with small_disk(folder / "disk") as disk:
        for blind in (False, True):
            recipe = write_run(disk, base, kind, name=f"run-{blind}")
            shown.note(f"train, blind: {blind}", _train(nursery, recipe, expected, disk, blind=blind))
            if stages:
                for stage, arguments in (("merge", ["merge"]), ("export", ["export", "--quantize", "Q8_0"])):
                    shown.note(
                        f"{stage}, blind: {blind}", _stage(nursery, recipe, disk, arguments, blind=blind)
                    )
    return shown


def _train(
    nursery: Nursery, recipe: Path, expected: dict[str, object], disk: Path, *, blind: bool
) -> Iterator[str]:
    run = Run(recipe.with_suffix(""))
    life = go_on(nursery, recipe, TORCH, number=signal.SIGTERM, stop_step=4)
    if life.code != 143:
        yield f"was not stopped: {life.said[-300:]}"
    with filled(disk):
        life = go_on(nursery, recipe, TORCH, blind=blind)
        told = life.said.count("could not be saved") == 2 and "3rd time in a row" in life.said
        if life.code != 4 or not (told if blind else "no room for the checkpoints" in life.said):
            yield f"did not end with exit 4, as it should (exit {life.code}): {life.said[-600:]}"
        newest = list_checkpoints(run.checkpoints_dir)[-1]
        if newest.name != "step-000004" or verify_checkpoint(newest) is not None:
            yield f"the last good checkpoint is not whole: {newest.name} {verify_checkpoint(newest)}"
    life = go_on(nursery, recipe, TORCH)
    if life.code:
        yield f"does not go on with room: {life.said[-300:]}"
    else:
        yield from differences(run, expected)


def _stage(nursery: Nursery, recipe: Path, disk: Path, arguments: list[str], *, blind: bool) -> Iterator[str]:
    run = Run(recipe.with_suffix(""))
    command = [arguments[0], str(run.path), *arguments[1:]]
    before = {path for path in run.path.rglob("*") if path.is_file()}
    with filled(disk):
        life = nursery.run(Job(command, str(disk), environment=TORCH, blind=blind))
        if life.code != 4:
            yield f"exit {life.code} on a full disk: {life.said[-500:]}"
    came = {path for path in run.path.rglob("*") if path.is_file()} - before
    if came:
        yield f"left {sorted(str(path.relative_to(run.path)) for path in came)}"
    life = nursery.run(Job(command, str(disk), environment=TORCH))
    if life.code:
        yield f"does not go on with room: {life.said[-500:]}"
