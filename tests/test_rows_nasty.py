"""Files that nobody means to give: very long, very wide, endless, swollen, looping, oddly named, oddly typed."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import json
import lzma
import os
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
from conftest import Command

from myna.data.quarantine import quarantine_lines
from myna.data.rows import ReadRows, read_conversations
from myna.data.sources import read_rows, scan_rows
from myna.errors import DataError

MEBIBYTE = 1 << 20


def pair(n: int, **more: str) -> str:
    return json.dumps({"prompt": f"q{n}", "completion": f"a{n}", **more}) + "\n"


def write(path: Path, *texts: str | bytes) -> Path:
    path.write_bytes(b"".join(text.encode() if isinstance(text, str) else text for text in texts))
    return path


def answers(read: ReadRows) -> list[str]:
    return [conversation.answer() for conversation in read.conversations]


def told(read: ReadRows) -> list[tuple[str, str]]:
    return [(error.code, str(error.where).removeprefix(str(read.path))) for error in read.faults]


@pytest.fixture
def in_time() -> Iterator[None]:
    """What never ends is a failure after half a minute."""
    if not hasattr(signal, "SIGALRM"):
        pytest.skip("no alarm here")

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("it never ends")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# Long and wide


def test_a_line_of_50_megabytes_is_one_row(tmp_path: Path) -> None:
    long = "x y " * (50_000_000 // 4)
    path = write(tmp_path / "a.jsonl", pair(1), pair(2, completion=long).replace("a2", "b"), pair(3))
    read = read_conversations(path)
    assert [len(answer) for answer in answers(read)] == [2, len(long), 2] and not read.faults


@pytest.mark.parametrize("close", ["", "]" * 100_000 + ', "completion": "a"}'])
def test_a_hundred_thousand_brackets_are_one_faulty_row(tmp_path: Path, close: str) -> None:
    deep = '{"prompt": ' + "[" * 100_000 + close + "\n"
    read = read_conversations(write(tmp_path / "a.jsonl", pair(1), deep, pair(3)))
    assert told(read) == [("D001", ":2")] and answers(read) == ["a1", "a3"]
    assert "nested too deeply" in read.faults[0].message


def test_keys_of_a_megabyte_are_cut_where_they_are_told(tmp_path: Path) -> None:
    key = "k" * MEBIBYTE
    path = write(tmp_path / "a.jsonl", pair(1, **{key: "x"}), pair(2).replace("prompt", key), pair(3))
    read = read_conversations(path)
    assert told(read) == [("D012", ":2")] and answers(read) == ["a1", "a3"]
    assert len(str(read.faults[0])) < 1000
    unknown = read_conversations(write(tmp_path / "b.jsonl", json.dumps({key: "q", key + "2": "a"})))
    assert [error.code for error in unknown.faults] == ["D010"] and len(str(unknown.faults[0])) < 3000


def test_a_table_of_ten_thousand_columns(tmp_path: Path) -> None:
    header = ",".join(["prompt", *(f"c{n}" for n in range(10_000)), "completion"])
    record = ",".join(["q", *["x"] * 10_000, "a"])
    read = read_conversations(write(tmp_path / "a.csv", f"{header}\n{record}\nq,a\n{record}\n"))
    assert answers(read) == ["a", "a"] and told(read) == [("D005", ":3")]
    assert len(str(read.faults[0])) < 1000


# No files of rows


def test_a_folder_may_be_named_like_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "x.jsonl"
    folder.mkdir()
    with pytest.raises(DataError, match="holds no file of rows"):
        scan_rows(folder)
    write(folder / "a.jsonl", pair(1))
    assert answers(read_conversations(folder)) == answers(read_conversations(tmp_path)) == ["a1"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such files there")
@pytest.mark.parametrize("target", ["/dev/null", "/dev/zero", "/dev/full", None])
def test_pipes_and_devices_are_refused_at_once(
    myna: Command, tmp_path: Path, in_time: None, target: str | None
) -> None:
    path = tmp_path / "a.jsonl"
    if target is None:
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    for command in (
        ["data", "check", "a.jsonl"],
        ["data", "convert", "a.jsonl", "-o", "b.jsonl"],
        ["init", "a.jsonl"],
    ):
        done = myna(*command)
        assert done.returncode == 3 and "is no plain file" in done.stdout + done.stderr, command
    write(tmp_path / "good.jsonl", pair(1))
    assert answers(read_conversations(tmp_path)) == ["a1"]  # in folders they are passed over


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_that_lead_in_a_circle(myna: Command, tmp_path: Path, in_time: None) -> None:
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    done = myna("data", "check", "loop.jsonl")
    assert done.returncode == 3 and "no such file" in done.stdout
    write(tmp_path / "a.jsonl", pair(1))
    (tmp_path / "inner").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "*.jsonl", tmp_path / "**" / "*.jsonl"):
        assert answers(read_conversations(path)) == ["a1"], path


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_one_fault_among_others(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", pair(1))
    write(tmp_path / "b.jsonl", pair(2)).chmod(0)
    read = read_conversations(tmp_path)
    assert [error.code for error in read.faults] == ["D007"] and answers(read) == ["a1"]
    assert "Permission denied" in read.faults[0].message


# Names


@pytest.mark.skipif(sys.platform != "linux", reason="names are any bytes there alone")
def test_names_of_any_bytes_are_told_on_one_line(myna: Command, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in (b"new\nline\x1b[31m.jsonl", b"caf\xe9.jsonl"):
        write(folder / os.fsdecode(name), pair(1), "broken\n")
    done = myna("data", "check", "rows")
    assert done.returncode == 3 and "\x1b" not in done.stdout
    assert "  rows/new\\nline\\x1b[31m.jsonl:2: broken JSON" in done.stdout
    assert "  rows/caf\\udce9.jsonl:2: broken JSON" in done.stdout
    asked = myna("data", "check", "rows", "--on-bad-row", "quarantine")
    assert asked.returncode == 0, asked.stderr
    assert len((tmp_path / "rows.quarantine.jsonl").read_text().splitlines()) == 2
    done = myna("data", "check", os.fsdecode(b"rows/caf\xe9.jsonl"))
    assert done.returncode == 2 and "the name is not UTF-8" in done.stderr


# Joined files


def test_a_byte_order_mark_within_lines_is_told(tmp_path: Path) -> None:
    read = read_conversations(write(tmp_path / "a.jsonl", pair(1), "\ufeff", pair(2), pair(3)))
    assert told(read) == [("D001", ":2")] and answers(read) == ["a1", "a3"]
    assert "a byte order mark within the file" in read.faults[0].message


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_header_within_a_table_is_no_row(tmp_path: Path, mark: str) -> None:
    text = f"prompt,completion\nq1,a1\n{mark}prompt,completion\nq2,a2\n"
    read = read_conversations(write(tmp_path / "a.csv", text))
    assert told(read) == [("D005", ":3")] and answers(read) == ["a1", "a2"]
    assert "header stands here again" in read.faults[0].message


# Swollen archives: a small file that unpacks to what no memory holds


def streams(pack: Callable[[bytes], bytes], content: bytes = b"a") -> bytes:
    """80 MiB in a few kilobytes: the same packed stream again and again."""
    return pack(content * MEBIBYTE) * 80


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.jsonl.gz", gzip.compress), ("a.csv.bz2", bz2.compress), ("a.json.xz", lzma.compress)],
)
def test_an_archive_that_unpacks_to_far_more_than_itself_is_refused(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    head = b"prompt,completion\nq," if "csv" in name else b'[{"prompt": "q", "completion": "'
    (error,) = list(scan_rows(write(tmp_path / name, pack(head), streams(pack))))
    assert isinstance(error, DataError) and error.code == "D007" and error.ends_reading
    assert "more than 200 times its size" in error.message and "unpack it yourself" in str(error.help)


def test_rows_that_pack_well_are_read(tmp_path: Path) -> None:
    """Below 64 MiB nobody is harmed; the same row ten thousand times packs to a hundredth."""
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(pair(1).encode() * 10_000))
    assert len(list(read_rows(path))) == 10_000


def test_a_workbook_that_unpacks_to_far_more_than_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    openpyxl.Workbook().save(path)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("xl/more.xml", "w") as part,
    ):
        for _ in range(80):
            part.write(b" " * MEBIBYTE)
    (error,) = list(scan_rows(path))
    assert isinstance(error, DataError) and "more than 200 times its size" in error.message


# Columns of other types


def test_columns_of_any_type_beside_the_rows_texts(tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "prompt": pyarrow.array(["q1", "q2"]).dictionary_encode(),
            "completion": ["a1", "a2"],
            "nested": [{"a": {"b": [1, None]}}, None],
            "price": [decimal.Decimal("1.50"), None],
            "when": [datetime.datetime(2026, 1, 2, 3, 4), None],
            "raw": [b"\xff\x00", None],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    read = read_conversations(tmp_path / "a.parquet")
    assert answers(read) == ["a1", "a2"] and not read.faults
    assert read.detected and read.detected.ignored == ("nested", "price", "when", "raw")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (decimal.Decimal("1.50"), "1.50"),
        (datetime.datetime(2026, 1, 2, 3, 4), "2026-01-02T03:04:00"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        ("café".encode(), "café"),
        (7, "7"),
        (True, "true"),
    ],
)
def test_values_of_a_table_are_texts_as_a_sheet_shows_them(tmp_path: Path, value: Any, text: str) -> None:
    table = pyarrow.table({"prompt": ["q", "r"], "completion": [value, None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    read = read_conversations(tmp_path / "a.parquet")
    assert answers(read) == [text] and told(read) == [("D013", ": row 2")]


def test_bytes_that_are_no_text_are_a_faulty_row(tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": [b"q1", b"\xff", b"q3"], "completion": ["a1", "a2", "a3"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    read = read_conversations(tmp_path / "a.parquet")
    assert told(read) == [("D014", ": row 2")] and answers(read) == ["a1", "a3"]
    assert "bytes that are no UTF-8" in read.faults[0].message
    assert len(list(quarantine_lines(read.faults))) == 1


@pytest.mark.parametrize("new", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_texts_by_number_in_a_dictionary_are_texts(tmp_path: Path, new: Callable[..., Any]) -> None:
    column = pyarrow.array(["a", "b", "a"]).dictionary_encode()
    table = pyarrow.table({"prompt": ["q1", "q2", "q3"], "completion": column})
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table)
    assert answers(read_conversations(tmp_path / "a.arrow")) == ["a", "b", "a"]
