"""The file under the rows: refused early with a cure, every place that cannot be decoded found, and its digest."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from myna.data.check import fault, named, nearest
from myna.data.conversation import Place
from myna.data.opened import (
    BAD_UTF16,
    HEAD_BYTES,
    UTF32,
    DamagedArchiveError,
    is_utf16,
    open_bytes,
    row_suffix,
)
from myna.errors import DataError

# How `open_text` brings in what is not UTF-8, and bad UTF-16. Good text never decodes to these.
BAD_TEXT = re.compile("[\udc80-\udcff]")
MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip file (or a spreadsheet)"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"%PDF", "a PDF file"),
    (b"\xd0\xcf\x11\xe0", "an old Office file"),
)
ONE_ROW = 'write at least one row into it: {"prompt": "...", "completion": "..."}'
FEWEST_BYTES = 16  # of which can be told whether they are text in two bytes a letter
NULS_OF_UTF16 = 0.3  # the part of the first bytes that are NUL in UTF-16 of Latin letters: a half


def refuse_unreadable(path: Path, suffixes: Iterable[str]) -> None:
    """DataError where the file is missing, of an unknown suffix, a pipe or a device, closed to us, or 0 bytes long."""
    if not path.exists():
        raise fault("D007", "there is no such file", where=str(path), help=_near_files(path))
    if not path.is_file():
        cure = "write what comes out of it into a file of rows first"
        raise fault("D007", "is no plain file: a pipe or a device has no end", where=str(path), help=cure)
    if row_suffix(path) not in suffixes:
        ending = row_suffix(path) or path.suffix
        what = f"files that end in `{ending}`" if ending else "files without an ending"
        cure = f"rename or convert it to one of {' '.join(suffixes)}"
        raise fault("D007", f"{what} are not read", where=str(path), help=cure)
    try:
        with open_bytes(path) as file:
            empty = not file.read(1)
    except DamagedArchiveError as error:
        raise damaged(path, error) from error
    except OSError as error:
        raise unreadable(path, error) from error
    if empty:
        raise no_rows(path)


def no_rows(path: Path) -> DataError:
    return fault("D006", "holds no rows", where=str(path), help=ONE_ROW)


def damaged(path: Path, error: DamagedArchiveError, *, num_rows: int = 0) -> DataError:
    """A compressed file that does not unpack to its end."""
    after = f" after row {num_rows}" if num_rows else ""
    return fault("D007", f"{error}{after}", where=str(path), help=error.cure, ends_reading=True)


def stamp_of(path: Path) -> tuple[int, int, int] | None:
    """What is another once a file is written to, replaced or gone: its inode, size and time of change."""
    try:
        told = path.stat()
    except OSError:
        return None
    return told.st_ino, told.st_size, told.st_mtime_ns


def unreadable(path: Path, error: OSError) -> DataError:
    """A file that the system stops giving out: rights, a broken disk, a server that is gone."""
    return fault("D007", f"cannot be read: {error.strerror or error}", where=str(path), ends_reading=True)


def changed(path: Path) -> DataError:
    """A file that was written to while its rows were read: what was read is neither the old file nor the new one."""
    cure = "read it again once nothing writes to it, or copy it first"
    return fault("D007", "changed while it was read", where=str(path), help=cure, ends_reading=True)


def refuse_binary(path: Path) -> None:
    """DataError where a file of text is in truth binary, or in an encoding that is not read: its bytes are never shown."""
    with open_bytes(path) as file:
        head = file.read(HEAD_BYTES)
    if is_utf16(head):
        return
    what = next((what for magic, what in MAGIC if head.startswith(magic)), None)
    is_wide = len(head) >= FEWEST_BYTES and head.count(0) > NULS_OF_UTF16 * len(head)
    if what is None and (head.startswith(UTF32) or is_wide):
        name = "UTF-32" if head.startswith(UTF32) else "UTF-16 without a byte order mark"
        cure = to_utf8(path, "UTF-32" if head.startswith(UTF32) else "UTF-16LE")
        raise fault("D002", f"looks like {name}: it is not read", where=f"{path}:1", help=cure)
    cure = f"unpack it, or convert it to {row_suffix(path)}"
    if what is None and b"\0" in head:
        line = head[: head.index(0)].count(b"\n") + 1
        what = f"a binary file (a NUL byte in line {line})"
        cure += f"; from text take the NUL out: tr -d '\\000' < {path.name} > clean-{path.name}"
    if what is not None:
        raise fault("D007", f"is {what}, not {row_suffix(path)} text", where=str(path), help=cure)


def to_utf8(path: Path, encoding: str) -> str:
    """A line to paste that makes UTF-8 of a file in another encoding."""
    made = path.with_name(f"utf8-{path.name}")
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(str(made))}"


def bad_text(line: str, place: Place) -> DataError | None:
    """The fault of a line that held what is not UTF-8 (or UTF-16, where the file begins so), or None."""
    found = BAD_TEXT.search(line)
    if found is None:
        return None
    after = f"after {found.start()} characters"
    if found.group() == BAD_UTF16 and not _is_utf8_file(place):
        return fault("D002", f"{after} it is not UTF-16", where=place, help="save the file as UTF-8")
    message = f"byte 0x{ord(found.group()) - 0xDC00:02X} {after} is not UTF-8"
    return fault("D002", message, where=place, help=to_utf8(Path(place.path), "WINDOWS-1252"))


def _is_utf8_file(place: Place) -> bool:
    with open_bytes(Path(place.path)) as file:
        return not is_utf16(file.read(4))


def sha256_of(path: Path) -> str:
    """The SHA-256 of the whole file as it lies on the disk, in hexadecimal."""
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
