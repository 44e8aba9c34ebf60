"""Rows that cannot be used, kept as they stand in their file beside what is wrong with them.

{"code": "D013", "where": "orders.jsonl:7", "message": "`completion` is empty", "row": "{\"prompt\": …}\n"}

`row` is the text of the file: the line of JSONL, the record of a table of text, byte for byte where the file is UTF-8. Of
other files it is the row's values as JSON, null where there is none. A text that is not UTF-8 stands under `row_base64`. A
row with several faults is kept with the first of them.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from myna.data.conversation import Place, Row
from myna.data.opened import DamagedArchiveError, open_text, row_suffix
from myna.data.sources import scan_file
from myna.data.table_rows import LONGEST_CELL, TABLES, separator_of
from myna.errors import DataError


def quarantine_lines(faults: Sequence[DataError]) -> Iterator[str]:
    """A line of JSON for each fault; the files of those that stand at a row are read once more."""
    wanted: dict[str, dict[int, Place]] = {}
    for fault in faults:
        if isinstance(fault.place, Place):
            wanted.setdefault(fault.place.path, {})[fault.place.line] = fault.place
    originals = {path: _originals(Path(path), own) for path, own in wanted.items()}
    for fault in faults:
        told = {"code": fault.code, "where": fault.where, "message": fault.message}
        place = fault.place
        text = originals[place.path].pop(place.line, None) if isinstance(place, Place) else None
        yield _as_line(told | _as_entry(text))


def _as_line(entry: Mapping[str, str | None]) -> str:
    line = json.dumps(entry, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:  # half a character that a key or an id holds
        return json.dumps(entry) + "\n"
    return line


def _as_entry(text: str | None) -> dict[str, str | None]:
    if text is None:
        return {"row": None}
    try:
        text.encode()
    except UnicodeEncodeError:
        content = text.encode(errors="surrogateescape")
        return {"row_base64": base64.b64encode(content).decode("ascii")}
    return {"row": text}


def _originals(path: Path, wanted: Mapping[int, Place]) -> dict[int, str]:
    """The text of the wanted rows by their line or number; those before the place where a packed file is damaged."""
    found: dict[int, str] = {}
    with contextlib.suppress(DamagedArchiveError):
        if all(place.unit == "line" for place in wanted.values()):
            for start, text, num_lines in _records(path) if row_suffix(path) in TABLES else _lines(path):
                # a record has the faults of all its lines
                found |= {line: text for line in range(start, start + num_lines) if line in wanted}
            return found
        for row in scan_file(path):
            if isinstance(row, Row) and row.place.line in wanted:
                found[row.place.line] = json.dumps(row.values, default=str)
    return found


def _lines(path: Path) -> Iterator[tuple[int, str, int]]:
    with open_text(path, newline="") as file:
        for number, line in enumerate(file, start=1):
            yield number, line, 1


def _records(path: Path) -> Iterator[tuple[int, str, int]]:
    """Each record of a table: the line where it starts, its text, its lines; a broken quote takes the rest of the file."""
    csv.field_size_limit(LONGEST_CELL)
    with open_text(path, newline="") as file:
        head = file.readline()
        taken: list[str] = []

        def noted() -> Iterator[str]:
            for line in chain([head], file):
                taken.append(line)
                yield line

        reader: Any = csv.reader(noted(), delimiter=separator_of(head, TABLES[row_suffix(path)]), strict=True)
        start, goes_on = 1, True
        while goes_on:
            try:
                goes_on = next(reader, None) is not None
            except csv.Error:
                goes_on = False
            if taken:
                yield start, "".join(taken), len(taken)
            start += len(taken)
            taken.clear()
