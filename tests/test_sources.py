"""Rows out of every kind of file: values, places, and each fault where it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from myna.data.conversation import Place
from myna.data.sources import SOURCES, read_rows, scan_rows
from myna.errors import DataError

PAIRS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "سلام"}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def values(path: Path, max_rows: int | None = None) -> list[Any]:
    return [row.values for row in read_rows(path, max_rows=max_rows)]


def places(path: Path) -> list[str]:
    return [str(row.place).removeprefix(str(path)) for row in read_rows(path)]


def refused(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert caught.value.where and str(path) in caught.value.where
    return caught.value


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(PAIRS)),
        ("a.ndjson", lines(PAIRS)),
        ("A.JSONL", lines(PAIRS)),
        ("a.jsonl", "\ufeff" + lines(PAIRS)),
        ("a.jsonl", "\n" + lines(PAIRS).replace("\n", "\r\n\r\n")),
        ("a.jsonl", lines(PAIRS).replace("\n", "\r")),
        ("a.jsonl", lines(PAIRS).rstrip()),
        ("a.jsonl", json.dumps(PAIRS, indent=1)),
        ("a.json", json.dumps(PAIRS)),
        ("a.json", "\ufeff" + json.dumps(PAIRS, indent=2)),
        ("a.json", json.dumps({"version": "1", "data": PAIRS})),
        ("a.json", lines(PAIRS)),
        ("a.json", lines(PAIRS).replace("\n", "")),
        ("a.json", lines(PAIRS).replace("\n", ",\n\n ")),
        ("a.json", "".join(json.dumps(row, indent=1) for row in PAIRS)),
        ("a.json", json.dumps({"version": 1, "data": {"train": PAIRS}})),
        ("a.json", json.dumps({"a": {"b": {"c": PAIRS}}, "d": {"e": 1}})),
        ("a.csv", "prompt|completion\na|b\nc|سلام\n"),
        ("a.csv", "prompt\tcompletion\na\tb\nc\tسلام\n"),
        ("a.tsv", "prompt;completion\na;b\nc;سلام\n"),
        ("a.csv", "prompt,completion\na,b\nc,سلام\n"),
        ("a.csv", "\ufeffprompt,completion\r\na,b\r\n\r\nc,سلام"),
        ("a.csv", "prompt;completion\na;b\nc;سلام\n"),
        ("a.tsv", "prompt\tcompletion\na\tb\nc\tسلام\n"),
    ],
)
def test_every_dress_gives_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    assert values(write(tmp_path / name, content)) == PAIRS


def test_parquet_rows_and_row_numbers(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", PAIRS)
    assert values(path) == PAIRS
    assert places(path) == [": row 1", ": row 2"]


def test_every_suffix_is_tried_here() -> None:
    here = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"}
    elsewhere = {".arrow", ".feather", ".xlsx", ".txt", ".md"}  # test_column_rows, test_text_rows
    assert set(SOURCES) == here | elsewhere


def test_jsonl_places_are_real_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\n{"a": 1}\n\n\n{"a": 2}')
    assert places(path) == [":2", ":5"]
    assert next(read_rows(path)).place == Place(str(path), 2)


def test_line_separators_of_unicode_do_not_end_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": "x\u2028y\u2029z\x85"}\n{"a": 2}\n')
    assert values(path) == [{"a": "x\u2028y\u2029z\x85"}, {"a": 2}]
    assert places(path) == [":1", ":2"]


def test_csv_places_are_where_records_start(tmp_path: Path) -> None:
    text = 'prompt,completion\n"one\ntwo\nthree",x\n\nlast,"y, ""z"""\n'
    path = write(tmp_path / "a.csv", text)
    assert values(path) == [
        {"prompt": "one\ntwo\nthree", "completion": "x"},
        {"prompt": "last", "completion": 'y, "z"'},
    ]
    assert places(path) == [":2", ":6"]


def test_csv_cells_may_be_longer_than_the_modules_own_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "prompt,completion\n" + "x" * 200_000 + ",y\n")
    assert len(values(path)[0]["prompt"]) == 200_000


def test_json_array_places_are_row_numbers(tmp_path: Path) -> None:
    assert places(write(tmp_path / "a.json", json.dumps(PAIRS))) == [": row 1", ": row 2"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "completion": "a"},
    ],
)
def test_one_object_alone_is_one_row(tmp_path: Path, row: dict[str, Any]) -> None:
    assert values(write(tmp_path / "a.json", json.dumps(row, indent=1))) == [row]


