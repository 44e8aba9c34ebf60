"""Files with one fault among good rows: how each format is written, and where the fault is to be told.

The good rows are two before and two after the fault. The first holds a line break, so that in CSV lines and rows differ.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow
import pyarrow.parquet

Row = Mapping[str, Any]
JSONL, JSON, CSV, PARQUET = "JSONL", "JSON", "CSV", "Parquet"
ENDINGS: Mapping[str, str] = {JSONL: ".jsonl", JSON: ".json", CSV: ".csv", PARQUET: ".parquet"}
EVERY, TEXTS, OBJECTS = tuple(ENDINGS), (JSONL, JSON, CSV), (JSONL, JSON)
PLACES: Mapping[str, str] = {JSONL: ":3", JSON: ": row 3", CSV: ":5", PARQUET: ": row 3"}
NUM_GOOD = 4


@dataclass(frozen=True)
class Planted:
    """A file with one fault: what is in it, where the fault is said to be, and how many conversations are read all the same.

    `where` follows the path. `num_good` is None where a library decides it; `num_rows` is what is counted, None where it is
    the good rows and the faulty one. `code` is of this format where it is another than the fault's own. `test` are the
    held-out rows of a fault that needs some.
    """

    content: bytes
    where: str
    num_good: int | None = NUM_GOOD
    num_rows: int | None = None
    code: str | None = None
    ending: str = ""
    test: bytes | None = None


@dataclass(frozen=True)
class Fault:
    """`says` and `cure` are regular expressions for the message, with the field in it, and for the help."""

    code: str
    says: str
    cure: str
    files: Mapping[str, Planted | str]


def pair(prompt: str, completion: Any = "an answer") -> Row:
    return {"prompt": prompt, "completion": completion}


def chat(*turns: Any) -> Row:
    return {"messages": [turn(*one.split(": ")) if isinstance(one, str) else one for one in turns]}


def turn(role: str, content: Any = "a text") -> Row:
    return {"role": role, "content": content}


PAIRS = [pair("two\nlines", "answer 1"), *(pair(f"question {n}", f"answer {n}") for n in (2, 3, 4))]
CHATS = [chat(f"user: question {n}", f"assistant: answer {n}") for n in range(4)]

# Writers: rows as each format has them; JSON has a row a line


def as_jsonl(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_json(rows: Sequence[Row]) -> bytes:
    return ("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n").encode()


def as_csv(rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: Sequence[Row]) -> bytes:
    keys = dict.fromkeys(key for row in rows for key in row)
    return parquet_of(pyarrow.table({key: [row.get(key) for row in rows] for key in keys}))


def parquet_of(table: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


WRITERS: Mapping[str, Callable[[Sequence[Row]], bytes]] = {
    JSONL: as_jsonl,
    JSON: as_json,
    CSV: as_csv,
    PARQUET: as_parquet,
}

# Planters: from a fault to its file in each format


def row_at(
    bad: Row, good: Sequence[Row] = PAIRS, formats: Sequence[str] = EVERY, **changes: Any
) -> dict[str, Planted]:
    """The row as the third."""
    rows = [*good[:2], bad, *good[2:]]
    return {
        name: replace(Planted(WRITERS[name](rows), PLACES[name], num_good=len(good)), **changes)
        for name in formats
    }


def text_at(text: str | bytes, good: Sequence[Row] = PAIRS, **changes: Any) -> dict[str, Planted]:
    """The text as the third line of JSONL, and as the third row of JSON, which ends the reading there."""
    raw = text.encode() if isinstance(text, str) else text
    lines = [*as_jsonl(good[:2]).splitlines(), raw, *as_jsonl(good[2:]).splitlines()]
    return {
        JSONL: replace(Planted(b"\n".join(lines) + b"\n", ":3"), **changes),
        JSON: replace(
            Planted(b"[\n" + b",\n".join(lines) + b"\n]\n", ":4", num_good=0, num_rows=1), **changes
        ),
    }


def whole(rows: Sequence[Row], formats: Sequence[str] = EVERY, **changes: Any) -> dict[str, Planted]:
    """A fault that is every row's, told at the first; whole files of one that is a file's alone."""
    first = {JSONL: ":1", JSON: ": row 1", CSV: ":2", PARQUET: ": row 1"}
    settings = {"num_good": 0, "num_rows": len(rows)} | changes
    return {name: replace(Planted(WRITERS[name](rows), first[name]), **settings) for name in formats}


def warned(rows: Sequence[Row], **changes: Any) -> dict[str, Planted]:
    """The last row is the one that is warned of; all rows train."""
    last = {JSONL: f":{len(rows)}", JSON: f": row {len(rows)}", PARQUET: f": row {len(rows)}"}
    last[CSV] = f":{len(rows) + 1 + sum(value.count(chr(10)) for row in rows[:-1] for value in row.values())}"
    settings = {"num_good": len(rows), "num_rows": len(rows)} | changes
    return {name: replace(Planted(WRITERS[name](rows), last[name]), **settings) for name in EVERY}


def told(text: str) -> dict[str, Planted]:
    """A warning about the text of the last row's answer."""
    return warned([*PAIRS, pair("the last question", text)])


def without(reason: str, *formats: str) -> dict[str, str]:
    return dict.fromkeys(formats, reason)


NO_JSON = without("is no JSON", CSV, PARQUET)
CELLS = without("its cells are texts", CSV)
ONE_HEADER = without("all its rows have its columns", CSV, PARQUET)
ONE_TYPE = without("a column has one type", PARQUET)
NO_NULL = without("has no null", CSV)
CSV_ALONE = without("has no cells", JSONL, JSON) | without("keeps its columns apart", PARQUET)
