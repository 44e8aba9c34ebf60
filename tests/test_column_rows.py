"""Rows out of Arrow files and spreadsheets."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pytest

from myna.data.sources import read_rows, scan_rows
from myna.errors import DataError

PAIRS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "سلام"}]


def arrow(path: Path, rows: list[dict[str, Any]], *, stream: bool) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def book(path: Path, **sheets: list[list[Any]]) -> Path:
    made = openpyxl.Workbook()
    made.remove(made.active)
    for name, rows in sheets.items():
        sheet = made.create_sheet(name)
        for row in rows:
            sheet.append(row)
    made.save(path)
    return path


def values(path: Path) -> list[Any]:
    return [row.values for row in read_rows(path)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["a.arrow", "a.feather"])
def test_arrow_files_and_streams(tmp_path: Path, name: str, stream: bool) -> None:
    path = arrow(tmp_path / name, PAIRS, stream=stream)
    assert values(path) == PAIRS
    assert [str(row.place) for row in read_rows(path)] == [f"{path}: row 1", f"{path}: row 2"]


def test_arrow_rows_go_over_the_border_of_a_batch(tmp_path: Path) -> None:
    path = arrow(tmp_path / "a.arrow", [{"n": n} for n in range(2500)], stream=False)
    assert [row["n"] for row in values(path)] == list(range(2500))


def test_a_broken_arrow_file_is_refused(tmp_path: Path) -> None:
    path = arrow(tmp_path / "a.arrow", PAIRS, stream=False)
    path.write_bytes(path.read_bytes()[:100])
    (error,) = scan_rows(path)
    assert isinstance(error, DataError) and error.code == "D007" and "no whole Arrow file" in error.message


def test_a_spreadsheet_has_the_rows_of_its_filled_sheet(tmp_path: Path) -> None:
    rows = [
        ["prompt", "completion", "count", "day"],
        ["a", "b", 3.0, datetime.date(2026, 5, 1)],
        [],
        ["c", "d"],
    ]
    path = book(tmp_path / "a.xlsx", empty=[], rows=rows)
    assert values(path) == [
        {"prompt": "a", "completion": "b", "count": 3, "day": "2026-05-01T00:00:00"},
        {"prompt": "c", "completion": "d", "count": None, "day": None},
    ]
    assert [str(row.place) for row in read_rows(path)] == [f"{path}: row 2", f"{path}: row 4"]


@pytest.mark.parametrize(
    ("sheets", "said"),
    [
        ({"one": [["a"], ["1"]], "two": [["a"], ["2"]]}, "2 sheets hold something: one, two"),
        ({"one": [["a", "a"], ["1", "2"]]}, "a column has no name, or another's: a"),
        ({"one": [["a", None, "b"], ["1", "2", "3"]]}, "a column has no name"),
    ],
)
def test_a_spreadsheet_that_is_no_table_is_refused(tmp_path: Path, sheets: Any, said: str) -> None:
    (error,) = scan_rows(book(tmp_path / "a.xlsx", **sheets))
    assert isinstance(error, DataError) and error.code == "D005" and said in error.message


def test_an_empty_spreadsheet_and_one_that_is_none(tmp_path: Path) -> None:
    (error,) = scan_rows(book(tmp_path / "a.xlsx", one=[]))
    assert isinstance(error, DataError) and error.code == "D006"
    (tmp_path / "b.xlsx").write_bytes(b"PK\x03\x04 and no more")
    (error,) = scan_rows(tmp_path / "b.xlsx")
    assert isinstance(error, DataError) and error.code == "D007" and "no whole XLSX file" in error.message
