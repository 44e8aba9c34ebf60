"""`-`: rows from standard input, told apart by what is in them, with places as `stdin:7`."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from myna.data.stdin_rows import kind_of_file

Piped = Callable[[bytes], None]
ROW = {"prompt": "q", "completion": "a"}
LINE = json.dumps(ROW).encode() + b"\n"


@pytest.fixture
def piped(myna: Command, monkeypatch: pytest.MonkeyPatch) -> Piped:
    """Puts bytes into standard input; after `myna`, which empties it."""

    def put(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))

    return put


def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW]), sink)
    return sink.getvalue()


def arrow(new: str) -> bytes:
    import pyarrow

    sink, table = io.BytesIO(), pyarrow.Table.from_pylist([ROW])
    with getattr(pyarrow.ipc, new)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def excel() -> bytes:
    import openpyxl

    book, sink = openpyxl.Workbook(), io.BytesIO()
    book.active.append(["prompt", "completion"])
    book.active.append(["q", "a"])
    book.save(sink)
    return sink.getvalue()


KINDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "lines": (lambda: LINE * 2, ".jsonl"),
    "one line": (lambda: LINE, ".jsonl"),
    "lines, packed": (lambda: gzip.compress(LINE), ".jsonl"),
    "lines, the first broken": (lambda: b'{"prompt": "q", completion}\n' + LINE, ".jsonl"),
    "lines after blank ones and a mark": (lambda: b"\xef\xbb\xbf\n\n" + LINE, ".jsonl"),
    "wide lines": (lambda: LINE.decode().encode("utf-16"), ".jsonl"),
    "a document": (lambda: json.dumps([ROW], indent=1).encode(), ".json"),
    "a list on one line": (lambda: json.dumps([ROW]).encode(), ".json"),
    "an object over lines": (lambda: json.dumps({"rows": [ROW]}, indent=1).encode(), ".json"),
    "commas": (lambda: b'prompt,completion\n"q","a"\n', ".csv"),
    "semicolons": (lambda: b"prompt;completion\nq;a\n", ".csv"),
    "tabs": (lambda: b"prompt\tcompletion\nq\ta\n", ".csv"),
    "parquet": (parquet, ".parquet"),
    "arrow": (lambda: arrow("new_file"), ".arrow"),
    "arrow stream": (lambda: arrow("new_stream"), ".arrow"),
    "a workbook": (excel, ".xlsx"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_piped_in_is_told_by_its_content(name: str, tmp_path: Path) -> None:
    make, suffix = KINDS[name]
    (tmp_path / "any").write_bytes(make())
    assert kind_of_file(tmp_path / "any") == suffix


@pytest.mark.parametrize("name", [name for name in KINDS if "broken" not in name])
def test_every_kind_is_read(name: str, myna: Command, piped: Piped) -> None:
    piped(KINDS[name][0]())
    done = myna("data", "convert", "-", "-o", "out.jsonl")
    assert done.returncode == 0, done.stderr
    first = json.loads(Path("out.jsonl").read_text().splitlines()[0])
    assert [turn["content"] for turn in first["messages"]] == ["q", "a"]


def test_a_first_line_that_is_longer_than_cells_are_is_read(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"word " * 40_000 + b"\n")
    before = csv.field_size_limit(1 << 17)
    try:
        assert kind_of_file(tmp_path / "kept") == ".txt"
    finally:
        csv.field_size_limit(before)


def test_places_are_of_standard_input(myna: Command, piped: Piped) -> None:
    content = LINE + b'{"prompt": "q"}\n' + LINE
    piped(content)
    done = myna("data", "check", "-")
    assert done.returncode == 3
    assert "stdin:2: `completion` is missing" in done.stdout and "stdin:3: the same" in done.stdout
    assert "myna-stdin" not in done.stdout + done.stderr
    piped(content)
    told: dict[str, Any] = json.loads(myna("data", "check", "-", "--json").stdout)
    assert told["path"] == "stdin" and "myna-stdin" not in json.dumps(told)
    piped(content)
    done = myna("data", "convert", "-", "-o", "out.jsonl")
    assert done.returncode == 3 and "stdin:2" in done.stderr and "myna-stdin" not in done.stderr
    assert not Path("out.jsonl").exists()


def test_faulty_rows_are_kept_as_they_came(myna: Command, piped: Piped) -> None:
    bad = b'{"prompt": "q", "note": "stdin.jsonl"}\n'
    piped(LINE + bad)
    assert myna("data", "check", "-", "--on-bad-row", "quarantine").returncode == 0
    kept = json.loads(Path("stdin.quarantine.jsonl").read_text())
    assert (kept["where"], kept["row"]) == ("stdin:2", bad.decode())


def test_settings_count(myna: Command, piped: Piped) -> None:
    piped(b'{"a": "q", "b": "a"}\n')
    columns = ("--set", "data.columns.prompt=a", "--set", "data.columns.completion=b")
    assert myna("data", "check", "-", *columns).returncode == 0
    piped(LINE)
    done = myna("data", "check", "-", "--set", "data.format=alpaca")
    assert done.returncode == 3 and "instruction" in done.stdout


def test_what_cannot_be_read_says_so(myna: Command, piped: Piped) -> None:
    piped(b"")
    done = myna("data", "check", "-")
    assert done.returncode == 3 and "stdin: holds no rows" in done.stdout
    piped("prompt,completion\nq,é\n".encode("latin-1"))
    done = myna("data", "check", "-")
    assert "pipe it through iconv -f WINDOWS-1252 -t UTF-8" in done.stdout
    piped(gzip.compress(LINE * 100)[:-9])
    done = myna("data", "check", "-")
    assert done.returncode == 3 and "cut short" in done.stdout + done.stderr


def test_a_terminal_is_not_waited_for(myna: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    done = myna("data", "check", "-")
    assert done.returncode == 2 and "nothing is piped in" in done.stderr
