"""From a file to rows: .jsonl, .ndjson, .json, .csv, .tsv and .parquet, each row with its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from myna.data.conversation import Row
from myna.data.files import no_rows, refuse_unreadable
from myna.data.json_rows import scan_json, scan_jsonl
from myna.data.table_rows import scan_csv, scan_parquet, scan_tsv
from myna.errors import DataError

SOURCES: Mapping[str, Callable[[Path], Iterator[Row | DataError]]] = {
    ".jsonl": scan_jsonl,
    ".ndjson": scan_jsonl,
    ".json": scan_json,
    ".csv": scan_csv,
    ".tsv": scan_tsv,
    ".parquet": scan_parquet,
}


def read_rows(path: Path, *, max_rows: int | None = None) -> Iterator[Row]:
    """The rows of a file, in its order, read as they are asked for (a JSON array is read whole).

    Raises DataError at the first fault, with the file and the line (JSONL, CSV: the line where the record
    starts) or the row number (JSON arrays, Parquet). A file that cannot be opened is refused at the call.
    """
    refuse_unreadable(path, SOURCES)
    return map(_row_or_raise, _scan(path, max_rows))


def scan_rows(path: Path, *, max_rows: int | None = None) -> Iterator[Row | DataError]:
    """As `read_rows`, with a fault in the place of each row that cannot be read; both count as rows."""
    refuse_unreadable(path, SOURCES)
    return _scan(path, max_rows)


def _scan(path: Path, max_rows: int | None) -> Iterator[Row | DataError]:
    num_rows = 0
    for row in SOURCES[path.suffix.lower()](path):
        if num_rows == max_rows:
            return
        num_rows += 1
        yield row
    if num_rows == 0:
        yield no_rows(path)


def _row_or_raise(row: Row | DataError) -> Row:
    if isinstance(row, DataError):
        raise row
    return row
