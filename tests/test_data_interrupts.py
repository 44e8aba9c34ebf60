"""Rows looked at and rewritten when that is stopped, the disk is full or the file changes: one clear line, nothing half."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Command

import myna.data.sources
from myna.data.conversation import Row
from myna.data.rows import load_conversations, read_conversations
from myna.errors import DataError

COMMANDS: dict[str, list[str]] = {
    "check": ["data", "check", "a.jsonl"],
    "check and keep": ["data", "check", "a.jsonl", "--on-bad-row", "quarantine"],
    "convert": ["data", "convert", "a.jsonl", "-o", "out.jsonl"],
    "convert and keep": ["data", "convert", "a.jsonl", "-o", "out.jsonl", "--on-bad-row", "quarantine"],
}
WRITING = [name for name in COMMANDS if name != "check"]
Scan = Callable[[Path], Iterator[Row | DataError]]


def pair(n: int) -> str:
    return json.dumps({"prompt": f"question {n}", "completion": f"answer {n}"}) + "\n"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Three good rows, and a faulty one where it is to be kept."""
    path = tmp_path / "a.jsonl"
    path.write_text(pair(1) + pair(2) + pair(3))
    return path


def with_fault(rows: Path, name: str) -> None:
    if "keep" in name:
        rows.write_text(rows.read_text() + "broken\n")


def during_reading(monkeypatch: pytest.MonkeyPatch, work: Callable[[Path], None]) -> None:
    """`work` is called after the first row of each file."""
    honest: Scan = myna.data.sources.scan_file

    def scan(path: Path) -> Iterator[Row | DataError]:
        for number, row in enumerate(honest(path)):
            if number == 1:
                work(path)
            yield row

    monkeypatch.setattr(myna.data.sources, "scan_file", scan)


def press_control_c(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def one_line(text: str) -> bool:
    """One sentence and its cure."""
    lines = text.strip().splitlines()
    return len(lines) <= 2 and lines[0].startswith("error: ") and "Traceback" not in text


# Stopped


@pytest.mark.parametrize("name", COMMANDS)
def test_control_c_while_rows_are_read(
    myna: Command, rows: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with_fault(rows, name)
    during_reading(monkeypatch, press_control_c)
    done = myna(*COMMANDS[name])
    assert done.returncode == 130 and not done.stdout
    assert one_line(done.stderr) and "stopped" in done.stderr
    assert [path.name for path in rows.parent.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("name", WRITING)
def test_control_c_while_the_file_is_written(
    myna: Command, rows: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with_fault(rows, name)
    (rows.parent / "out.jsonl").write_text("before")
    before = sorted(path.name for path in rows.parent.iterdir())
    monkeypatch.setattr(os, "fsync", lambda descriptor: press_control_c(rows))
    arguments = COMMANDS[name] + (["--yes"] if "convert" in name else [])
    done = myna(*arguments)
    assert done.returncode == 130 and one_line(done.stderr), done.stderr
    assert sorted(path.name for path in rows.parent.iterdir()) == before
    assert (rows.parent / "out.jsonl").read_text() == "before"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs to see what a process has open")
def test_a_real_process_that_reads_is_stopped_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(pair(n) for n in range(120_000)))
    command = [sys.executable, "-m", "myna.cli", *COMMANDS["convert"]]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    opened = Path(f"/proc/{process.pid}/fd")

    def has_it_open() -> bool:
        found = False
        for one in opened.iterdir():
            with contextlib.suppress(OSError):  # it may be closed while it is looked at
                found = found or os.readlink(one) == str(path.resolve())
        return found

    until = time.monotonic() + 60
    while not has_it_open():
        assert process.poll() is None and time.monotonic() < until, "it never opened the file"
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    said, complained = process.communicate(timeout=60)
    assert process.returncode == 130, complained
    assert not said and one_line(complained)
    assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]


# A full disk


@pytest.mark.parametrize("name", WRITING)
def test_a_disk_that_is_full_when_it_is_written(
    myna: Command, rows: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with_fault(rows, name)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    done = myna(*COMMANDS[name])
    assert done.returncode == 4 and one_line(done.stderr), done.stderr
    assert "could not be written: No space left on device" in done.stderr and "free room" in done.stderr
    assert [path.name for path in rows.parent.iterdir()] == ["a.jsonl"]


def test_a_file_system_that_is_really_full(myna: Command, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk needs rights")
    try:
        (tmp_path / "a.jsonl").write_text("".join(pair(n) for n in range(3000)))
        done = myna("data", "convert", "a.jsonl", "-o", "disk/out.jsonl")
        assert done.returncode == 4 and one_line(done.stderr), done.stderr
        assert "No space left on device" in done.stderr and not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True, capture_output=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_output_that_has_no_room(rows: Path, more: list[str]) -> None:
    command = [sys.executable, "-m", "myna.cli", *COMMANDS["check"], *more]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, check=False, cwd=rows.parent, text=True, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert more or (one_line(done.stderr) and "No space left on device" in done.stderr)


# A file that changes


def grow(path: Path) -> None:
    with path.open("a") as file:
        file.write(pair(9))


def replace(path: Path) -> None:
    other = path.with_name("other.txt")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


@pytest.mark.parametrize(
    "change", [grow, replace, Path.touch, Path.unlink, lambda path: path.write_text(pair(7) * 3)]
)
def test_a_file_that_changes_while_it_is_read_is_refused(
    myna: Command, rows: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    time.sleep(0.02)  # clocks of file systems are coarse
    during_reading(monkeypatch, change)
    (error,) = read_conversations(rows).faults
    assert (error.code, error.where, error.message) == ("D007", str(rows), "changed while it was read")
    assert "nothing writes to it" in str(error.help)
    content = pair(1) + pair(2) + pair(3)
    for arguments in (COMMANDS["check"], [*COMMANDS["convert"], "--on-bad-row", "skip"]):
        rows.write_text(content)
        done = myna(*arguments)
        assert done.returncode == 3 and "changed while it was read" in done.stdout + done.stderr
    assert not (rows.parent / "out.jsonl").exists()
    rows.write_text(content)
    with pytest.raises(DataError, match="changed while it was read"):
        load_conversations(rows, skip_bad=True)


def test_a_disk_that_breaks_while_it_is_read(
    myna: Command, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    during_reading(monkeypatch, broken)
    done = myna(*COMMANDS["convert"], "--on-bad-row", "skip")
    assert done.returncode == 3 and one_line(done.stderr) and "Input/output error" in done.stderr


def test_a_file_that_stays_is_read(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    during_reading(monkeypatch, lambda path: None)
    assert len(read_conversations(rows).conversations) == 3 and not read_conversations(rows).faults


def test_the_first_rows_of_a_file_that_grows_are_the_first_rows(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    during_reading(monkeypatch, grow)
    assert len(load_conversations(rows, max_rows=2).conversations) == 2
