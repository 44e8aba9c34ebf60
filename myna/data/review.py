"""Rows looked at before anything is trained: every fault and every warning, grouped by code, and the rows in one screen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from myna.data.check import CODES, SHOWN_PLACES, named
from myna.data.conversation import Conversation
from myna.data.formats import format_named
from myna.data.rows import NO_COLUMNS, ReadRows, read_conversations
from myna.data.shapes import AS_THEY_COME, Reading
from myna.data.warned import Warned, prompt_digests, warnings_of
from myna.errors import DataError

Level = Literal["error", "warning"]
NEEDS_TOKENS = "length in tokens: with a recipe, `myna data show` and `myna train` tell"
SCRIPTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("Latin", re.compile(r"[A-Za-zÀ-ɏ]")),
    ("Greek", re.compile(r"[\u0370-\u03ff]")),
    ("Cyrillic", re.compile(r"[\u0400-\u052f]")),
    ("Hebrew", re.compile(r"[\u0590-\u05ff]")),
    ("Arabic", re.compile(r"[\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufeff]")),
    ("Devanagari", re.compile(r"[\u0900-\u097f]")),
    ("Thai", re.compile(r"[\u0e00-\u0e7f]")),
    ("Hangul", re.compile(r"[\uac00-\ud7af\u1100-\u11ff]")),
    ("Kana", re.compile(r"[\u3040-\u30ff]")),
    ("Han", re.compile(r"[\u4e00-\u9fff\u3400-\u4dbf]")),
)


@dataclass(frozen=True)
class Finding:
    """All of one code: how often, and the first three places with what is wrong there."""

    code: str
    level: Level
    what: str
    count: int
    places: tuple[tuple[str, str], ...]
    cures: tuple[str, ...]


@dataclass(frozen=True)
class Review:
    """What was found in the rows of one path. Lengths are characters of a whole conversation.

    `faults` are all errors, `usable` is whether rows are left without them, `trained` whether this shape can be trained on.
    """

    path: str
    shape: str
    confidence: float
    ignored: tuple[str, ...]
    num_rows: int
    num_conversations: int
    num_turns: int
    num_characters: int
    share_answered: float
    middle: int
    longest: int
    longest_place: str
    scripts: Mapping[str, int]
    findings: tuple[Finding, ...]
    not_checked: tuple[str, ...]
    trained: bool
    usable: bool
    faults: tuple[DataError, ...]

    @property
    def num_errors(self) -> int:
        return sum(finding.count for finding in self.findings if finding.level == "error")

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints: all but the single faults, which the findings count."""
        told = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "faults"}
        return told | {"findings": [asdict(one) for one in self.findings], "num_errors": self.num_errors}

    def as_lines(self) -> Iterator[tuple[str, str]]:
        """(label, text) of the summary."""
        if self.confidence:
            yield "rows", f"{self.num_rows:,}, {self.shape} ({self.confidence:.0%} of the rows have its keys)"
            yield "conversations", f"{self.num_conversations:,} with {self.num_turns:,} turns"
        else:
            yield "rows", f"{self.num_rows:,}, {self.shape}"
        if self.num_conversations:
            yield "characters", f"{self.num_characters:,}, {self.share_answered:.0%} of them in trained turns"
            yield (
                "length",
                f"{self.middle:,} characters in the middle, {self.longest:,} at most ({self.longest_place})",
            )
        if self.scripts:
            yield "scripts", ", ".join(f"{name} {count:,}" for name, count in self.scripts.items())
        if self.ignored:
            yield "ignored keys", named(self.ignored)
        if not self.trained:
            yield "training", f"{self.shape} are read and checked, not trained on yet"
        for one in self.not_checked:
            yield "not checked", one


def review_rows(
    path: Path,
    *,
    format_name: str = "auto",
    columns: Mapping[str, str] = NO_COLUMNS,
    reading: Reading = AS_THEY_COME,
    test: Path | None = None,
    private: bool = True,
) -> Review:
    """Reads every row of `path` and looks at every conversation.

    `test` are held-out rows, whose prompts should not stand in `path` too. `private` also looks for secrets and personal
    data. RecipeError where `format_name` or `columns` cannot be; what is wrong with rows is in the answer.
    """
    settings: dict[str, Any] = {"format_name": format_name, "columns": columns, "reading": reading}
    read = read_or_fault(path, **settings)
    held_out = read_or_fault(test, **settings) if test else ReadRows(path, (), None, 0, ())
    digests = prompt_digests(held_out.conversations)
    warned = warnings_of(read.conversations, held_out=digests, private=private)
    faults = (*read.faults, *held_out.faults)
    return _summary(replace(read, faults=faults), (*_errors(faults), *_warnings(warned)))


def read_or_fault(path: Path, **settings: Any) -> ReadRows:
    """As `read_conversations`, with the one fault of a file that cannot be opened beside the others."""
    try:
        return read_conversations(path, **settings)
    except DataError as error:
        return ReadRows(path, (), None, 0, (error,))


def _summary(read: ReadRows, findings: Sequence[Finding]) -> Review:
    lengths, scripts, answered = [], Counter[str](), 0
    for conversation in read.conversations:
        lengths.append(sum(len(message.content) for message in conversation.messages))
        answered += sum(len(m.content) for m in conversation.messages if m.role == "assistant" and m.trained)
        scripts.update(_scripts_of(conversation))
    ordered = sorted(lengths)
    longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
    detected = read.detected
    shape = format_named(detected.name) if detected else None
    return Review(
        path=str(read.path),
        shape=shape.title if shape else "of no known shape",
        confidence=detected.confidence if detected else 0.0,
        ignored=detected.ignored if detected else (),
        num_rows=read.num_rows,
        num_conversations=len(read.conversations),
        num_turns=sum(len(conversation.messages) for conversation in read.conversations),
        num_characters=sum(lengths),
        share_answered=answered / max(1, sum(lengths)),
        middle=ordered[len(ordered) // 2] if ordered else 0,
        longest=ordered[-1] if ordered else 0,
        longest_place="" if longest is None else str(read.conversations[longest].place),
        scripts=dict(scripts.most_common()),
        findings=tuple(findings),
        not_checked=(NEEDS_TOKENS,),
        trained=shape is None or shape.trained,
        usable=read.is_usable,
        faults=read.faults,
    )


def _scripts_of(conversation: Conversation) -> Iterator[str]:
    """The scripts that a conversation has letters of."""
    texts = [message.content for message in conversation.messages]
    wide = [text for text in texts if not text.isascii()]
    for name, letters in SCRIPTS:
        if any(letters.search(text) for text in (texts if name == "Latin" else wide)):
            yield name


def _errors(faults: Iterable[DataError]) -> Iterator[Finding]:
    yield from _grouped(((one.code, one.where or "", one.message, one.help) for one in faults), "error")


def _warnings(warned: Iterable[Warned]) -> Iterator[Finding]:
    found = ((one.code, str(one.place or "all rows"), one.message, one.help) for one in warned)
    yield from _grouped(found, "warning")


def _grouped(found: Iterable[tuple[str, str, str, str | None]], level: Level) -> Iterator[Finding]:
    groups: dict[str, list[tuple[str, str, str | None]]] = {}
    counts = Counter[str]()
    for code, where, message, cure in found:
        counts[code] += 1
        if counts[code] <= SHOWN_PLACES:
            groups.setdefault(code, []).append((where, message, cure))
    for code in sorted(groups):
        cures = tuple(dict.fromkeys(cure for _, _, cure in groups[code] if cure))
        places = tuple((where, message) for where, message, _ in groups[code])
        yield Finding(code, level, CODES[code], counts[code], places, cures)