def test_max_rows_counts_faulty_rows_and_stops_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": 1}\nbroken\n{"a": 3}\nbroken too\n')
    kinds = [type(row).__name__ for row in scan_rows(path, max_rows=3)]
    assert kinds == ["Row", "DataError", "Row"]
    assert values(path, max_rows=1) == [{"a": 1}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_rows_come_before_the_end_is_read(tmp_path: Path, name: str) -> None:
    """A broken end does not keep the rows before it back; Parquet goes over a border of batches."""
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, [{"a": n} for n in range(5000)])
        rows = read_rows(path)
        assert next(rows).values == {"a": 0}
        assert sum(1 for _ in rows) == 4999
        return
    body = {"a.jsonl": '{"a": "0"}\n' * 3 + "broken\n", "a.csv": "a\n0\n0\n0\n1,2\n"}[name]
    rows = read_rows(write(path, body))
    assert [next(rows).values for _ in range(3)] == [{"a": "0"}] * 3
    with pytest.raises(DataError):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "code", "where", "says"),
    [
        ("a.jsonl", "", "D006", "", "holds no rows"),
        ("a.jsonl", " \n\n", "D006", "", "holds no rows"),
        ("a.json", " \n", "D006", "", "holds no rows"),
        ("a.json", "[]", "D006", "", "holds no rows"),
        ("a.json", '{"data": []}', "D006", "", "holds no rows"),
        ("a.csv", "prompt,completion\n", "D006", "", "holds no rows"),
        ("a.jsonl", '{"a": 1}\n{"a": 1,}\n', "D001", ":2", "broken JSON at column 9"),
        ("a.jsonl", '{"a": "cut\n{"a": 1}\n', "D001", ":1", "Unterminated string"),
        ("a.jsonl", '{"a": ' + "[" * 100_000 + "\n", "D001", ":1", "nested too deeply"),
        ("a.jsonl", '{"a": 1' + "0" * 5000 + "}\n", "D001", ":1", "broken JSON"),
        ("a.json", '[\n{"a": 1},\n{"a" 2}\n]', "D001", ":3", "broken JSON at column 6"),
        ("a.json", '[{"a": 1}] {"a": 2}', "D001", ":1", "Extra data"),
        ("a.json", '{"a": 1}\n\n{"a" 2}{"a": 3}', "D001", ":3", "broken JSON at column 6"),
        ("a.jsonl", '{"a": 1}\n42\n', "D003", ":2", "a number"),
        ("a.jsonl", "null\n", "D003", ":1", "null"),
        ("a.json", '[{"a": 1}, ["b"]]', "D003", ": row 2", "a list"),
        ("a.json", '"text"', "D003", "", "a text"),
        ("a.json", '{"d": {"train": [{"a": 1}], "test": [{"a": 1}]}}', "D003", "", "under: d.train, d.test"),
        ("a.json", '{"x": [{"a": 1}], "y": [{"a": 1}]}', "D003", "", "under: x, y"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "D004", ":2", "`a` stands twice"),
        ("a.json", '[{"a": 1}, {"m": [{"b": 1, "b": 1}]}]', "D004", ": row 2", "`b` stands twice"),
        ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', "D002", ":2", "byte 0xE9 after 10 characters"),
        ("a.json", b'[\n{"a": "\xff"}]', "D002", ":2", "byte 0xFF"),
        ("a.csv", b'a,b\n1,2\n"x\ny\xe9",3\n', "D002", ":4", "byte 0xE9"),
        ("a.csv", b"a,\xe9\n1,2\n", "D002", ":1", "byte 0xE9"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "D005", ":3", "3 cells where the header has 2 (a, b)"),
        ("a.csv", "a,b\n1\n", "D005", ":2", "1 cells"),
        ("a.csv", 'a,b\n1,2\n3,"open\n\n', "D005", ":3", "broken cell"),
        ("a.csv", "a,b,a\n1,2,3\n", "D005", ":1", "twice: a"),
        ("a.csv", ",\n1,2\n", "D005", ":1", "header is blank"),
        ("a.jsonl", b"PK\x03\x04\x00\x01", "D007", "", "a zip file"),
        ("a.json", b"\x1f\x8b\x08abc", "D007", "", "the gzip file"),
        ("a.csv", b"a\x00\x01", "D007", "", "a binary file"),
        ("a.parquet", b"PAR1 no parquet", "D007", "", "no whole Parquet file"),
        ("a.text", "text", "D007", "", "`.text` are not read"),
        ("rows", "text", "D007", "", "without an ending"),
    ],
)
def test_refused_with_code_and_place(
    tmp_path: Path, name: str, content: str | bytes, code: str, where: str, says: str
) -> None:
    path = write(tmp_path / name, content)
    error = refused(path)
    assert (error.code, error.where) == (code, f"{path}{where}")
    assert says in error.message
    assert error.exit_code == 3


def test_reading_goes_on_after_a_bad_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"a,b\n1,\xff\n3,4\n5,6,7\n8,9\n")
    found = [row.code if isinstance(row, DataError) else row.values["a"] for row in scan_rows(path)]
    assert found == ["D002", "3", "D005", "8"]


def test_two_parquet_columns_of_one_name(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["a", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert refused(tmp_path / "a.parquet").code == "D005"


def test_a_missing_file_names_its_neighbours_at_the_call(tmp_path: Path) -> None:
    write(tmp_path / "orders.jsonl", lines(PAIRS))
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / "order.jsonl")
    assert caught.value.help == f"did you mean {tmp_path / 'orders.jsonl'}?"
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / "zzz.csv")
    assert "orders.jsonl" in str(caught.value.help)
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / "nowhere" / "a.csv")
    assert "does not exist either" in str(caught.value.help)
