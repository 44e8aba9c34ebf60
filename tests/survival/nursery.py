"""A process that has imported all it needs and computed nothing, and forks children that can be killed at leisure.

    test or script ─ a line of JSON ─► nursery ─ fork ─► child: `myna ARGUMENTS`, its phase in a byte that both see

A child starts in milliseconds, and nothing of an earlier child's memory helps it. A process that has computed with torch
must not fork (its threads do not come along): the nursery is a process of its own, `python -m survival.nursery`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# what a child is doing; the byte of the shared page
PHASES = ("starting", "preparing", "loading", "stepping", "saving", "pruning", "mirroring", "finishing")
# where each phase is entered: module, function
PHASE_OF = (
    ("preparing", "myna.pipeline", "prepare"),
    ("loading", "myna.ready", "make_ready"),
    ("loading", "myna.ready", "find_newest"),
    ("loading", "myna.ready", "read_snapshot"),
    ("stepping", "myna.train", "take_step"),
    ("saving", "myna.saver", "save_checkpoint"),
    ("pruning", "myna.saver", "prune"),
    ("finishing", "myna.train", "save_adapter"),
)
LONGEST = 120.0  # seconds that a child may take


@dataclass(frozen=True)
class Job:
    """One life of a process.

    After `kill_after` seconds it gets `number`; with `in_phase` they count from when it is in that phase. With `stop_step`
    it sends `number` to itself in that step. `fail_call` is the number of the call that raises `errno` or, where it `dies`,
    ends the process: of those that change checkpoints or metrics after its step `after_step`. `calls_to` gets them all.
    """

    arguments: list[str]
    folder: str
    number: int = signal.SIGKILL
    kill_after: float | None = None
    in_phase: str | None = None
    stop_step: int | None = None
    times: int = 1  # of that signal
    fail_call: int | None = None
    errno: int = 28
    dies: bool = False
    calls_to: str | None = None
    after_step: int = 0
    blind: bool = False  # to how much room there is
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Life:
    """How it ended: exit code (minus the signal that ended it), the phase it was in then and when it got its signal.

    `steps_after` are the steps that it began after its signal.
    """

    code: int
    phase: str
    stopped_in: str
    seconds: float
    stopping_seconds: float
    steps_after: int
    said: str


class Nursery:
    """The parent of killable children, as a context manager."""

    def __enter__(self) -> Nursery:
        here = Path(__file__).parent.parent
        path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "survival.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()
        self._errors.close()

    def run(self, job: Job) -> Life:
        """One life, from its birth to its end."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise AssertionError(f"the nursery died: {self._errors.read()}")
        return Life(**json.loads(line))


# In the nursery's process


def main() -> None:
    """Reads jobs until there are none."""
    import myna.cli
    import myna.pipeline
    import myna.ready
    import myna.saver
    import myna.train

    _import_all()
    gc.freeze()  # else every child looks through all that was imported, three times
    # a second of each life, and told to the user alone
    myna.ready.product_peak = lambda *_: 1e11
    for line in sys.stdin:
        life = live(Job(**json.loads(line)))
        print(json.dumps(asdict(life)), flush=True)


def _import_all() -> None:
    """What a training would import on its way: transformers loads its parts when they are asked for."""
    import peft  # noqa: F401
    import safetensors.torch  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401
    from transformers.models.llama import configuration_llama, modeling_llama  # noqa: F401


def live(job: Job) -> Life:
    """Forks a child for a job, ends it as the job says, and waits for it."""
    page = mmap.mmap(-1, 2)  # its phase, and how many steps it has begun
    reading, writing = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _be_child(job, page, writing)
    os.close(writing)
    said, signalled, stopped_in, steps = b"", None, "", 0
    while True:
        now = time.monotonic()
        if job.in_phase is not None and signalled is None and PHASES[page[0]] == job.in_phase:
            time.sleep(job.kill_after or 0.0)
            stopped_in, signalled, steps = PHASES[page[0]], _send(pid, job.number), page[1]
        elif job.in_phase is None and job.kill_after is not None and signalled is None:
            if now - started >= job.kill_after:
                stopped_in, signalled, steps = PHASES[page[0]], _send(pid, job.number), page[1]
        elif now - started > LONGEST:
            _send(pid, signal.SIGKILL)
        # a child that is waited for in a phase is looked at all the time, another one a thousand times a second
        watching = job.in_phase is not None and signalled is None
        if select.select([reading], [], [], 0 if watching else 0.001)[0]:
            block = os.read(reading, 1 << 16)
            said += block
            if not block:
                break
    _, status = os.waitpid(pid, 0)
    os.close(reading)
    ended = time.monotonic()
    code = os.waitstatus_to_exitcode(status)
    stopping = 0.0 if signalled is None else ended - signalled
    times = round(ended - started, 3), round(stopping, 3)
    after = 0 if signalled is None else page[1] - steps
    return Life(code, PHASES[page[0]], stopped_in, *times, after, said.decode(errors="replace"))


def _send(pid: int, number: int) -> float:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    return time.monotonic()


def _be_child(job: Job, page: mmap.mmap, writing: int) -> None:
    """Never returns."""
    code = 1
    try:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.close(writing)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ.update(job.environment)
        os.chdir(job.folder)
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            signal.signal(
                getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
            )
        _tell_phases(page)
        from survival.failpoints import stop_in_step, watch_calls

        if job.blind:
            _look_at_no_room()
        watch_calls(job)
        stop_in_step(job)
        sys.argv = ["myna", *job.arguments]
        from myna.cli import main as command

        try:
            command()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # a child must never come back into the nursery's loop
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _look_at_no_room() -> None:
    """The look at a disk's room before it is written says that all is well, as on a disk that others fill meanwhile."""
    import importlib

    for module in ("myna.saver", "myna.ready", "myna.export.merge", "myna.export.gguf"):
        importlib.import_module(module).require_room = lambda *_: None  # type: ignore[attr-defined]


def _tell_phases(page: mmap.mmap) -> None:
    import importlib

    def telling(phase: str, honest: Callable[..., Any]) -> Callable[..., Any]:
        def told(*arguments: Any, **settings: Any) -> Any:
            before, page[0] = page[0], PHASES.index(phase)
            page[1] += phase == "stepping"
            try:
                return honest(*arguments, **settings)
            finally:
                page[0] = before

        return told

    for phase, module, name in PHASE_OF:
        holder = importlib.import_module(module)
        setattr(holder, name, telling(phase, getattr(holder, name)))


@contextlib.contextmanager
def nursery() -> Iterator[Nursery]:
    with Nursery() as found:
        yield found


if __name__ == "__main__":
    main()
