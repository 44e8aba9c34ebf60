"""Rows out of JSON: one object a line (JSONL), or one document that holds a list of objects."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from myna.data.check import fault, named, shown
from myna.data.conversation import Place, Row
from myna.data.files import bad_text, no_rows, refuse_binary
from myna.data.lines import WHOLE, Span, blocks_of, lines_in
from myna.data.opened import open_text
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
    bytes: "bytes that are no UTF-8",
}
MEND = "mend the file at that place; reading cannot go on after it"
PARTS_OF_A_ROW = ("paragraphs", "qas", "replies", "chosen", "rejected")
DEEPEST_LIST = 3  # {"data": {"train": {"rows": [...]}}}
BETWEEN = re.compile(r"[\s,]*")
decode_bytes, decode_blocks = msgspec.json.Decoder().decode, msgspec.json.Decoder().decode_lines
# Stands as a key in an object that names a key twice; its value is that key.
_TWICE = object()


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    return KIND_OF.get(type(value), f"a {type(value).__name__}")


def scan_jsonl(path: Path) -> Iterator[Row | DataError]:
    """Rows of a .jsonl or .ndjson file; a whole JSON array under that name, a common slip, is read too."""
    return scan_lines(path) if is_in_lines(path) else _scan_document(path)


def is_in_lines(path: Path) -> bool:
    """Whether `scan_jsonl` reads the file line by line. DataError where it is no text."""
    refuse_binary(path)
    return not _first_lines(path)[0].startswith("[")


def scan_json(path: Path) -> Iterator[Row | DataError]:
    """Rows of a .json file: an array, an object that holds one list of objects, objects one after another, or JSONL."""
    refuse_binary(path)
    first, second = _first_lines(path)
    return scan_lines(path) if second and _is_object(first) else _scan_document(path)


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


def scan_lines(path: Path, span: Span = WHOLE) -> Iterator[Row | DataError]:
    """Rows of lines: many that msgspec reads at once, and where it refuses the slow way, which tells what is wrong.

    Of a span of the file alone, with their places in all of it.
    """
    name, number = str(path), span.num_before
    for block in blocks_of(path, span):
        values, first = _read_block(block) if isinstance(block, bytes) else None, number + 1
        if values is not None:
            for number, one in enumerate(values, first):
                yield Row(one, Place(name, number))
            continue
        for number, line in enumerate(lines_in(block), first):
            value = _read_line(line) if isinstance(line, bytes) else None
            if value is not None:
                yield Row(value, Place(name, number))
                continue
            text = line if isinstance(line, str) else line.decode("utf-8", "surrogateescape")
            if text.strip():
                yield _row_of_line(text, Place(name, number))


def _read_block(block: bytes) -> list[dict[str, Any]] | None:
    """The objects of lines that hold one each, None where a line holds something else, or counting cannot tell.

    A line break stands in no JSON text, and `}` before one and `{` behind it part two values: so where every line begins
    and ends that way and there are as many values as lines, each line is one.
    """
    if b"\r" in block or not (block.startswith(b"{") and block.endswith(b"}\n")):
        return None
    num_lines = block.count(b"}\n{") + 1
    if num_lines != block.count(b"\n"):
        return None
    try:
        values = decode_blocks(block)
    except (ValueError, RecursionError):
        return None
    return values if len(values) == num_lines and _names_keys_once(block, values) else None


def _read_line(line: bytes) -> dict[str, Any] | None:
    """The object of a line, None where it is blank or broken, or something that only the slow way reads."""
    try:
        value = decode_bytes(line)
    except (ValueError, RecursionError):
        return None
    return value if type(value) is dict and _names_keys_once(line, value) else None


def _names_keys_once(text: bytes, value: dict[str, Any] | list[dict[str, Any]]) -> bool:
    """Whether no object of a JSON text names a key twice, told by counting; False where counting cannot tell.

    Each key that is named stands before `:`. The last of two alike is kept, so then more are counted than are there.
    """
    num_flat = len(value) if isinstance(value, dict) else sum(map(len, value))
    if text.count(b":") == num_flat:
        return True
    if b" :" in text or b"\t:" in text or (b"\\" in text and b'\\\\"' in text):
        return False
    num_named = text.count(b'":')
    if num_named == num_flat:
        return True
    waiting: list[Any] = [value]
    while waiting:
        one = waiting.pop()
        if type(one) is dict:
            num_named -= len(one)
            waiting.extend(v for v in one.values() if type(v) is dict or type(v) is list)
        else:
            waiting.extend(v for v in one if type(v) is dict or type(v) is list)
    return num_named == 0 or num_named == text.count(b'\\":')


def _row_of_line(line: str, place: Place) -> Row | DataError:
    bad = bad_text(line, place)
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
    bad = [one for number, line in lines if (one := bad_text(line, Place(str(path), number)))]
    if bad:
        yield from bad
        return
    if not text.strip():
        yield no_rows(path)
        return
    try:
        documents, twice = _decode_all(text)
    except json.JSONDecodeError as error:
        place = Place(str(path), error.lineno)
        yield fault("D001", _broken(error), where=place, help=MEND, ends_reading=True)
        return
    except (ValueError, RecursionError) as error:
        yield fault("D001", f"broken JSON: {_reason(error)}", where=str(path), ends_reading=True)
        return
    values = _values_of(documents[0], path) if len(documents) == 1 else documents
    for number, value in enumerate(values, start=1):
        yield _row_of_value(value, Place(str(path), number, "row"), twice)


def _values_of(document: Any, path: Path) -> list[Any]:
    """The rows of a document: itself, the one list of objects in it, or itself as the only row."""
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        message = f"the file must hold a list of objects; this is {kind_of(document)}"
        raise fault("D003", message, where=str(path))
    lists = dict(_lists_in(document))
    if len(lists) == 1 and not _is_turn(next(iter(lists.values()))[0]):
        return next(iter(lists.values()))
    empty = [key for key, value in document.items() if value == []]
    if len(document) == 1 and empty:
        raise no_rows(path)
    is_plain = not any(isinstance(value, list | dict) for value in document.values())
    if len(lists) == 1 or is_plain or (not lists and _has_parts(document)):
        return [document]
    message = f"the object must hold one list of rows; the keys are: {named(map(str, document))}"
    if lists:
        message += f"; lists of objects stand under: {named(lists)}"
    raise fault(
        "D003", message, where=str(path), help='write the rows alone: [{...}, {...}] or {"data": [...]}'
    )


def _lists_in(
    document: Mapping[str, Any], above: str = "", depth: int = 1
) -> Iterator[tuple[str, list[Any]]]:
    """The lists of objects in an object, by their path; where it has none, those of the objects in it: `data.train`."""
    lists = {key: value for key, value in document.items() if _is_list_of_objects(value)}
    for key, value in lists.items():
        if key not in PARTS_OF_A_ROW:
            yield f"{above}{key}", value
    for key, value in document.items():
        if not lists and isinstance(value, dict) and depth < DEEPEST_LIST:
            yield from _lists_in(value, f"{above}{key}.", depth + 1)


def _has_parts(document: Mapping[str, Any], depth: int = 1) -> bool:
    """Whether it is one row of a shape that has lists of objects in it: an article, a tree of replies."""
    below = [value for value in document.values() if isinstance(value, dict)] if depth < DEEPEST_LIST else []
    return any(key in PARTS_OF_A_ROW for key in document) or any(_has_parts(one, depth + 1) for one in below)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _is_turn(value: Mapping[str, Any]) -> bool:
    """A message of one conversation rather than a row: the document is then a single row."""
    return {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()


def _decode(text: str) -> tuple[Any, bool]:
    """The value of a JSON text, and whether an object in it names a key twice (`_twice_in` finds which)."""
    twice: list[str] = []
    return json.loads(text, object_pairs_hook=_marking(twice)), bool(twice)


def _decode_all(text: str) -> tuple[list[Any], bool]:
    """The values of JSON texts that stand one after another, with white space or commas between them or nothing."""
    twice: list[str] = []
    decoder, values, at = json.JSONDecoder(object_pairs_hook=_marking(twice)), [], _next_value(text, 0)
    while at < len(text):
        value, end = decoder.raw_decode(text, at)
        values.append(value)
        at = _next_value(text, end)
        if len(values) == 1 and at < len(text) and not isinstance(value, dict):
            raise json.JSONDecodeError("Extra data", text, end)
    return values, bool(twice)


def _next_value(text: str, at: int) -> int:
    found = BETWEEN.match(text, at)
    return found.end() if found else at


def _marking(twice: list[str]) -> Callable[[list[tuple[Any, Any]]], dict[Any, Any]]:
    """Makes objects of pairs; one that names a key twice gets that key under _TWICE, and it is noted in `twice`."""

    def mark(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            values[_TWICE] = next(key for key, count in counts.items() if count > 1)
            twice.append(values[_TWICE])
        return values

    return mark


def _twice_in(value: Any) -> str | None:
    """A key that an object in `value` names twice; however deep, so without recursion."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if _TWICE in one:
                return str(one[_TWICE])
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)
    return None


def _broken(error: json.JSONDecodeError) -> str:
    reason = error.msg.removesuffix(" at").removesuffix(" starting")
    if "BOM" in reason:  # Python's sentence is about its own decoders
        reason = r"a byte order mark within the file: take it out, sed -i 's/^\xEF\xBB\xBF//' FILE"
    return f"broken JSON at column {error.colno}: {reason}"


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
