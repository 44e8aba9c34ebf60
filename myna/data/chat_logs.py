"""Logs of chats with a message a row: who said it, what, and of which conversation.

{"sender": "Anna", "text": "hi", "timestamp": "2024-05-01T10:00:00Z", "conversation_id": "7"}
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from myna.data.check import fault, shown
from myna.data.conversation import Place, Row
from myna.data.shapes import Column, Keys, Reading, is_filled, text_of
from myna.data.speakers import Talk, find_assistant, read_spoken, told_of
from myna.errors import DataError

COLUMNS = (
    Column("sender", ("sender", "author", "speaker", "user", "from", "name", "role")),
    Column("text", ("text", "message", "content", "body")),
    Column(
        "conversation",
        ("conversation_id", "conversation", "thread_id", "thread", "chat_id", "session_id", "session", "channel"),
        required=False,
    ),
    Column("time", ("timestamp", "datetime", "date", "time", "created_at", "sent_at"), required=False),
)  # fmt: skip
# beside these a name and a text are something else: a reply in a tree, an article, a labelled sentence
NO_CHAT = frozenset(
    ("parent_id", "parent_message_id", "title", "url", "subject", "label", "prompt", "completion", "rating")
)
LATER_SENDERS = ("tool", "function")
DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
BARE_DAY = re.compile(r"(?:19|20)\d{6}")  # 20240501; as seconds it would be a day of 1970
MILLISECONDS = 1e11  # a number of seconds above it would be the year 5138


@dataclass(frozen=True)
class _Said:
    """One message."""

    speaker: str
    text: str
    place: Place
    moment: float | None


def is_log(row: Row, keys: Keys) -> bool:
    """Whether the row is a message: a name and a text, and nothing that makes it another thing."""
    return isinstance(row.values[keys["sender"]], str | None) and not NO_CHAT.intersection(row.values)


def gather_log(rows: Sequence[Row], keys: Keys) -> Iterator[Row | DataError]:
    """One row a conversation: of one id; without ids of one day, without times of one file. Messages in order of time."""
    talks: dict[tuple[str, str], list[_Said]] = {}
    shared: dict[tuple[str, str], dict[str, Any]] = {}  # what stands under a key in every message of a talk
    for row in rows:
        try:
            said = _Said(
                _speaker(row, keys), text_of(row, keys["text"]), row.place, _moment(_cell(row, keys, "time"))
            )
        except DataError as error:
            yield error
            continue
        talk_id = _talk_of(row, keys)
        talks.setdefault(talk_id, []).append(said)
        known = shared.setdefault(talk_id, dict(row.values))
        for key in [key for key, value in known.items() if row.values.get(key) != value]:
            del known[key]
    speakers = tuple(dict.fromkeys(said.speaker for talk in talks.values() for said in talk))
    for talk_id, talk in talks.items():
        ordered = (
            sorted(talk, key=lambda said: said.moment or 0.0)
            if all(s.moment is not None for s in talk)
            else talk
        )
        lines = tuple((said.speaker, said.text) for said in ordered)
        told = {"lines": lines, "speakers": speakers, "sorted": ordered != talk}
        yield Row(shared[talk_id] | told, ordered[0].place)


def talks_of_log(row: Row, keys: Keys, reading: Reading) -> Iterator[Talk]:
    """The one talk of a row that `gather_log` made."""
    speakers = row.values["speakers"]
    assistant = reading.assistant or find_assistant(speakers)
    yield Talk(row.values["lines"], row.place, assistant, speakers, sorted=row.values["sorted"])


read_log, tell_log = read_spoken(talks_of_log), told_of(talks_of_log)


def _speaker(row: Row, keys: Keys) -> str:
    speaker = text_of(row, keys["sender"]).strip()
    if speaker.casefold() in LATER_SENDERS:
        raise fault("D017", f"messages from `{shown(speaker)}` are not supported yet", where=row.place)
    return speaker


def _cell(row: Row, keys: Keys, column: str) -> Any:
    key = keys.get(column)
    return row.values.get(key) if is_filled(row, key) and key is not None else None


def _talk_of(row: Row, keys: Keys) -> tuple[str, str]:
    """What the messages of one conversation have in common."""
    identity = _cell(row, keys, "conversation")
    if identity is not None:
        return ("id", str(identity))
    time = _cell(row, keys, "time")
    day = DAY.match(str(time).strip())
    moment = _moment(time)
    if day is not None:
        return (row.place.path, day.group())
    return (row.place.path, "" if moment is None else str(int(moment // 86_400)))


def _moment(value: Any) -> float | None:
    """Seconds since 1970 of a number or of an ISO 8601 text; None where it is neither: 05/04 may be two days."""
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    text = str(value).strip()
    if BARE_DAY.fullmatch(text):
        with contextlib.suppress(ValueError):
            return datetime.strptime(text, "%Y%m%d").replace(tzinfo=UTC).timestamp()
    with contextlib.suppress(ValueError):
        seconds = float(text)
        seconds = seconds / 1000 if seconds > MILLISECONDS else seconds
        return seconds if math.isfinite(seconds) else None
    if not DAY.match(text):
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
