"""The run directory: whole files or none, a lock that dies with its process, room that is looked at first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from myna.errors import DataError, MachineError, UsageError
from myna.lock import lock_run
from myna.run import Run, find_run, new_directory, read_json, require_room, run_path, write_json, write_text


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with pytest.raises(RuntimeError), new_directory(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_directory(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), new_directory(target) as folder:
        raise RuntimeError
    assert (target / "a").read_text() == "1"
    with new_directory(target) as folder:
        (folder / "b").write_text("2")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_directory_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(source: object, target: object) -> None:
        calls.append(f"named {Path(str(target)).name}")
        replace(source, target)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with new_directory(tmp_path / "made") as folder:
        (folder / "below").mkdir()
        (folder / "below" / "a").write_text("a")
        (folder / "b").write_text("b")
    named = calls.index("named made")
    assert sorted(calls[: named - 1]) == ["a", "b", "below"] and calls.index("a") < calls.index("below")
    assert calls[named - 1].startswith(".tmp-made") and calls[named + 1] == tmp_path.name


def test_text_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "a.txt", "one")
    write_text(tmp_path / "deep" / "a.txt", "two")
    assert [(p.name, p.read_text()) for p in (tmp_path / "deep").iterdir()] == [("a.txt", "two")]


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(MachineError) as caught:
        write_text(tmp_path / "a", "x")
    assert caught.value.where == str(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


HOLD = """
import sys, pathlib
from myna.lock import lock_run
from myna.run import Run
with lock_run(Run(pathlib.Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_locked_out_until_the_first_is_dead(tmp_path: Path) -> None:
    run = Run(tmp_path / "r")
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError) as caught, lock_run(run):
            pass
        assert caught.value.code == "locked"
        holder.kill()
        holder.wait()
    with lock_run(run):
        pass


def test_stages_are_written_one_after_the_other(tmp_path: Path) -> None:
    run = Run(tmp_path / "r")
    write_json(run.path / "run.json", {"name": "r", "stages": {}})
    assert run.stage("train") is None
    with pytest.raises(UsageError, match="train is not done"):
        run.require_stage("train", "myna train")
    run.finish_stage("train", {"seconds": 1.5})
    run.finish_stage("merge", {"seconds": 2})
    assert (run.stage("train") or {})["seconds"] == 1.5
    assert list(run.info()["stages"]) == ["train", "merge"]


def test_a_run_is_found_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(Path("runs/orders/run.json"), {"stages": {}})
    assert find_run("orders").path == Path("runs/orders")
    assert find_run(str(tmp_path / "runs" / "orders")).name == "orders"
    with pytest.raises(UsageError, match="ordres is no run") as caught:
        find_run("ordres")
    assert "orders" in (caught.value.help or "")
    assert run_path("orders") == Path("runs/orders")
    assert run_path("./elsewhere/x") == Path("elsewhere/x")


def test_room_is_looked_at_before(tmp_path: Path) -> None:
    require_room(tmp_path / "not" / "there", 1, "a file")
    with pytest.raises(MachineError, match="no room for a file"):
        require_room(tmp_path / "not" / "there", 10**18, "a file")


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00"])
def test_a_broken_json_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError) as caught:
        read_json(tmp_path / "a.json")
    assert caught.value.where == str(tmp_path / "a.json")


def test_a_drive_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with (
        pytest.raises(MachineError, match="cannot be locked here") as caught,
        lock_run(Run(tmp_path / "run")),
    ):
        pass
    assert caught.value.exit_code == 4 and "checkpoint.mirror" in (caught.value.help or "")
