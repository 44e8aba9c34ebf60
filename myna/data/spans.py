"""A large file of JSON lines checked by a process a core: each takes span after span, and what they find is put together.

    file ─► spans that end at line ends ─► this process and children: Survey, RowChecks ─► joined in the order of the file
        └─► near duplicates, for which every row is compared with all before it: a child of their own

The answer is that of one process. Where all rows tell more than their spans do (rows that belong together, more kinds of
rows than are told apart) there is none, and the file is read in one piece.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

from myna.data.conversation import Conversation
from myna.data.detect import Detected, Group, Survey
from myna.data.files import changed, stamp_of
from myna.data.formats import format_named
from myna.data.json_rows import is_in_lines, scan_lines
from myna.data.lines import WHOLE, Span, can_be_parted, spans_of
from myna.data.near import NearDuplicates, NearFound
from myna.data.opened import row_suffix
from myna.data.repeats import Digests
from myna.data.row_checks import RowChecks
from myna.data.shapes import Reading
from myna.data.sources import scan_rows
from myna.data.stream import (
    GUESSED,
    Converter,
    Streamed,
    guessed,
    refuse_nothing,
    shape_of,
    survey_rows,
)
from myna.errors import DataError, MachineError, MynaError

LEAST_BYTES = 1 << 24  # a file; below, children take longer to start than they save
MOST_PROCESSES = 16
SERVE = "from myna.data.spans import serve; serve()"
MEMORY = "where memory ran out (dmesg tells), close what else runs, or check the rows in smaller files"


@dataclass(frozen=True)
class Task:
    """What is done with a span: all checks that look at a row alone, or (`near`) the one for near duplicates."""

    path: Path
    span: Span
    format_name: str
    columns: Mapping[str, str]
    reading: Reading
    detected: Detected
    private: bool
    keep_faults: bool
    near: bool = False


@dataclass(frozen=True)
class Part:
    """What was found in a span. `num_made` counts conversations and faults."""

    checks: RowChecks
    groups: Mapping[Any, Group]
    num_read: int
    num_unread: int
    num_made: int


Answer = Part | NearFound | None  # None: the file could not be read
Child = subprocess.Popen[bytes]


def check_spans(
    path: Path,
    make: Callable[[], RowChecks],
    *,
    format_name: str,
    columns: Mapping[str, str],
    reading: Reading,
    private: bool,
    keep_faults: bool,
) -> Streamed[RowChecks] | None:
    """As `stream_rows` into what `make` makes, by several processes; None where it is to be done in one piece.

    Raises MachineError where a child ends before it is done.
    """
    try:
        planned = plan(path.stat().st_size) if row_suffix(path) in (".jsonl", ".ndjson") else None
        if planned is None or not (path.is_file() and can_be_parted(path) and is_in_lines(path)):
            return None
        guess = guessed(islice(scan_rows(path), GUESSED), format_name, columns)
    except (DataError, OSError):
        return None  # told by who reads it in one piece
    if guess is None or format_named(guess.name).gather is not None:
        return None

    def read(shape: Detected) -> tuple[RowChecks, Survey, int, int] | None:
        task = Task(path, WHOLE, format_name, dict(columns), reading, shape, private, keep_faults)
        return _joined(task, make(), *planned)

    first = read(guess)
    if first is None:
        return None
    sink, survey, num_unread, num_made = first
    found = shape_of(survey, sink, reading)
    num_rows = survey.num_rows + num_unread
    if found is not None and (guess.name, guess.keys) != (found.name, found.keys):
        again = read(found) if format_named(found.name).gather is None else None
        if again is None:
            return None
        sink, _, num_unread, num_made = again
    if found is not None:
        refuse_nothing(num_unread + num_made, sink, str(path))
    return Streamed(sink, found, num_rows)


def plan(num_bytes: int) -> tuple[int, int] | None:
    """With how many children and in spans of how many bytes a file is read; None: in one piece."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1)
    if num_bytes < LEAST_BYTES or cores < 2:
        return None
    return min(cores, MOST_PROCESSES) - 1, min(max(num_bytes >> 5, 1 << 21), 1 << 24)


def _joined(
    task: Task, sink: RowChecks, num_children: int, span_bytes: int
) -> tuple[RowChecks, Survey, int, int] | None:
    """All rows in the shape of `task`: the sink, their survey, how many could not be read, how much was made of them."""
    stamp = stamp_of(task.path)
    survey = Survey(task.format_name, task.columns)
    num_unread = num_made = 0
    tasks = (replace(task, span=span) for span in spans_of(task.path, span_bytes))
    long_ones = [replace(task, near=True)] if sink.warnings.looks_for_near else []
    with closing(_answers(tasks, long_ones, num_children)) as answers:
        for part in answers:
            if isinstance(part, NearFound):
                sink.warnings.near_found = part
                continue
            if part is None or not survey.join(part.groups, part.num_read):
                return None
            sink.join(part.checks)
            num_unread += part.num_unread
            num_made += part.num_made
    if stamp_of(task.path) != stamp:
        num_unread += 1
        sink.refuse(changed(task.path))
    return sink, survey, num_unread, num_made


