"""From what holds rows to rows: a file, a folder of files or a pattern of names, each row with its place."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from myna.data.check import fault
from myna.data.column_rows import scan_arrow, scan_parquet, scan_xlsx
from myna.data.conversation import Row
from myna.data.files import changed, damaged, no_rows, refuse_unreadable, sha256_of, stamp_of, unreadable
from myna.data.json_rows import scan_json, scan_jsonl
from myna.data.opened import DamagedArchiveError, row_suffix
from myna.data.table_rows import scan_csv, scan_tsv
from myna.data.text_rows import scan_text
from myna.errors import DataError

SOURCES: Mapping[str, Callable[[Path], Iterator[Row | DataError]]] = {
    ".jsonl": scan_jsonl,
    ".ndjson": scan_jsonl,
    ".json": scan_json,
    ".csv": scan_csv,
    ".tsv": scan_tsv,
    ".parquet": scan_parquet,
    ".arrow": scan_arrow,
    ".feather": scan_arrow,
    ".xlsx": scan_xlsx,
    ".txt": scan_text,
    ".md": scan_text,
}
TEXTS = (".txt", ".md")  # beside files of rows they tell about these
WILD = "*?["
QUARANTINED = ".quarantine.jsonl"  # faulty rows that were set aside: no rows of their folder


def files_of(path: Path) -> list[Path]:
    """The files that `path` names: itself, those of a folder and of the folders in it, or those that fit a pattern.

    In the order of their names. DataError where there is none; hidden files and those that hold no rows are passed over
    in folders and patterns, and so is plain text beside other files of rows.
    """
    if path.is_dir():
        found = [one for one in _files_in(path) if _holds_rows(one, path)]
    elif not path.exists() and any(c in str(path) for c in WILD):
        fitting = map(Path, glob.glob(str(path), recursive=True))
        found = _once(one for one in fitting if _holds_rows(one, one.parent))
    else:
        return [path]
    if not found:
        what = "the folder holds no file of rows" if path.is_dir() else "no file of rows fits this pattern"
        raise fault("D007", what, where=str(path), help=f"files of rows end in {' '.join(SOURCES)}")
    others = [one for one in found if row_suffix(one) not in TEXTS]
    return sorted(others or found)


def _files_in(folder: Path) -> Iterator[Path]:
    """The files in a folder and in those in it, but hidden ones; what goes away while it is looked for is none."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root) / name for name in names)


def is_there(path: Path) -> bool:
    """Whether `path` names files of rows that exist."""
    try:
        return all(file.is_file() for file in files_of(path))
    except DataError:
        return False


def digest_of(path: Path) -> str:
    """The SHA-256 of a file; of several that of their names and digests, so that none changes or moves unseen."""
    files = files_of(path)
    if files == [path]:
        return sha256_of(path)
    root = path if path.is_dir() else Path(os.path.commonpath([file.parent for file in files]))
    lines = "".join(f"{sha256_of(file)}  {file.relative_to(root).as_posix()}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def read_rows(path: Path, *, max_rows: int | None = None) -> Iterator[Row]:
    """The rows of what `path` names, in their order, read as they are asked for (a JSON array is read whole).

    Raises DataError at the first fault, with the file and the line (JSONL, CSV: the line where the record
    starts) or the row number (JSON arrays, tables). A file that cannot be opened is refused at the call.
    """
    return map(_row_or_raise, scan_rows(path, max_rows=max_rows))


def scan_rows(path: Path, *, max_rows: int | None = None) -> Iterator[Row | DataError]:
    """As `read_rows`, with a fault in the place of each row that cannot be read; both count as rows."""
    files = files_of(path)
    # a file that cannot be opened is refused at the call; of several it is one fault among others
    if len(files) == 1:
        refuse_unreadable(files[0], SOURCES)
    return _scan(files, max_rows)


def scan_file(path: Path) -> Iterator[Row | DataError]:
    """The rows of one file that was read before."""
    return SOURCES[row_suffix(path)](path)


def _scan(files: list[Path], max_rows: int | None) -> Iterator[Row | DataError]:
    num_rows = 0
    for file in files:
        if num_rows == max_rows:
            return
        before = num_rows
        try:
            if len(files) > 1:
                refuse_unreadable(file, SOURCES)
            stamp = stamp_of(file)
            for row in scan_file(file):
                if num_rows == max_rows:
                    return
                num_rows += 1
                yield row
            if stamp_of(file) != stamp:
                num_rows += 1
                yield changed(file)
        except DamagedArchiveError as error:
            num_rows += 1
            yield damaged(file, error, num_rows=num_rows - before - 1)
        except OSError as error:
            num_rows += 1
            yield unreadable(file, error)
        except DataError as error:
            if len(files) == 1:
                raise
            num_rows += 1
            yield error
        if num_rows == before:
            yield no_rows(file)


def _once(files: Iterable[Path]) -> list[Path]:
    """Each file by its shortest name: a linked folder that leads back up would give it forty."""
    longest_first = sorted(files, key=lambda file: -len(file.parts))
    return list({(os.path.realpath(file.parent), file.name): file for file in longest_first}.values())


def _holds_rows(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    hidden = hidden or path.name.endswith(QUARANTINED)
    return not hidden and row_suffix(path) in SOURCES and path.is_file()


def _row_or_raise(row: Row | DataError) -> Row:
    if isinstance(row, DataError):
        raise row
    return row


def title_of(path: Path) -> str:
    """What is said of rows in front of their number: the file's name, or how many files there are."""
    files = files_of(path)
    return path.name if len(files) == 1 and files == [path] else f"{path.name or path}: {len(files)} files"
