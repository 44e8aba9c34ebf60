"""Every call that changes the disk, counted, and made to fail or to be the last one."""

from __future__ import annotations

import builtins
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from survival.nursery import Job

CALLS = (
    *(
        ("os", os, name)
        for name in ("replace", "rename", "fsync", "mkdir", "rmdir", "unlink", "remove", "truncate")
    ),
    *(("shutil", shutil, name) for name in ("rmtree", "copyfile")),
)


def watch_calls(job: Job) -> None:
    """Counts calls in this process once `after_step` steps are done, from the first that the job is about."""
    if job.fail_call is None and job.calls_to is None:
        return
    count, folder = [0], str(Path(job.folder).resolve())
    armed = [job.after_step == 0]

    def at(name: str, place: object) -> None:
        if not armed[0] or not _is_inside(place, folder):
            return
        count[0] += 1
        if job.calls_to is not None:
            with _open(job.calls_to, "a") as file:
                file.write(f"{count[0]} {name} {place}\n")
        if count[0] == job.fail_call:
            if job.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(job.errno, os.strerror(job.errno))

    for group, module, name in CALLS:
        setattr(module, name, _watched(f"{group}.{name}", getattr(module, name), at))
    _watch_files(at)
    _watch_safetensors(at)
    _arm_after(job.after_step, armed)


_open = builtins.open


def _is_inside(place: object, folder: str) -> bool:
    if isinstance(place, int):  # a descriptor
        try:
            place = os.readlink(f"/proc/self/fd/{place}")
        except OSError:
            return False
    path = os.path.abspath(str(place))
    return path.startswith(folder) and ("/checkpoints" in path or "metrics.jsonl" in path)


def _watched(name: str, honest: Callable[..., Any], at: Callable[[str, object], None]) -> Callable[..., Any]:
    def call(*arguments: Any, **settings: Any) -> Any:
        if name == "os.mkdir" and os.path.isdir(arguments[0]):  # nothing is made
            return honest(*arguments, **settings)
        at(name, arguments[-1] if name in ("os.replace", "os.rename", "shutil.copyfile") else arguments[0])
        return honest(*arguments, **settings)

    return call


def _watch_files(at: Callable[[str, object], None]) -> None:
    """Opening for writing, and each write: Path.open is io.open, whatever stands in builtins."""
    honest = Path.open

    def opened(self: Path, mode: str = "r", *rest: Any, **settings: Any) -> Any:
        if not set(mode) & set("wax+"):
            return honest(self, mode, *rest, **settings)
        if "+" not in mode:  # what is only synced is counted by its sync
            at("open", self)
        file = honest(self, mode, *rest, **settings)
        if "+" in mode:
            return file
        return _File(file, lambda: at("write", self))

    Path.open = opened  # type: ignore[method-assign]


class _File:
    """A file whose writes are told first."""

    def __init__(self, file: Any, tell: Callable[[], None]) -> None:
        self._file, self._tell = file, tell

    def write(self, data: Any) -> Any:
        self._tell()
        return self._file.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _watch_safetensors(at: Callable[[str, object], None]) -> None:
    """It writes by itself: told before, and once more with half of the file written."""
    import safetensors.torch

    honest = safetensors.torch.save_file

    def save_file(tensors: Any, filename: Any, *rest: Any) -> None:
        at("safetensors", filename)
        honest(tensors, filename, *rest)
        data = Path(filename).read_bytes()
        with _open(filename, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            at("safetensors_half", filename)
            file.write(data[len(data) // 2 :])

    safetensors.torch.save_file = save_file


def _arm_after(step: int, armed: list[bool]) -> None:
    """The calls count from when this step of the process is taken, up to the next one's."""
    module = sys.modules["myna.train"]
    honest, taken = module.take_step, [0]

    def take_step(*arguments: Any) -> Any:
        taken[0] += 1
        armed[0] = taken[0] == step
        return honest(*arguments)

    if step:
        module.take_step = take_step  # type: ignore[attr-defined]


def stop_in_step(job: Job) -> None:
    """Sends the job's signal to this process in one of its steps."""
    module = sys.modules["myna.train"]
    honest, taken = module.take_step, [0]

    def take_step(*arguments: Any) -> Any:
        taken[0] += 1
        for _ in range(job.times if taken[0] == job.stop_step else 0):
            os.kill(os.getpid(), job.number)
        return honest(*arguments)

    if job.stop_step is not None:
        module.take_step = take_step  # type: ignore[attr-defined]
