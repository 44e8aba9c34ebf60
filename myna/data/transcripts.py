"""Transcripts: a text in which lines begin with who speaks.

    User: hi                        [12/05/2024, 10:15:32] Anna: hi          WhatsApp, on a phone of Apple's
    Assistant: hello,               12/05/2024, 10:15 - Shop: hello          on another
    what can I do?                  what can I do?

A line that begins with no speaker belongs to the message before. Lines with a date name any speaker; without one only the
assistant, users and the speaker of the first line are speakers, so that `Note: …` in an answer stays in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from msgspec.structs import replace

from myna.data.conversation import Place, Row
from myna.data.opened import row_suffix
from myna.data.shapes import Keys, Reading, text_of
from myna.data.speakers import ASSISTANTS, SYSTEMS, USERS, Talk, find_assistant, read_spoken, told_of
from myna.errors import DataError

# User: …   **User:** …   ### User: …
NAMED = re.compile(
    r"(?:#+ |\*\*)?(?P<name>[^\W\d_][\w .'’()-]{0,39}?) ?(?::\*\*|\*\*:|:)(?:[ \t]+(?P<text>.*)|$)"
)
_TIME = r"\d{1,2}[:.]\d{2}(?:[:.]\d{2})?(?:\s?[AaPp]\.?\s?[Mm]\.?)?"
_DATE = r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}"
DATED = re.compile(
    rf"(?:\[(?P<day>{_DATE}),?\s+{_TIME}\]\s*|(?P<other>{_DATE}),?\s+{_TIME}\s+-\s+)"
    r"(?:(?P<name>[^:]{1,60}): ?)?(?P<text>.*)"
)
MARKS = "\u200e\u200f\u202a\u202c\ufeff"  # which way letters run: before names and notices
MEDIA = re.compile(
    r"<Media omitted>|<attached: .*>|(?:image|video|audio|sticker|GIF|document) omitted"
    r"|(?:This message was deleted|You deleted this message)\.?",
    re.IGNORECASE,
)


def is_transcript(row: Row, keys: Keys) -> bool:
    """Whether the text begins with a speaker, and an assistant and a user speak in it, or dated lines of two speakers."""
    text = row.values[keys["text"]]
    if not isinstance(text, str):
        return False
    lines = _lines(text)
    first = next((line for line in lines if line), "")
    if DATED.match(first):
        found = (DATED.match(line) for line in lines)
        return len({match["name"] for match in found if match and match["name"]}) >= 2
    begins = NAMED.match(first)
    if not begins or begins["name"].casefold() not in ASSISTANTS | USERS | SYSTEMS:
        return False
    names = {name.casefold() for name in _names(lines)}
    return bool(names & ASSISTANTS and names & USERS)


def talks_of_transcript(row: Row, keys: Keys, reading: Reading) -> Iterator[Talk | DataError]:
    """The talk of a text; of dated lines one a day."""
    try:
        text = text_of(row, keys["text"])
    except DataError as error:
        yield error
        return
    lines = _lines(text)
    if DATED.match(next((line for line in lines if line), "")):
        yield from _dated_talks(text, row, reading)
        return
    names = _names(lines)
    assistant = (
        reading.assistant
        or find_assistant([n for n in names if n.casefold() in ASSISTANTS])
        or (find_assistant(names))
    )
    speakers = _speakers(names, assistant)
    said: list[tuple[str, list[str]]] = []
    for line in lines:
        match = NAMED.match(line)
        if match and match["name"].casefold() in speakers:
            said.append((match["name"], [match["text"] or ""]))
        elif said:
            said[-1][1].append(line)
    yield Talk(_joined(said), row.place, assistant, tuple(names))


read_transcript, tell_transcript = read_spoken(talks_of_transcript), told_of(talks_of_transcript)


def gather_transcripts(rows: Sequence[Row], keys: Keys) -> Iterator[Row | DataError]:
    """The rows as they are: what is said of them is said of all together."""
    return iter(rows)


def _dated_talks(text: str, row: Row, reading: Reading) -> Iterator[Talk]:
    days: dict[str, list[tuple[str, list[str]]]] = {}
    starts: dict[
        str, int
    ] = {}  # the line of a day's first message; of notices alone there is no talk to place
    notices: dict[str, int] = {}
    said: list[tuple[str, list[str]]] = []
    for number, line in zip(_line_numbers(text), _lines(text), strict=True):
        match = DATED.match(line)
        if match is None:
            if said:
                said[-1][1].append(line)
            continue
        day = match["day"] or match["other"]
        said = days.setdefault(day, [])
        if match["name"] and not MEDIA.fullmatch(match["text"].strip(MARKS)):
            starts.setdefault(day, number)
            said.append((match["name"].strip(), [match["text"]]))
        else:
            notices[day] = notices.get(day, 0) + 1
    speakers = tuple(dict.fromkeys(speaker for talk in days.values() for speaker, _ in talk))
    assistant = reading.assistant or find_assistant(speakers)
    for day, talk in days.items():
        place = replace(_place_in(row, starts.get(day, 1)), part=day)
        yield Talk(_joined(talk), place, assistant, speakers, notices=notices.get(day, 0))


def _line_numbers(text: str) -> Iterator[int]:
    """The number of each of `_lines` as an editor counts: some signs end a line of `splitlines` and none of a file."""
    pieces = text.splitlines(keepends=True)
    return (
        accumulate((piece.endswith(("\n", "\r")) for piece in pieces[:-1]), initial=1) if pieces else iter(())
    )


def _place_in(row: Row, line: int) -> Place:
    """The place of a line of the row's text: of a file of text that line, of any other the row."""
    is_whole_file = row_suffix(Path(row.place.path)) in (".txt", ".md")
    return replace(row.place, line=line) if is_whole_file else row.place


def _lines(text: str) -> list[str]:
    return [line.lstrip(MARKS) for line in text.splitlines()]


def _names(lines: Iterable[str]) -> list[str]:
    """What lines begin with before a colon, each name once."""
    found = (NAMED.match(line) for line in lines)
    return list(dict.fromkeys(match["name"] for match in found if match))


def _speakers(names: Sequence[str], assistant: str | None) -> set[str]:
    """In small letters: the assistant, those who are called users, and whoever speaks first beside the assistant."""
    small = [name.casefold() for name in names]
    others = [name for name in small if assistant is None or name != assistant.casefold()]
    users = [name for name in others if name in USERS] or others[:1]
    return {*users, *SYSTEMS.intersection(small), *([assistant.casefold()] if assistant else [])}


def _joined(said: Iterable[tuple[str, Sequence[str]]]) -> tuple[tuple[str, str], ...]:
    """Each message without blank lines around it; one of nothing but these is none."""
    texts = ((speaker, "\n".join(lines).strip()) for speaker, lines in said)
    return tuple((speaker, text) for speaker, text in texts if text)
