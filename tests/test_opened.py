"""What lies on the disk as text: unpacked, decoded, and an honest word where it cannot be."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from myna.data.opened import open_text, row_suffix
from myna.data.sources import digest_of, read_rows, scan_rows
from myna.errors import DataError

ROWS = [{"prompt": f"q{n} سلام", "completion": "a" * 50} for n in range(400)]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}
each_packing = pytest.mark.parametrize("ending", PACK)


def values(path: Path) -> list[Any]:
    return [row.values for row in read_rows(path)]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@each_packing
def test_packed_rows_are_the_rows(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a.jsonl{ending}", PACK[ending](TEXT.encode()))
    assert values(path) == ROWS
    assert str(next(read_rows(path)).place) == f"{path}:1"


@each_packing
@pytest.mark.parametrize("name", ["a.csv", "a.json"])
def test_other_files_of_text_are_unpacked_too(tmp_path: Path, ending: str, name: str) -> None:
    body = {"a.csv": "prompt,completion\nq,a\n", "a.json": '[{"prompt": "q", "completion": "a"}]'}[name]
    path = write(tmp_path / f"{name}{ending}", PACK[ending](body.encode()))
    assert values(path) == [{"prompt": "q", "completion": "a"}]


@each_packing
def test_a_packed_file_that_is_cut_short_is_said_after_its_last_row(tmp_path: Path, ending: str) -> None:
    packed = PACK[ending](TEXT.encode())
    path = write(tmp_path / f"a.jsonl{ending}", packed[: len(packed) // 2])
    try:
        found = list(scan_rows(path))
    except DataError as error:  # where not even the first byte unpacks
        found = [error]
    last = found[-1]
    assert isinstance(last, DataError) and last.code == "D007" and "is cut short" in last.message
    assert len(found) == 1 or f"after row {len(found) - 1}" in last.message


def test_a_packed_file_with_a_wrong_byte_is_damaged(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(TEXT.encode()))
    packed[-6] ^= 0xFF  # of the checksum
    with pytest.raises(DataError, match="is damaged") as caught:
        values(write(tmp_path / "a.jsonl.gz", bytes(packed)))
    assert caught.value.code == "D007"


def test_what_a_file_is_follows_from_its_bytes(tmp_path: Path) -> None:
    assert values(write(tmp_path / "plain.jsonl.gz", TEXT.encode())) == ROWS
    assert values(write(tmp_path / "packed.jsonl", gzip.compress(TEXT.encode()))) == ROWS


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_utf16_with_a_byte_order_mark_is_read(tmp_path: Path, encoding: str, name: str) -> None:
    body = {"a.csv": "prompt,completion\nq,سلام\n", "a.json": '[{"prompt": "q", "completion": "سلام"}]'}
    text = body.get(name, '{"prompt": "q", "completion": "سلام"}\r\n')
    mark = "" if encoding == "utf-16" else "\ufeff"
    path = write(tmp_path / name, (mark + text).encode(encoding))
    assert values(path) == [{"prompt": "q", "completion": "سلام"}]


@pytest.mark.parametrize(
    ("encoding", "name"), [("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16"), ("utf-32", "UTF-32")]
)
def test_other_wide_encodings_are_named(tmp_path: Path, encoding: str, name: str) -> None:
    path = write(tmp_path / "a.jsonl", TEXT.encode(encoding))
    with pytest.raises(DataError, match=f"looks like {name}") as caught:
        values(path)
    assert caught.value.code == "D002" and "iconv" in str(caught.value.help)


def test_bad_utf16_is_told_by_its_line(tmp_path: Path) -> None:
    good = '{"a": "x"}\n'
    content = (
        b"\xff\xfe"
        + good.encode("utf-16-le")
        + '{"a": "'.encode("utf-16-le")
        + b"\x00\xd8"
        + '"}\n'.encode("utf-16-le")
    )
    found = list(scan_rows(write(tmp_path / "a.jsonl", content)))
    assert found[0].values == {"a": "x"}  # type: ignore[union-attr]
    assert isinstance(found[1], DataError) and found[1].code == "D002" and "UTF-16" in found[1].message
    assert str(found[1].where).endswith("a.jsonl:2")


def test_a_byte_of_another_encoding_has_a_line_to_paste(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "prompt,completion\nq,caf\xe9\n".encode("latin-1"))
    (error,) = scan_rows(path)
    assert isinstance(error, DataError) and str(error.where) == f"{path}:2"
    assert error.help == f"iconv -f WINDOWS-1252 -t UTF-8 {path} > {path.with_name('utf8-a.csv')}"


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.JSONL.GZ", ".jsonl"), ("a.csv", ".csv"), ("a.gz", ""), ("a.b.json.zst", ".json")]
)
def test_the_ending_of_rows(name: str, suffix: str) -> None:
    assert row_suffix(Path(name)) == suffix


def test_nothing_stays_open(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(TEXT.encode()))
    with open_text(path) as file:
        assert file.readline()
    assert file.closed


# Several files


def test_a_folder_is_all_its_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, row in (("b.jsonl", 2), ("a.csv", 1), ("in/c.jsonl.gz", 3)):
        text = f"n\n{row}\n" if name.endswith("csv") else f'{{"n": "{row}"}}\n'
        content = gzip.compress(text.encode()) if name.endswith("gz") else text.encode()
        write(tmp_path / name, content)
    write(tmp_path / "notes.md", b"# not rows")
    write(tmp_path / ".hidden.jsonl", b"broken")
    assert [row["n"] for row in values(tmp_path)] == ["1", "2", "3"]
    assert str(next(read_rows(tmp_path)).place) == f"{tmp_path / 'a.csv'}:2"
    assert [row["n"] for row in values(tmp_path / "*.jsonl")] == ["2"]
    assert [row["n"] for row in values(tmp_path / "**" / "*.jsonl*")] == ["2", "3"]


def test_a_folder_s_digest_knows_every_file(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, b'{"n": 1}\n')
    before = digest_of(tmp_path)
    assert before == digest_of(tmp_path / "*.jsonl") != digest_of(tmp_path / "a.jsonl")
    write(tmp_path / "b.jsonl", b'{"n": 2}\n')
    changed = digest_of(tmp_path)
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    assert len({before, changed, digest_of(tmp_path)}) == 3


def test_a_pattern_or_folder_of_nothing_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match="no file of rows") as caught:
            read_rows(path)
        assert caught.value.code == "D007"


def test_max_rows_counts_over_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, b'{"n": 1}\n{"n": 2}\n')
    assert len(list(read_rows(tmp_path, max_rows=3))) == 3
    assert len(list(read_rows(tmp_path, max_rows=2))) == 2
