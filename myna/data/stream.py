"""Rows as conversations, one after another: the first rows tell the shape, all are counted as they pass, none is held.

    rows ─► Survey (counts, by keys) ─► the shape that most rows have
        └─► Converter (the shape of the first rows) ─► Sink: conversations taken, faults refused

Where most rows turn out to have another shape than the first ones, all are read once more in that one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from myna.data.check import fault
from myna.data.conversation import Conversation, Row
from myna.data.detect import NO_COLUMNS, Detected, Group, Survey, differing, has_required
from myna.data.formats import format_named, keys_of
from myna.data.shapes import AS_THEY_COME, Keys, Reading, grouped
from myna.data.sources import scan_rows
from myna.errors import DataError

GUESSED = 1000  # rows that a shape is first told by


class Sink(Protocol):
    """What becomes of rows: conversations and faults in the order of the file (of rows that belong together at its end)."""

    def take(self, conversation: Conversation) -> None: ...

    def refuse(self, fault: DataError) -> None: ...


AnySink = TypeVar("AnySink", bound=Sink)


@dataclass(frozen=True)
class Streamed(Generic[AnySink]):
    """A sink that has had all rows; `detected` is None where no shape was found, `notes` say something of all together."""

    sink: AnySink
    detected: Detected | None
    num_rows: int
    notes: tuple[str, ...] = ()


def stream_rows(
    path: Path,
    make: Callable[[], AnySink],
    *,
    format_name: str = "auto",
    columns: Mapping[str, str] = NO_COLUMNS,
    max_rows: int | None = None,
    reading: Reading = AS_THEY_COME,
) -> Streamed[AnySink]:
    """The first `max_rows` rows (default: all) of what `path` names, as conversations into a sink that `make` makes.

    Of rows that hold several conversations, or stand in several rows, the first `max_rows` of these. Raises DataError where
    the file cannot be opened at all, RecipeError where `format_name` or `columns` cannot be; every other fault goes into
    the sink.
    """
    rows = scan_rows(path, max_rows=max_rows)
    head = list(islice(rows, GUESSED))
    guess = guessed(head, format_name, columns)
    if max_rows is not None and guess is not None and _is_of_several(guess, reading):
        return _first_of_several(path, make, guess, columns, max_rows, reading)
    sink = make()
    survey = Survey(format_name, columns)
    found, num_rows, notes = _pass(chain(head, rows), survey, guess, sink, reading, str(path))
    if found is not None and (guess is None or (guess.name, guess.keys) != (found.name, found.keys)):
        if max_rows is not None and _is_of_several(found, reading):
            return _first_of_several(path, make, found, columns, max_rows, reading)
        sink = make()
        rows = scan_rows(path, max_rows=max_rows)
        _, _, notes = _pass(rows, Survey(format_name, columns), found, sink, reading, str(path))
    return Streamed(sink, found, num_rows, notes)


def guessed(head: Iterable[Row | DataError], format_name: str, columns: Mapping[str, str]) -> Detected | None:
    """The shape of the first rows, None where they have none."""
    survey = Survey(format_name, columns)
    for row in head:
        if isinstance(row, Row):
            survey.add(row)
    try:
        return survey.detected() if survey.num_rows else None
    except DataError:
        return None


def _is_of_several(detected: Detected, reading: Reading) -> bool:
    """Whether the first rows are no whole conversations, or perhaps not of the language that is wanted."""
    return format_named(detected.name).gather is not None or reading.language is not None


def _first_of_several(
    path: Path,
    make: Callable[[], AnySink],
    detected: Detected,
    columns: Mapping[str, str],
    max_rows: int,
    reading: Reading,
) -> Streamed[AnySink]:
    """The first conversations that all rows together make."""
    sink = make()
    survey = Survey(detected.name, columns)
    first = _First(sink, max_rows)
    found, num_rows, notes = _pass(scan_rows(path), survey, detected, first, reading, str(path))
    return Streamed(sink, found, num_rows, notes)


class _First:
    """Hands the first conversations on, and every fault."""

    def __init__(self, sink: Sink, num_wanted: int) -> None:
        self._sink, self._num_left = sink, num_wanted

    def take(self, conversation: Conversation) -> None:
        if self._num_left:
            self._num_left -= 1
            self._sink.take(conversation)

    def refuse(self, fault: DataError) -> None:
        self._sink.refuse(fault)


def _pass(
    rows: Iterable[Row | DataError],
    survey: Survey,
    detected: Detected | None,
    sink: Sink,
    reading: Reading,
    where: str,
) -> tuple[Detected | None, int, tuple[str, ...]]:
    """Reads rows in a shape; tells theirs, how many there are, and what is to be said of all. Without `detected` they are
    counted alone.

    `where` names the rows in a fault of all of them.
    """
    converter = Converter(detected, reading, sink) if detected else None
    num_unread = survey_rows(rows, survey, converter, sink)
    num_rows = survey.num_rows + num_unread
    found = shape_of(survey, sink, reading)
    notes: tuple[str, ...] = ()
    if converter is not None and found is not None:
        notes = converter.finish()
        refuse_nothing(num_unread + converter.num_made, sink, where)
    return found, num_rows, notes


def survey_rows(
    rows: Iterable[Row | DataError], survey: Survey, converter: Converter | None, sink: Sink
) -> int:
    """Counts and converts rows; how many of them could not be read."""
    num_unread = 0
    for row in rows:
        if isinstance(row, DataError):
            num_unread += 1
            sink.refuse(row)
        else:
            group = survey.add(row)
            if converter is not None:
                converter.take(row, group)
    return num_unread


def shape_of(survey: Survey, sink: Sink, reading: Reading) -> Detected | None:
    """The shape of all rows; None where there are none, and where it cannot be told, which the sink refuses."""
    if not survey.num_rows:
        return None
    try:
        found = survey.detected()
    except DataError as error:
        sink.refuse(error)
        return None
    return replace(found, ignored=tuple(key for key in found.ignored if key != reading.group_by))


def refuse_nothing(num_made: int, sink: Sink, where: str) -> None:
    """Refuses rows of which neither a conversation was made nor a fault."""
    if not num_made:
        sink.refuse(fault("D020", "no conversation is left of these rows", where=where))


class Converter:
    """Rows of one shape into conversations. What depends on a row's keys alone is found out once for each group.

    `num_made` counts conversations and faults.
    """

    def __init__(self, detected: Detected, reading: Reading, sink: Sink) -> None:
        self._detected, self._reading, self._sink = detected, reading, sink
        self._shape = format_named(detected.name)
        self._read, self._gathers = self._shape.read, self._shape.gather is not None
        self.num_made = 0
        self._keys: dict[Group, Keys | None] = {}  # None: rows of another shape
        self._waiting: list[Row] = []

    def take(self, row: Row, group: Group) -> None:
        try:
            keys = self._keys[group]
        except KeyError:
            keys = self._keys[group] = self._keys_of(group)
        if keys is None:
            different = differing(row, self._detected)
            assert different
            self.num_made += 1
            self._sink.refuse(different)
        elif self._gathers:
            self._waiting.append(row)
        else:
            self._convert(row, keys)

    def finish(self) -> tuple[str, ...]:
        """Converts rows that one conversation stands in several of; what is to be said of them."""
        if not self._shape.gather:
            return ()
        made = []
        for row in self._shape.gather(self._waiting, self._detected.keys):
            if isinstance(row, DataError):
                self.num_made += 1
                self._sink.refuse(row)
            else:
                made.append(row)
                self._convert(row, keys_of(row, self._shape, self._detected.keys))
        tell = self._shape.tell
        return tuple(tell(made, self._detected.keys, self._reading)) if tell else ()

    def _keys_of(self, group: Group) -> Keys | None:
        if not has_required(group.first, self._shape, self._detected.keys):
            return None
        return keys_of(group.first, self._shape, self._detected.keys)

    def _convert(self, row: Row, keys: Keys) -> None:
        made = self._read(row, keys, self._reading)
        for one in grouped(made, row, self._reading.group_by) if self._reading.group_by else made:
            self.num_made += 1
            if isinstance(one, DataError):
                self._sink.refuse(one)
            else:
                self._sink.take(one)
