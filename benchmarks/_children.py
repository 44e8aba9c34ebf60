"""Processes that a benchmark measures: each with its time, its peak memory and what it said.

A child's peak is the kernel's `ru_maxrss`, taken the same way for whoever is measured. Linux hands the peak of the process
that starts a child on to it, so what starts children here must stay small: it never loads torch.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from myna.engine.threads import usable_cores
from myna.errors import MachineError

ROOT = Path(__file__).resolve().parent.parent
# what a user has not set, when a program is measured as it is shipped
NOT_AS_SHIPPED = ("OMP_", "GOMP_", "KMP_", "MKL_", "MYNA_KERNELS", "PYTHONPATH")
LINES_OF_A_FAILURE = 12
# it looks for its parent every second or so
ENDLESS_LOOP = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(20_000_000):
        pass
"""
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Child:
    """A process that ended well. `peak_mb` in 10⁶ bytes of resident memory, `seconds` from its start to its end.

    `others` is the part of all cores' time that other processes took meanwhile: what the figures were disturbed by.
    """

    seconds: float
    peak_mb: float
    stdout: str
    stderr: str
    others: float = 0.0


def run_child(
    command: Sequence[str | Path], *, cwd: Path, variables: Mapping[str, str] | None = None
) -> Child:
    """Runs a command to its end in the environment of a user; MachineError with its last words where it fails."""
    environment = as_shipped(os.environ) | dict(variables or {})
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        busy, started = _busy_seconds(), time.perf_counter()
        process = subprocess.Popen(words, cwd=cwd, env=environment, stdout=out, stderr=err)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds, busy = time.perf_counter() - started, _busy_seconds() - busy
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout, stderr = (_text(file) for file in (out, err))
    if process.returncode:
        last = "\n".join((stderr + stdout).strip().splitlines()[-LINES_OF_A_FAILURE:])
        raise MachineError(
            f"ended with {process.returncode}:\n{last}",
            where=" ".join(words[:4]),
            help="the same by hand shows the rest",
        )
    free = seconds * (psutil.cpu_count() or 1)
    others = max(0.0, busy - usage.ru_utime - usage.ru_stime) / free
    return Child(seconds, usage.ru_maxrss * MAXRSS_UNIT / 1e6, stdout, stderr, others)


def _busy_seconds() -> float:
    """What all cores together have worked since the machine came up, for this machine or for others on the same host."""
    times = psutil.cpu_times()
    return sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))


def as_shipped(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without settings of threads and kernels, which would change what is measured."""
    return {name: value for name, value in environment.items() if not name.startswith(NOT_AS_SHIPPED)}


@contextlib.contextmanager
def neighbour() -> Iterator[None]:
    """Inside, one single-threaded endless loop runs beside; it ends by itself where this process is killed."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ENDLESS_LOOP, str(os.getpid())])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def fresh_torch_mb(python: str | Path) -> float:
    """Peak memory of `import torch` alone in that interpreter: what a training is not to blame for."""
    return run_child([python, "-c", "import torch"], cwd=ROOT).peak_mb


def float_peak() -> float:
    """FLOP/s of this CPU's bf16 or fp32 product, whichever is faster here, on the cores that may be used.

    Measured in a process of its own.
    """
    peaks = ", ".join(f"product_peak('{dtype}', {usable_cores()})" for dtype in ("bf16", "fp32"))
    program = f"from myna.engine.peaks import product_peak; print(max({peaks}))"
    return float(
        run_child([sys.executable, "-c", program], cwd=ROOT, variables={"PYTHONPATH": str(ROOT)}).stdout
    )


def packaged_folder(name: str, scratch: Path) -> Path:
    """The packaged model as a Hugging Face folder in `scratch`: links to the unpacked files of the cache."""
    program = f"from myna.model.sources import resolve_base; print(resolve_base({name!r}).folder)"
    done = run_child([sys.executable, "-c", program], cwd=ROOT, variables={"PYTHONPATH": str(ROOT)})
    source, folder = Path(done.stdout.strip().splitlines()[-1]), scratch / name
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    return folder


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")
