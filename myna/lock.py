"""One process in a run: a lock on an open file, which dies with its process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from myna.errors import MachineError, UsageError
from myna.run import Run, disk_error


@contextlib.contextmanager
def lock_run(run: Run) -> Iterator[None]:
    """Holds the run for this process; UsageError where another one does. The lock dies with its process."""
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(
            "is a file, or lies in one", where=str(run.path), help="--set run.name=NAME"
        ) from None
    except OSError as error:
        raise disk_error(error, run.path) from error
    with (run.path / ".lock").open("a+b") as file:
        try:
            locked = try_lock(file.fileno())
        except MachineError as error:
            raise MachineError(error.message, where=str(run.path), help=error.help) from error
        if not locked:
            raise UsageError(
                "another process is working in this run",
                where=str(run.path),
                help="wait for it or stop it; a run.name of your own starts a second run",
                code="locked",
            )
        yield


def try_lock(descriptor: int) -> bool:
    """Locks an open file for this process; False where another one has it. The lock dies with its process.

    MachineError where the file system has no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network drives
        raise MachineError(
            f"cannot be locked here, so that two processes could not tell each other: {error.strerror}",
            help="keep runs on a disk of this machine; checkpoint.mirror copies their checkpoints to the drive",
        ) from error
    return True