def _answers(tasks: Iterable[Task], long_ones: Iterable[Task], num_children: int) -> Generator[Answer]:
    """What comes of tasks, in their order, then of long ones, which children begin with; no child is left behind.

    Each that is done with one, this process too, takes the next.
    """
    numbered, taking = enumerate(tasks), threading.Lock()
    long_tasks = list(enumerate(long_ones))
    found: dict[int, Answer] = {}
    found_long: dict[int, Answer] = {}
    failed: list[BaseException] = []
    children: list[Child] = []
    ended = threading.Event()

    def take() -> tuple[int, Task] | None:
        with taking:
            return None if ended.is_set() else next(numbered, None)

    def take_long() -> tuple[int, Task] | None:
        with taking:
            return long_tasks.pop() if long_tasks and not ended.is_set() else None

    def ask_child() -> None:
        try:
            with _started() as child:
                children.append(child)
                for number, task in iter(take_long, None):
                    found_long[number] = _ask(child, task)
                for number, task in iter(take, None):
                    found[number] = _ask(child, task)
        except BaseException as error:
            failed.append(error)

    # each child is its thread's: a Ctrl-C, which is the main thread's, comes at no moment when nobody knows of it
    threads = [threading.Thread(target=ask_child, daemon=True) for _ in range(num_children)]
    try:
        for thread in threads:
            thread.start()
        num_given = 0
        for number, task in iter(take, None):
            found[number] = _work(task)
            while num_given in found:
                yield found.pop(num_given)
                num_given += 1
            if failed:
                raise failed[0]
        for number, task in iter(take_long, None):
            found_long[number] = _work(task)
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        yield from (found[number] for number in sorted(found))
        yield from (found_long[number] for number in sorted(found_long))
    finally:
        ended.set()
        while any(thread.is_alive() for thread in threads):
            for child in children:
                child.kill()
            for thread in threads:
                thread.join(0.02)


@contextmanager
def _started() -> Iterator[Child]:
    """A child that ends with this block. MachineError where none can be started."""
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            # a Ctrl-C at the terminal is for the process that asks, which ends its children
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
    except OSError as error:
        raise MachineError(f"no process can be started: {error.strerror}", help=MEMORY) from error
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        with suppress(BrokenPipeError):
            _pipe(child.stdin).close()
        _pipe(child.stdout).close()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _ask(child: Child, task: Task) -> Answer:
    """Pickled: both ends are processes of our own, and nobody else writes to the pipes between them."""
    try:
        pickle.dump(task, _pipe(child.stdin))
        _pipe(child.stdin).flush()
        answer = pickle.load(_pipe(child.stdout))
    except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
        code = child.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        message = f"a process that checked rows ended before it was done ({how})"
        raise MachineError(message, where=str(task.path), help=MEMORY) from error
    if isinstance(answer, MynaError):
        raise answer
    assert answer is None or isinstance(answer, Part | NearFound)
    return answer


def serve() -> None:
    """What a child does: tasks from standard input, what comes of each to standard output, until nobody asks any more."""
    with suppress(EOFError, BrokenPipeError):
        while True:
            task = pickle.load(sys.stdin.buffer)
            answer: Answer | MynaError
            try:
                answer = _work(task)
            except MynaError as error:
                answer = error
            pickle.dump(answer, sys.stdout.buffer)
            sys.stdout.buffer.flush()


def _work(task: Task) -> Answer:
    try:
        return _look_for_near(task) if task.near else _check(task)
    except OSError:
        return None  # who reads it in one piece tells what is wrong


def _check(task: Task) -> Part:
    checks = RowChecks(Digests(), private=task.private, near=False, tokens=None, keep_faults=task.keep_faults)
    survey = Survey(task.format_name, task.columns)
    converter = Converter(task.detected, task.reading, checks)
    num_unread = survey_rows(scan_lines(task.path, task.span), survey, converter, checks)
    return Part(checks, survey.groups, survey.num_rows, num_unread, converter.num_made)


class _Near:
    """Conversations compared with all before them, as long as the process that asks for it lives."""

    def __init__(self) -> None:
        self.duplicates = NearDuplicates()
        self._look, self._parent, self._number = self.duplicates.look, os.getppid(), 0

    def take(self, conversation: Conversation) -> None:
        self._look(conversation)
        self._number += 1
        if self._number % 1000 == 0 and os.getppid() != self._parent:
            raise EOFError

    def refuse(self, fault: DataError) -> None:
        pass


def _look_for_near(task: Task) -> NearFound:
    near = _Near()
    converter = Converter(task.detected, task.reading, near)
    survey = Survey(task.format_name, task.columns)
    survey_rows(scan_lines(task.path, task.span), survey, converter, near)
    return near.duplicates.found()
