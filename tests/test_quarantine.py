"""Faulty rows: left out where that is asked for, and kept byte for byte beside what is wrong with them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import Command

from myna.data.quarantine import quarantine_lines
from myna.data.rows import load_conversations, read_conversations
from myna.errors import DataError

GOOD = '{"prompt": "q", "completion": "a"}'


def kept(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in quarantine_lines(read_conversations(path).faults)]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_lines_are_kept_byte_for_byte(tmp_path: Path) -> None:
    bad = [b'{"prompt":   "q",  "completion": ""}\r\n', b"broken \xff\r\n", b'{"a": 1, "a": 2}']
    path = write(tmp_path / "a.jsonl", GOOD.encode() + b"\r\n" + bad[0] + b"\r\n" + bad[1] + bad[2])
    found = kept(path)
    assert [(one["code"], one["where"]) for one in found] == [
        ("D013", f"{path}:2"),
        ("D002", f"{path}:4"),
        ("D004", f"{path}:5"),
    ]
    assert base64.b64decode(found[1]["row_base64"]) == bad[1]
    assert [one["row"].encode() for one in (found[0], found[2])] == [bad[0], bad[2]]


def test_records_of_tables_are_kept_whole(tmp_path: Path) -> None:
    text = 'prompt,completion\nq,a\n"two\nlines",\n1,2,3\nq,a\n"open,\nq,a\n'
    found = {
        one["where"].rpartition(":")[2]: one["row"] for one in kept(write(tmp_path / "a.csv", text.encode()))
    }
    assert found == {"3": '"two\nlines",\n', "5": "1,2,3\n", "7": '"open,\nq,a\n'}


def test_rows_of_other_files_are_kept_as_json(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": "سلام", "completion": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps([*rows, 7]))
    (found,) = kept(tmp_path / "a.parquet")
    assert json.loads(found["row"]) == rows[1] and found["code"] == "D013"
    null, number = kept(tmp_path / "a.json")
    assert (number["code"], number["row"]) == ("D003", None) and json.loads(null["row"]) == rows[1]


def test_a_file_s_own_fault_has_no_row(tmp_path: Path) -> None:
    (found,) = kept(write(tmp_path / "a.jsonl", b"\n\n"))
    assert found["code"] == "D006" and found["row"] is None


def test_skipping_leaves_the_good_rows_and_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", f"{GOOD}\nbroken\n{GOOD}\nbroken\n".encode())
    loaded = load_conversations(path, skip_bad=True)
    assert loaded.num_rows == 2 and len(loaded.left_out) == 2
    assert "2 faulty rows are left out (D001 2)" in loaded.said[1]
    with pytest.raises(DataError):
        load_conversations(write(tmp_path / "b.jsonl", b"broken\n"), skip_bad=True)


def test_the_commands_leave_out_and_keep(myna: Command, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", f"{GOOD}\nbroken\n".encode())
    assert myna("data", "check", "a.jsonl").returncode == 3
    assert myna("data", "check", "a.jsonl", "--on-bad-row", "skip").returncode == 0
    assert not (tmp_path / "a.quarantine.jsonl").exists()
    done = myna("data", "check", "a.jsonl", "--on-bad-row", "quarantine")
    assert done.returncode == 0 and "a.quarantine.jsonl" in done.stdout
    assert json.loads((tmp_path / "a.quarantine.jsonl").read_text())["row"] == "broken\n"
    done = myna("data", "convert", "a.jsonl", "-o", "b.jsonl", "--on-bad-row", "quarantine", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {
        "out": "b.jsonl",
        "rows": 1,
        "left_out": 1,
        "quarantine": "b.quarantine.jsonl",
    }
    write(tmp_path / "a.jsonl", b"broken\n")
    assert myna("data", "check", "a.jsonl", "--on-bad-row", "skip").returncode == 3


def test_a_run_keeps_what_it_left_out(myna: Command, tmp_path: Path, tiny_base: Path) -> None:
    rows = "".join(f'{{"prompt": "q{n}", "completion": "a{n}"}}\n' for n in range(12))
    write(tmp_path / "rows.jsonl", f"{rows}broken\n".encode())
    recipe = (
        f"model: {{base: {tiny_base}}}\ndata: {{train: rows.jsonl}}\ntrain: {{max_steps: 1, batch_size: 2}}\n"
    )
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert myna("train", "recipe.yaml").returncode == 3
    done = myna("train", "recipe.yaml", "--set", "data.on_bad_row=quarantine")
    assert done.returncode == 0, done.stderr
    assert "1 faulty rows are left out (D001 1)" in done.stderr
    run = tmp_path / "runs" / "rows"
    assert json.loads((run / "rows" / "quarantine.jsonl").read_text())["row"] == "broken\n"
    assert "rows/quarantine.jsonl" in json.loads((run / "run.json").read_text())["digests"]
