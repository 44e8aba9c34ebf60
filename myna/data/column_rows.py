"""Rows out of binary tables: Parquet, Arrow and spreadsheets, a batch at a time."""

from __future__ import annotations

import contextlib
import datetime
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from myna.data.check import fault, named, shown
from myna.data.conversation import Place, Row
from myna.data.opened import FEWEST_SWOLLEN, MOST_SWOLLEN
from myna.errors import DataError

BATCH_ROWS = 1024
WRITE_AGAIN = "write it again, or convert it to .jsonl"


def scan_parquet(path: Path) -> Iterator[Row | DataError]:
    """Rows of a .parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            yield from _rows_of_batches(file.iter_batches(batch_size=BATCH_ROWS), names, path)
    except (pyarrow.ArrowException, OSError) as error:
        yield _not_whole("Parquet", path, error)


def scan_arrow(path: Path) -> Iterator[Row | DataError]:
    """Rows of an .arrow or .feather file: Arrow's file format, or its stream, as `datasets` caches it."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                reader = pyarrow.ipc.open_file(source)
            except pyarrow.ArrowInvalid:
                source.seek(0)
                reader = pyarrow.ipc.open_stream(source)
                yield from _rows_of_batches(reader, reader.schema.names, path)
                return
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            yield from _rows_of_batches(batches, reader.schema.names, path)
    except (pyarrow.ArrowException, OSError) as error:
        yield _not_whole("Arrow", path, error)


def _rows_of_batches(batches: Any, names: Sequence[str], path: Path) -> Iterator[Row | DataError]:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        cure = "write it again with a name of its own for each column"
        yield fault("D005", f"two columns have one name: {named(twice)}", where=str(path), help=cure)
        return
    number = 0
    for batch in batches:
        for start in range(0, len(batch), BATCH_ROWS):
            for values in _values_of(batch.slice(start, BATCH_ROWS)):
                number += 1
                place = Place(str(path), number, "row")
                if isinstance(values, str):
                    yield fault("D014", values, where=place, help=WRITE_AGAIN)
                else:
                    yield Row(values, place)


def _values_of(batch: Any) -> list[Any]:
    """The rows of a batch as Python has them; a sentence in the place of each that holds what Python has not."""
    try:
        rows = list(batch.to_pylist())
        for field in batch.schema:
            if _is_told_otherwise(field.type):
                rows = [row | {field.name: _value_of(row[field.name])} for row in rows]
        return rows
    except (ValueError, OverflowError, KeyError) as error:
        if len(batch) == 1:
            return [_unreadable(batch, error)]
    return [row for number in range(len(batch)) for row in _values_of(batch.slice(number, 1))]


def _is_told_otherwise(kind: Any) -> bool:
    """Columns whose values are no text in Python and are a text in a table: dates, decimals, and texts written as bytes."""
    from pyarrow import types

    asked = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_decimal)
    return any(is_kind(kind) for is_kind in (*asked, types.is_temporal))


def _unreadable(batch: Any, error: Exception) -> str:
    """What is wrong with the one row of a batch: its first column that cannot be read, and why."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.to_pylist()
        except (ValueError, OverflowError, KeyError) as own:
            return f"`{shown(name)}` cannot be read: {str(own).partition(chr(10))[0]}"
    return f"a value cannot be read: {str(error).partition(chr(10))[0]}"


def _not_whole(kind: str, path: Path, error: Exception) -> DataError:
    reason = str(error).partition("\n")[0]
    message = f"is no whole {kind} file: {reason or type(error).__name__}"
    return fault("D007", message, where=str(path), help=WRITE_AGAIN, ends_reading=True)


def scan_xlsx(path: Path) -> Iterator[Row | DataError]:
    """Rows of the one sheet of an .xlsx file that is not empty; its first row names the columns.

    A row's number is the one that a spreadsheet shows beside it. Formulas count as what they last came to.
    """
    import zipfile

    import openpyxl

    try:
        with zipfile.ZipFile(path) as archive:
            num_bytes = sum(part.file_size for part in archive.infolist())
        if num_bytes > max(FEWEST_SWOLLEN, MOST_SWOLLEN * path.stat().st_size):
            message = f"the workbook unpacks to more than {MOST_SWOLLEN} times its size"
            yield fault("D007", message, where=str(path), help=WRITE_AGAIN, ends_reading=True)
            return
        with path.open("rb") as file:
            book = openpyxl.load_workbook(file, read_only=True, data_only=True)
            yield from _rows_of_book(book, path)
    except (
        Exception
    ) as error:  # of a damaged book openpyxl, zipfile and the XML parser raise some dozen kinds
        yield _not_whole("XLSX", path, error)


def _rows_of_book(book: Any, path: Path) -> Iterator[Row | DataError]:
    filled = [sheet for sheet in book.worksheets if next(_cells(sheet, path), None) is not None]
    if len(filled) > 1:
        names = named(sheet.title for sheet in filled)
        message = f"{len(filled)} sheets hold something: {names}; only one is read"
        yield fault(
            "D005", message, where=str(path), help="save the sheet of rows as a .csv or .xlsx of its own"
        )
        return
    for sheet in filled:
        rows = _cells(sheet, path)
        place, header = next(rows)
        columns = ["" if cell is None else str(cell) for cell in header]
        twice = [name for name, count in Counter(columns).items() if count > 1 or not name.strip()]
        if twice:
            message = f"a column has no name, or another's: {named(twice)}"
            yield fault(
                "D005", message, where=place, help="the first row names the columns: prompt, completion"
            )
            return
        for place, cells in rows:
            if len(cells) > len(columns):
                message = f"{len(cells)} cells where the header has {len(columns)} ({named(columns)})"
                yield fault("D005", message, where=place, help="name every column in the first row")
                continue
            yield Row(dict(zip(columns, [*cells, *[None] * len(columns)], strict=False)), place)


def _cells(sheet: Any, path: Path) -> Iterator[tuple[Place, list[Any]]]:
    """Every row that has a filled cell, without the empty cells at its end."""
    sheet.reset_dimensions()  # what a file says of its size is often wrong
    for number, row in enumerate(sheet.iter_rows(values_only=True), start=1):
        cells = [_value_of(cell) for cell in row]
        while cells and cells[-1] is None:
            cells.pop()
        if cells:
            yield Place(str(path), number, "row"), cells


def _value_of(cell: Any) -> Any:
    """A spreadsheet has dates, and no whole numbers; Parquet has decimals, and texts that are not called so."""
    if isinstance(cell, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return cell.decode()
    if isinstance(cell, Decimal):
        return str(cell)
    if isinstance(cell, float) and cell.is_integer():
        return int(cell)
    if isinstance(cell, datetime.date | datetime.time | datetime.datetime):
        return cell.isoformat()
    return cell
