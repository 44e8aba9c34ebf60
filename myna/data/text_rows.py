"""Plain text, for continued training: a row is a document, `{"text": ...}` or a whole .txt or .md file.

A document has no prompt and no turns: as a conversation it is one assistant message alone (`Conversation.is_text`), which no
chat template touches.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from myna.data.check import fault
from myna.data.conversation import Message, Place, Row
from myna.data.files import bad_text, refuse_binary
from myna.data.opened import open_text
from myna.data.shapes import Keys, text_of
from myna.errors import DataError

TEXT_KEY = "text"
# Keys that say where a text is from. Beside one that says more, a text may be half of a pair: then the shape must be named.
ABOUT_A_TEXT = frozenset(
    (
        *("id", "_id", "uuid", "idx", "index", "url", "uri", "source", "src", "path", "file", "filename", "file_name"),
        *("title", "author", "authors", "date", "time", "timestamp", "created", "created_at", "added", "crawl", "dump"),
        *("lang", "language", "license", "licence", "domain", "meta", "metadata", "subset", "split", "set", "section"),
        *("sha", "sha256", "md5", "hash", "digest", "version", "publisher", "book", "chapter", "page", "repo"),
    )
)  # fmt: skip


def scan_text(path: Path) -> Iterator[Row | DataError]:
    """The one row of a .txt or .md file: all of it. A place for each line that cannot be decoded."""
    refuse_binary(path)
    lines, num_bad = [], 0
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            bad = bad_text(line, Place(str(path), number))
            if bad:
                num_bad += 1
                yield bad
            lines.append(line)
    text = "".join(lines)
    if text.strip() and not num_bad:
        yield Row({TEXT_KEY: text}, Place(str(path), 1))


def read_document(row: Row, keys: Keys) -> tuple[Message, ...]:
    """The text as it stands."""
    return (Message("assistant", text_of(row, keys[TEXT_KEY])),)


def is_document(row: Row, keys: Keys) -> bool:
    """Whether nothing in the row could be what the text is asked, answers or is labelled with."""
    others = (key for key in row.values if key != keys[TEXT_KEY])
    return all(key.lower() in ABOUT_A_TEXT or not isinstance(row.values[key], str | list) for key in others)


def refuse_texts(num_texts: int, num_rows: int, where: str) -> None:
    """DataError where rows that are to be answered are all plain text."""
    if num_texts == num_rows:
        message = "the rows are plain text: there are no answers to compare"
        raise fault("D017", message, where=where, help="give rows with a question and an answer each")
