"""Rows that cannot be used, kept as they stand in their file beside what is wrong with them.

{"code": "D013", "where": "orders.jsonl:7", "message": "`completion` is empty", "row": "{\"prompt\": …}\n"}

`row` is the text of the file, byte for byte: the line of JSONL, the record of a table of text. Of other files it is the
row's values as JSON, null where there is none. A text that is not UTF-8 stands under `row_base64`.
"""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from myna.data.conversation import Place, Row
from myna.data.opened import open_text, row_suffix
from myna.data.sources import scan_file
from myna.data.table_rows import LONGEST_CELL, TABLES, separator_of
from myna.errors import DataError


def quarantine_lines(faults: Sequence[DataError]) -> Iterator[str]:
    """A line of JSON for each fault that stands at a row; reads their files once more."""
    places = [fault.place for fault in faults if isinstance(fault.place, Place)]
    originals: dict[tuple[str, int], str | None] = {}
    for path in dict.fromkeys(place.path for place in places):
        own = {place.line: place for place in places if place.path == path}
        originals |= {(path, number): text for number, text in _originals(Path(path), own).items()}
    for fault in faults:
        told = {"code": fault.code, "where": fault.where, "message": fault.message}
        place = fault.place
        text = originals.get((place.path, place.line)) if isinstance(place, Place) else None
        yield json.dumps(told | _as_entry(text), ensure_ascii=False) + "\n"


def _as_entry(text: str | None) -> dict[str, str | None]:
    try:
        if text is not None:
            text.encode()
    except UnicodeEncodeError:
        assert text is not None
        content = text.encode(errors="surrogateescape")
        return {"row_base64": base64.b64encode(content).decode("ascii")}
    return {"row": text}


def _originals(path: Path, wanted: Mapping[int, Place]) -> dict[int, str]:
    """The text of the wanted rows by their line or number."""
    if all(place.unit == "line" for place in wanted.values()):
        records = _records(path) if row_suffix(path) in TABLES else _lines(path)
        return {number: text for number, text in records if number in wanted}
    found = {}
    for row in scan_file(path):
        if isinstance(row, Row) and row.place.line in wanted:
            found[row.place.line] = json.dumps(row.values, ensure_ascii=False, default=str)
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with open_text(path, newline="") as file:
        yield from enumerate(file, start=1)


def _records(path: Path) -> Iterator[tuple[int, str]]:
    """Each record of a table with the line where it starts; a broken quote takes the rest of the file."""
    with open_text(path, newline="") as file:
        head = file.readline()
        taken: list[str] = []

        def noted() -> Iterator[str]:
            for line in (head, *file):
                taken.append(line)
                yield line

        csv.field_size_limit(LONGEST_CELL)
        reader: Any = csv.reader(noted(), delimiter=separator_of(head, TABLES[row_suffix(path)]), strict=True)
        start = 1
        while True:
            try:
                if next(reader, None) is None:
                    return
            except csv.Error:
                yield start, "".join(taken)
                return
            yield start, "".join(taken)
            start += len(taken)
            taken.clear()
