"""Rows out of tables of text: CSV and TSV with a header."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TextIO

from myna.data.check import fault, named
from myna.data.conversation import Place, Row
from myna.data.files import bad_text, refuse_binary
from myna.data.opened import open_text
from myna.errors import DataError

LONGEST_CELL = 2**31 - 1
SEPARATORS = (",", ";", "\t", "|")
TABLES = {".csv": ",", ".tsv": "\t"}  # and what usually parts their cells


def scan_csv(path: Path) -> Iterator[Row | DataError]:
    """Rows of a .csv file; what parts the cells is what parts the header into most."""
    return _scan_table(path, TABLES[".csv"])


def scan_tsv(path: Path) -> Iterator[Row | DataError]:
    return _scan_table(path, TABLES[".tsv"])


def _scan_table(path: Path, separator: str) -> Iterator[Row | DataError]:
    refuse_binary(path)
    with open_text(path, newline="") as file:
        records = _records(file, path, separator)
        head = next(records, None)
        if head is None:
            return
        if isinstance(head, DataError):
            yield head
            return
        place, header = head
        broken = _header_fault(header, place)
        if broken:
            yield broken
            return
        for record in records:
            if isinstance(record, DataError):
                yield record
            else:
                place, cells = record
                yield _row_of_cells(header, cells, place)


def _row_of_cells(header: Sequence[str], cells: Sequence[str], place: Place) -> Row | DataError:
    if len(cells) == len(header):
        if [cells[0].lstrip("\ufeff"), *cells[1:]] == header:
            cure = "take the line out: tables that are joined keep one header"
            return fault("D005", f"the header stands here again ({named(header)})", where=place, help=cure)
        return Row(dict(zip(header, cells, strict=True)), place)
    message = f"{len(cells)} cells where the header has {len(header)} ({named(header)})"
    cure = 'put a cell that holds the separator in quotes: "a, b"'
    return fault("D005", message, where=place, help=cure)


def _header_fault(header: Sequence[str], place: Place) -> DataError | None:
    cure = "the first line names the columns: prompt,completion"
    if not any(cell.strip() for cell in header):
        return fault("D005", "the header is blank", where=place, help=cure)
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        message = f"the header names a column twice: {named(twice)}"
        return fault("D005", message, where=place, help=cure)
    return None


def _records(file: TextIO, path: Path, separator: str) -> Iterator[tuple[Place, list[str]] | DataError]:
    """Each record with the line where it starts; a broken quote ends the reading, a bad byte does not."""
    head = file.readline()
    separator = separator_of(head, separator)
    bad: list[DataError] = []
    reader = csv.reader(_watched(chain([head], file), path, bad), delimiter=separator, strict=True)
    start = 1
    while True:
        place = Place(str(path), start)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            message = f"broken cell in the record that starts here: {error}; the rest of the file is not read"
            cure = 'close every quote; a quote inside is written ""'
            yield fault("D005", message, where=place, help=cure, ends_reading=True)
            return
        if cells is None:
            return
        start = reader.line_num + 1
        if bad:
            yield from bad
            bad.clear()
        elif cells:
            yield place, cells


def separator_of(head: str, usual: str) -> str:
    """What parts cells: `usual` where it parts the header at all, else what parts it into most."""
    csv.field_size_limit(LONGEST_CELL)  # a limit of the whole process; its default cuts at 128 KiB
    counts = {one: len(next(csv.reader([head], delimiter=one), [])) for one in SEPARATORS}
    return usual if counts[usual] > 1 else max((usual, *SEPARATORS), key=counts.__getitem__)


def _watched(lines: Iterable[str], path: Path, bad: list[DataError]) -> Iterator[str]:
    """The lines as they are; those with a byte that is not UTF-8 are noted in `bad` on the way."""
    for number, line in enumerate(lines, start=1):
        broken = bad_text(line, Place(str(path), number))
        if broken:
            bad.append(broken)
        yield line
