"""Plain files: what may be opened at all, and the JSON objects in foreign files."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from myna.errors import ModelError

TRUNCATED_CURE = "copy or download it again, and compare its size and SHA-256 with the publisher's"
MAX_JSON = (
    10_000_000  # bytes: what it becomes in memory is 30 times that at worst; the largest index known has 9 MB
)


def refuse(path: Path, message: str, help: str | None = None) -> NoReturn:
    raise ModelError(message, where=str(path), help=help)


def require_plain_file(path: Path) -> int:
    """The size of a regular file, bytes. ModelError for what is absent, a folder, a FIFO or a device: opening could hang."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        reason = (
            error.strerror if isinstance(error, OSError) and error.strerror else "its name is no file name"
        )
        raise ModelError(f"cannot be read: {reason}", where=str(path)) from None
    if not stat.S_ISREG(found.st_mode):
        refuse(path, "is no plain file (a folder, a pipe or a device)", "put the file itself there")
    if not os.access(path, os.R_OK):
        refuse(path, "cannot be read: permission denied", f"chmod u+r {path}")
    return found.st_size


def shown(value: object) -> str:
    """Something out of a foreign file for a message: one short line."""
    text = value if isinstance(value, str) else str(value)
    return repr(text if len(text) <= 80 else text[:77] + "…")


def read_object(path: Path, *, most: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object that a foreign file holds, of at most `most` bytes. ModelError where it is none."""
    size = require_plain_file(path)
    if size > most:
        refuse(path, f"has {size:,} bytes; at most {most:,} are read of such a file")
    return parse_json(path, path.read_bytes(), "it", unique=False)


def parse_json(path: Path, content: bytes, what: str, *, unique: bool = False) -> dict[str, Any]:
    """A JSON object out of a foreign file; with `unique` no key may stand twice in one object. ModelError otherwise."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            refuse(path, f"{what} names {shown(twice)} twice")
        return made

    try:
        value = json.loads(content, object_pairs_hook=once if unique else None)
    except (ValueError, RecursionError) as error:
        reason = (
            "it is nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        )
        raise ModelError(f"{what} is no JSON that can be read: {reason}", where=str(path)) from None
    if not isinstance(value, dict):
        refuse(path, f"{what} is no JSON object")
    return value
