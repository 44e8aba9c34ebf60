"""From a file to conversations: read, shape found out and said, every fault of the file told at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from myna.data.check import gathered, named
from myna.data.conversation import Conversation, Row
from myna.data.files import sha256_of
from myna.data.formats import Detected, detect_format, differing, format_named, to_conversation
from myna.data.sources import scan_rows
from myna.errors import DataError

NO_COLUMNS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class LoadedRows:
    """The conversations of a file, in its order, and what was found out about it.

    `confidence` is the share of rows with the keys of the format; `sha256` is that of the whole file;
    `said` are the sentences to tell the user.
    """

    conversations: tuple[Conversation, ...]
    format_name: str
    confidence: float
    ignored_keys: tuple[str, ...]
    num_rows: int
    sha256: str
    said: tuple[str, ...]


def load_conversations(
    path: Path,
    *,
    format_name: str = "auto",
    columns: Mapping[str, str] = NO_COLUMNS,
    max_rows: int | None = None,
) -> LoadedRows:
    """Reads the first `max_rows` rows (default: all) of a .jsonl, .json, .csv, .tsv or .parquet file.

    Raises one DataError that lists every fault of the file, grouped by code, with the first three places
    of each; RecipeError where `format_name` or `columns` cannot be.
    """
    rows, faults = [], []
    for row in scan_rows(path, max_rows=max_rows):
        if isinstance(row, DataError):
            faults.append(row)
        else:
            rows.append(row)
    if not rows:
        raise gathered(faults, path)
    try:
        detected = detect_format(rows, format_name=format_name, columns=columns)
    except DataError as error:
        raise gathered([*faults, error], path) from error
    conversations = _converted(rows, detected, faults)
    if faults:
        raise gathered(faults, path)
    return LoadedRows(
        conversations=conversations,
        format_name=detected.name,
        confidence=detected.confidence,
        ignored_keys=detected.ignored,
        num_rows=len(conversations),
        sha256=sha256_of(path),
        said=(_sentence(path, detected, len(conversations)),),
    )


def as_row(conversation: Conversation) -> dict[str, list[dict[str, str]]]:
    """The conversation as a `messages` row; read back it is the same conversation."""
    return {"messages": conversation.as_dicts()}


def _converted(rows: Sequence[Row], detected: Detected, faults: list[DataError]) -> tuple[Conversation, ...]:
    """The rows as conversations; the first fault of each row that cannot be one is added to `faults`."""
    conversations = []
    for row in rows:
        try:
            different = differing(row, detected)
            if different:
                raise different
            conversations.append(to_conversation(row, detected.name, detected.keys))
        except DataError as error:
            faults.append(error)
    return tuple(conversations)


def _sentence(path: Path, detected: Detected, num_rows: int) -> str:
    count = f"{num_rows} row" if num_rows == 1 else f"{num_rows} rows"
    title = format_named(detected.name).title
    ignored = f"; ignored: {named(detected.ignored)}" if detected.ignored else ""
    return f"{path.name}: {count}, {title} (keys {named(detected.keys.values())}){ignored}"
