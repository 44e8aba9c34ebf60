"""Rows from standard input: kept in a file while they are looked at, since rows are read more than once."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from myna.data.files import damaged
from myna.data.opened import DamagedArchiveError, is_utf16, open_text, read_head
from myna.data.table_rows import separator_of
from myna.errors import MynaError, UsageError

STDIN = "-"
NAME = "stdin"
# what a file begins with, and the ending of files that are read so
KINDS: tuple[tuple[bytes, str], ...] = (
    (b"PAR1", ".parquet"),
    (b"ARROW1", ".arrow"),
    (b"\xff\xff\xff\xff", ".arrow"),  # Arrow's stream format
    (b"PK\x03\x04", ".xlsx"),
)
LONGEST_NAME = 40  # characters of a column's name
HEAD_CHARACTERS = 1 << 20
CONVERTED = re.compile(r"iconv -f (\S+) -t UTF-8 .*")

Told = Callable[[Any], Any]


@contextmanager
def spooled(path: str) -> Iterator[tuple[str, Told]]:
    """The path to read `path` at, and what makes of all that is said about it words about standard input.

    Anything but `-` is itself. UsageError where nothing is piped in.
    """
    if path != STDIN:
        yield path, lambda value: value
        return
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("nothing is piped in", where=NAME, help="cat rows.jsonl | myna data check -")
    with tempfile.TemporaryDirectory(prefix="myna-stdin-") as folder:
        file = keep_stream(sys.stdin.buffer, Path(folder))

        def told(value: Any) -> Any:
            return retold(value, file)

        try:
            yield str(file), told
        except MynaError as error:
            error.message, error.where = told(error.message), told(error.where)
            error.help = told(error.help)
            error.args = (error.message,)
            raise


def keep_stream(stream: BinaryIO, folder: Path) -> Path:
    """Writes a stream into `folder`, under the ending that its content has. DataError where it does not unpack."""
    taken = folder / "taken"
    with taken.open("wb") as out:
        shutil.copyfileobj(stream, out)
    try:
        suffix = kind_of_file(taken)
    except DamagedArchiveError as error:
        raise damaged(Path(NAME), error) from error
    return taken.rename(folder / f"{NAME}{suffix}")


def kind_of_file(path: Path) -> str:
    """The ending of files with this content: a table of cells, JSON by lines or whole, columns, or plain text."""
    head = read_head(path)
    for magic, suffix in KINDS:
        if head.startswith(magic):
            return suffix
    if b"\0" in head and not is_utf16(head):
        return ".jsonl"  # its reader says what is wrong with binary files
    with open_text(path) as file:
        text = file.read(HEAD_CHARACTERS).lstrip()
    first = text.partition("\n")[0].strip()
    if not first or first.startswith(("{", "[")):
        return ".jsonl" if not first or _is_whole(first) else ".json"
    return ".csv" if _is_header(first) else ".txt"


def _is_whole(line: str) -> bool:
    """Whether the line is JSON by itself, or as broken as a line of JSONL may be."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return line.startswith("{") and len(line) > 1 and line.endswith("}")


def _is_header(line: str) -> bool:
    """Whether the line names columns: two or more short names, none twice. A sentence with a comma seldom does."""
    names = [name.strip() for name in next(csv.reader([line], delimiter=separator_of(line, ",")), [])]
    if len(names) < 2 or len(set(names)) < len(names):
        return False
    return all(0 < len(name) <= LONGEST_NAME and len(name.split()) <= 2 for name in names)


def retold(value: Any, file: Path) -> Any:
    """A value as it is said of standard input: wherever a text in it names the file it was kept in."""
    if isinstance(value, str):
        return _renamed(value, file)
    if isinstance(value, MynaError):
        return value
    if isinstance(value, Mapping):
        return {_renamed(str(key), file): retold(one, file) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(retold(one, file) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{one.name: retold(getattr(value, one.name), file) for one in fields(value) if one.init}
        )
    return value


def _renamed(text: str, file: Path) -> str:
    if CONVERTED.fullmatch(text):
        return CONVERTED.sub(r"pipe it through iconv -f \1 -t UTF-8 first", text)
    return text.replace(str(file.resolve()), NAME).replace(str(file), NAME)
