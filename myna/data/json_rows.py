"""Rows out of JSON: one object a line (JSONL), or one document that holds a list of objects."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from myna.data.check import fault, named, shown
from myna.data.conversation import Place, Row
from myna.data.files import bad_byte, no_rows, open_text, refuse_binary
from myna.errors import DataError

ONE_OBJECT_A_LINE = 'every row is one object on one line: {"prompt": "...", "completion": "..."}'
KIND_OF: Mapping[type, str] = {
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
    dict: "an object",
}
# Stands as a key in an object that names a key twice; its value is that key.
_TWICE = object()


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    return KIND_OF.get(type(value), f"a {type(value).__name__}")


def scan_jsonl(path: Path) -> Iterator[Row | DataError]:
    """Rows of a .jsonl or .ndjson file; a whole JSON array under that name, a common slip, is read too."""
    refuse_binary(path)
    first, _ = _first_lines(path)
    return _scan_document(path) if first.startswith("[") else _scan_lines(path)


def scan_json(path: Path) -> Iterator[Row | DataError]:
    """Rows of a .json file: an array, an object that holds one list of objects, or JSONL under that name."""
    refuse_binary(path)
    first, second = _first_lines(path)
    return _scan_lines(path) if second and _is_object(first) else _scan_document(path)


def _first_lines(path: Path) -> tuple[str, str]:
    """The first two lines that are not blank, "" where there is none."""
    with open_text(path) as file:
        lines = (line.strip() for line in file)
        filled = (line for line in lines if line)
        return next(filled, ""), next(filled, "")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _scan_lines(path: Path) -> Iterator[Row | DataError]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _row_of_line(line, Place(str(path), number))


def _row_of_line(line: str, place: Place) -> Row | DataError:
    bad = bad_byte(line, place)
    if bad:
        return bad
    try:
        value, twice = _decode(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        return fault("D001", _broken(error), where=place, help=ONE_OBJECT_A_LINE)
    except (ValueError, RecursionError) as error:
        return fault("D001", f"broken JSON: {_reason(error)}", where=place, help=ONE_OBJECT_A_LINE)
    return _row_of_value(value, place, twice)


def _row_of_value(value: Any, place: Place, twice: bool) -> Row | DataError:
    if not isinstance(value, dict):
        message = f"a row must be an object with keys; this is {kind_of(value)}"
        return fault("D003", message, where=place, help=ONE_OBJECT_A_LINE)
    key = _twice_in(value) if twice else None
    if key is not None:
        return fault("D004", f"the key `{shown(key)}` stands twice in one object", where=place)
    return Row(value, place)


def _scan_document(path: Path) -> Iterator[Row | DataError]:
    with open_text(path) as file:
        text = file.read()
    lines = enumerate(text.split("\n"), start=1)
    bad = [one for number, line in lines if (one := bad_byte(line, Place(str(path), number)))]
    if bad:
        yield from bad
        return
    if not text.strip():
        yield no_rows(path)
        return
    try:
        document, twice = _decode(text)
    except json.JSONDecodeError as error:
        yield fault("D001", _broken(error), where=Place(str(path), error.lineno), help=_cure(error))
        return
    except (ValueError, RecursionError) as error:
        yield fault("D001", f"broken JSON: {_reason(error)}", where=str(path))
        return
    for number, value in enumerate(_values_of(document, path), start=1):
        yield _row_of_value(value, Place(str(path), number, "row"), twice)


def _values_of(document: Any, path: Path) -> list[Any]:
    """The rows of a document: itself, its one list of objects, or itself as the only row."""
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        message = f"the file must hold a list of objects; this is {kind_of(document)}"
        raise fault("D003", message, where=str(path))
    lists = [key for key, value in document.items() if _is_list_of_objects(value)]
    if len(lists) == 1 and not _is_turn(document[lists[0]][0]):
        rows: list[Any] = document[lists[0]]
        return rows
    empty = [key for key, value in document.items() if value == []]
    if len(document) == 1 and empty:
        raise no_rows(path)
    if len(lists) == 1 or not any(isinstance(value, list | dict) for value in document.values()):
        return [document]
    message = f"the object must hold one list of rows; the keys are: {named(map(str, document))}"
    if lists:
        message += f"; lists of objects stand under: {named(lists)}"
    raise fault(
        "D003", message, where=str(path), help='write the rows alone: [{...}, {...}] or {"data": [...]}'
    )


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _is_turn(value: Mapping[str, Any]) -> bool:
    """A message of one conversation rather than a row: the document is then a single row."""
    return {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()


def _decode(text: str) -> tuple[Any, bool]:
    """The value of a JSON text, and whether an object in it names a key twice (`_twice_in` finds which)."""
    found = False

    def mark(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        nonlocal found
        values = dict(pairs)
        if len(values) < len(pairs):
            found = True
            counts = Counter(key for key, _ in pairs)
            values[_TWICE] = next(key for key, count in counts.items() if count > 1)
        return values

    return json.loads(text, object_pairs_hook=mark), found


def _twice_in(value: Any) -> str | None:
    if isinstance(value, dict):
        if _TWICE in value:
            return str(value[_TWICE])
        value = value.values()
    elif not isinstance(value, list):
        return None
    return next((key for one in value if (key := _twice_in(one)) is not None), None)


def _broken(error: json.JSONDecodeError) -> str:
    reason = error.msg.removesuffix(" at").removesuffix(" starting")
    return f"broken JSON at column {error.colno}: {reason}"


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]


def _cure(error: json.JSONDecodeError) -> str:
    if error.msg == "Extra data":
        return "put the objects in one list, with commas between them, or each on a line of its own"
    return "mend the file at that place; reading cannot go on after it"
