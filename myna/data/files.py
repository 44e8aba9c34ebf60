"""The file under the rows: refused early with a cure, decoded with every bad byte found, and its digest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from myna.data.check import fault, named, nearest
from myna.data.conversation import Place
from myna.errors import DataError

# How `surrogateescape` brings in bytes that are not UTF-8. Good UTF-8 never decodes to these.
BAD_BYTE = re.compile("[\udc80-\udcff]")
HEAD_BYTES = 4096
MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "a gzip file"),
    (b"PK\x03\x04", "a zip file (or a spreadsheet)"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
)
SAVE_AS_UTF8 = "save the file as UTF-8"
ONE_ROW = 'write at least one row into it: {"prompt": "...", "completion": "..."}'


def refuse_unreadable(path: Path, suffixes: Iterable[str]) -> None:
    """DataError where `path` is missing, a folder, of an unknown suffix, closed to us, or 0 bytes long."""
    if path.is_dir():
        raise fault(
            "D007", "is a folder, not a file of rows", where=str(path), help=_files_in(path, suffixes)
        )
    if not path.exists():
        raise fault("D007", "there is no such file", where=str(path), help=_near_files(path))
    if path.suffix.lower() not in suffixes:
        what = f"files that end in `{path.suffix}`" if path.suffix else "files without an ending"
        cure = f"rename or convert it to one of {' '.join(suffixes)}"
        raise fault("D007", f"{what} are not read", where=str(path), help=cure)
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise fault("D007", f"cannot be read: {error.strerror or error}", where=str(path)) from error
    if empty:
        raise no_rows(path)


def no_rows(path: Path) -> DataError:
    return fault("D006", "holds no rows", where=str(path), help=ONE_ROW)


def refuse_binary(path: Path) -> None:
    """DataError where a file of text is in truth compressed, binary or UTF-16: its bytes are never shown."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    what = next((what for magic, what in MAGIC if head.startswith(magic)), None)
    if what is None and b"\0" in head:
        what = "a binary file"
    if what == "UTF-16 text":
        raise fault("D002", "is UTF-16, not UTF-8", where=f"{path}:1", help=SAVE_AS_UTF8)
    if what is not None:
        cure = f"unpack it, or convert it to {path.suffix}"
        raise fault("D007", f"is {what}, not {path.suffix} text", where=str(path), help=cure)


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """The file as UTF-8, with or without a byte order mark; bad bytes pass through for `bad_byte` to find."""
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def bad_byte(line: str, place: Place) -> DataError | None:
    """The fault of a line that held a byte which is not UTF-8, or None."""
    found = BAD_BYTE.search(line)
    if found is None:
        return None
    byte = ord(found.group()) - 0xDC00
    message = f"byte 0x{byte:02X} after {found.start()} characters is not UTF-8"
    return fault("D002", message, where=place, help=SAVE_AS_UTF8)


def sha256_of(path: Path) -> str:
    """The SHA-256 of the whole file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _near_files(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    near = nearest([path.name], names)
    if near:
        return f"did you mean {folder / near}?"
    return f"the files in {folder}: {named(names)}" if names else f"the folder {folder} holds no files"


def _files_in(folder: Path, suffixes: Iterable[str]) -> str:
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in suffixes)
    return f"name one of its files: {named(names)}" if names else f"name a file: {' '.join(suffixes)}"
