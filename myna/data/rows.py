"""From a file to conversations: read, shape found out and said, every fault of the file told at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from myna.data.check import fault, gathered, named
from myna.data.conversation import Conversation, Place, Row
from myna.data.detect import NO_COLUMNS, Detected, has_required
from myna.data.formats import FORMATS, format_named, keys_of
from myna.data.shapes import AS_THEY_COME, Reading
from myna.data.sources import digest_of, is_there, title_of
from myna.data.spool import Changed, Spool
from myna.data.stream import stream_rows
from myna.errors import DataError
from myna.settings import DataSettings


@dataclass(frozen=True)
class LoadedRows:
    """The conversations of a file, in its order, and what was found out about it.

    `confidence` is the share of rows with the keys of the format; `sha256` is that of the whole file;
    `said` are the sentences to tell the user; `left_out` are the faults of rows that were to be skipped.
    """

    conversations: Sequence[Conversation]
    format_name: str
    confidence: float
    ignored_keys: tuple[str, ...]
    num_rows: int
    sha256: str
    said: tuple[str, ...]
    left_out: tuple[DataError, ...] = ()


@dataclass(frozen=True)
class ReadRows:
    """All that a file gave: the conversations that could be read, and a fault for each that could not.

    `detected` is None where no shape was found; `notes` are sentences about all rows together.
    """

    path: Path
    conversations: Sequence[Conversation]
    detected: Detected | None
    num_rows: int
    faults: tuple[DataError, ...]
    notes: tuple[str, ...] = ()

    @property
    def is_usable(self) -> bool:
        """Whether something is left where faulty rows are left out; what follows a broken end is not known to be rows."""
        return bool(self.conversations) and not any(fault.ends_reading for fault in self.faults)

    def require_trained(self) -> None:
        """DataError where rows of this shape are read and checked, and not trained on yet."""
        if self.detected and not format_named(self.detected.name).trained:
            raise _untrained(self.path, self.detected)


def load_rows(
    path: str | Path,
    data: DataSettings,
    *,
    max_rows: int | None = None,
    known: Mapping[str, Any] | None = None,
) -> LoadedRows:
    """`load_conversations` as a recipe says, with the turns that it trains.

    `known` is what a run's run.json says of these rows: while the file is the same, so is the shape that it is read in.
    """
    same = known is not None and data.format == "auto" and known.get("sha256") == _digest_if_there(Path(path))
    loaded = load_conversations(
        Path(path),
        format_name=str(known["format"]) if same and known else data.format,
        columns=data.columns,
        max_rows=max_rows,
        reading=reading_of(data),
        skip_bad=data.on_bad_row != "fail",
    )
    if data.train_on == "all":
        return loaded
    return replace(loaded, conversations=Changed(loaded.conversations, Conversation.last_turn_trained))


def _digest_if_there(path: Path) -> str | None:
    return digest_of(path) if is_there(path) else None


def reading_of(data: DataSettings) -> Reading:
    """What a recipe chooses where a row holds several conversations, and which of them are held out together."""
    return Reading(
        no_answer=data.no_answer,
        paths=data.paths,
        language=data.language,
        group_by=data.group_by,
        assistant=data.assistant,
    )


def load_conversations(
    path: Path,
    *,
    format_name: str = "auto",
    columns: Mapping[str, str] = NO_COLUMNS,
    max_rows: int | None = None,
    reading: Reading = AS_THEY_COME,
    skip_bad: bool = False,
) -> LoadedRows:
    """Reads the first `max_rows` rows (default: all) of a file, a folder of files, or a pattern of names.

    Of rows that hold several conversations the first `max_rows` of these. `reading` is what the recipe chooses there. With
    `skip_bad` rows that cannot be used are left out, as long as one is left. Raises one DataError that lists every fault of
    the file, grouped by code, with the first three places of each, or says that rows of this shape are not trained on yet;
    RecipeError where `format_name` or `columns` cannot be.
    """
    read = read_conversations(
        path, format_name=format_name, columns=columns, max_rows=max_rows, reading=reading
    )
    read.require_trained()
    if read.faults and not (skip_bad and read.is_usable):
        raise gathered(read.faults, path)
    assert read.detected
    conversations = read.conversations[:max_rows]
    return LoadedRows(
        conversations=conversations,
        format_name=read.detected.name,
        confidence=read.detected.confidence,
        ignored_keys=read.detected.ignored,
        num_rows=len(conversations),
        sha256=digest_of(path),
        said=(
            _sentence(path, read.detected, read.num_rows, len(conversations)),
            *read.notes,
            *_left_out(read.faults),
        ),
        left_out=read.faults,
    )


def read_conversations(
    path: Path,
    *,
    format_name: str = "auto",
    columns: Mapping[str, str] = NO_COLUMNS,
    max_rows: int | None = None,
    reading: Reading = AS_THEY_COME,
) -> ReadRows:
    """As `load_conversations`, with the faults beside what could be read."""
    read = stream_rows(
        path,
        _Kept,
        format_name=format_name,
        columns=columns,
        max_rows=max_rows,
        reading=reading,
    )
    kept = read.sink
    conversations = kept.conversations.settled() if read.detected else ()
    return ReadRows(path, conversations, read.detected, read.num_rows, tuple(kept.faults), read.notes)


class _Kept:
    """Conversations, on disk where they are many, and faults."""

    def __init__(self) -> None:
        self.conversations = Spool()
        self.faults: list[DataError] = []
        self.take, self.refuse = self.conversations.append, self.faults.append


def as_row(conversation: Conversation) -> dict[str, Any]:
    """The conversation as a `messages` row, plain text as a `text` row; read back it is the same conversation."""
    if conversation.is_text:
        return {"text": conversation.answer()}
    turns = [message.as_dict(as_text=True) for message in conversation.messages]
    for turn, message in zip(turns, conversation.messages, strict=True):
        if not message.trained:
            turn["weight"] = 0
    tools = conversation.tool_dicts()
    return {"messages": turns, "tools": tools} if tools else {"messages": turns}


def _left_out(faults: Sequence[DataError]) -> Iterator[str]:
    if faults:
        counts = Counter(one.code for one in faults)
        told = ", ".join(f"{code} {count}" for code, count in sorted(counts.items()))
        yield f"{len(faults)} faulty rows are left out ({told}): `myna data check` tells which"


def _untrained(path: Path, detected: Detected) -> DataError:
    """Rows of a shape that is only checked yet; another shape that has its keys too is the cure."""
    shape = format_named(detected.name)
    like = Row(dict.fromkeys((*detected.keys.values(), *detected.ignored), ""), Place(str(path), 1))
    keys = {one.name: keys_of(like, one, {}) for one in FORMATS if one.trained}
    others = [
        one
        for one in FORMATS
        if one.name in keys and has_required(like, one, keys[one.name]) and one.fits(like, keys[one.name])
    ]
    has_pairs = (
        shape.name == "preference"
    )  # labelled rows have bad answers among them: no other shape is a cure
    cure = (
        f"--set data.format={others[0].name} learns the rows as {others[0].title}"
        if others and has_pairs
        else "give rows of answers to learn: prompt and completion, or messages"
    )
    message = f"these are {shape.title}, which are read and checked, not trained on yet"
    return fault("D017", message, where=str(path), help=cure)


def _sentence(path: Path, detected: Detected, num_rows: int, num_conversations: int) -> str:
    count = f"{num_rows} row" if num_rows == 1 else f"{num_rows} rows"
    title = format_named(detected.name).title
    ignored = f"; ignored: {named(detected.ignored)}" if detected.ignored else ""
    made = f"; {num_conversations} conversations" if num_conversations != num_rows else ""
    return f"{title_of(path)}: {count}, {title} (keys {named(detected.keys.values())}){made}{ignored}"
