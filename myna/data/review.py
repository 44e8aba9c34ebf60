"""Rows looked at before anything is trained: every fault and every warning, grouped by code, and the rows in one screen."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from myna.data.check import named
from myna.data.conversation import Conversation, Place
from myna.data.detect import NO_COLUMNS, Detected
from myna.data.findings import Finding, Findings
from myna.data.formats import format_named
from myna.data.repeats import Digests
from myna.data.shapes import AS_THEY_COME, Reading
from myna.data.stream import AnySink, Streamed, stream_rows
from myna.data.warned import Warnings
from myna.errors import DataError

if TYPE_CHECKING:
    from myna.data.token_checks import TokenChecks, TokenCounts, TokenSettings

OF_TRAINING = ("D040", "D042")
LONGEST = 2**32 - 1  # characters that are held of a length
LATIN = re.compile(r"[A-Za-zÀ-ɏ]")
ONLY_LATIN = ("Latin",)
NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
SCRIPTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("Latin", LATIN),
    ("Greek", re.compile(r"[\u0370-\u03ff]")),
    ("Cyrillic", re.compile(r"[\u0400-\u052f]")),
    ("Hebrew", re.compile(r"[\u0590-\u05ff]")),
    ("Arabic", re.compile(r"[\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufefc]")),
    ("Devanagari", re.compile(r"[\u0900-\u097f]")),
    ("Thai", re.compile(r"[\u0e00-\u0e7f]")),
    ("Hangul", re.compile(r"[\uac00-\ud7af\u1100-\u11ff]")),
    ("Kana", re.compile(r"[\u3040-\u30ff]")),
    ("Han", re.compile(r"[\u4e00-\u9fff\u3400-\u4dbf]")),
)


@dataclass(frozen=True)
class Review:
    """What was found in the rows of one path. Lengths are characters of a whole conversation.

    `faults` are the single errors where they were to be kept, `usable` is whether rows are left without them, `trained`
    whether this shape can be trained on.
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
    tokens: TokenCounts | None
    trained: bool
    usable: bool
    faults: tuple[DataError, ...]
    notes: tuple[str, ...]

    @property
    def num_unskippable(self) -> int:
        """Errors that no `on_bad_row` leaves out: training refuses the rows as a whole."""
        return sum(f.count for f in self.findings if f.level == "error" and f.code in OF_TRAINING)

    @property
    def num_errors(self) -> int:
        return sum(finding.count for finding in self.findings if finding.level == "error")

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints: all but the single faults, which the findings count."""
        told = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "faults"}
        findings = [asdict(one) for one in self.findings]
        tokens = self.tokens and self.tokens.as_json()
        return told | {"findings": findings, "tokens": tokens, "num_errors": self.num_errors}

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
        if self.tokens is not None:
            yield from self.tokens.as_lines()
        if self.scripts:
            yield "scripts", ", ".join(f"{name} {count:,}" for name, count in self.scripts.items())
        if self.ignored:
            yield "ignored keys", named(self.ignored)
        for one in self.notes:
            yield "noted", one
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
    near: bool = True,
    tokens: TokenSettings | str | None = None,
    keep_faults: bool = False,
) -> Review:
    """Reads every row of `path` and looks at every conversation; of the rows nothing is held but 28 bytes each.

    `test` are held-out rows, whose prompts should not stand in `path` too. `private` also looks for secrets and personal
    data, `near` for near duplicates. With `tokens` they are counted (4 bytes more of each; a text says why they are not).
    `keep_faults` gives every single fault too. RecipeError where `format_name` or `columns` cannot be; what is wrong with
    rows is in the answer.
    """
    settings: dict[str, Any] = {"format_name": format_name, "columns": columns, "reading": reading}
    held_out = _stream_or_fault(test, _HeldOut, **settings).sink if test else _HeldOut()
    read = _stream_or_fault(
        path,
        lambda: _Checks(held_out.digests, private=private, near=near, tokens=tokens, keep_faults=keep_faults),
        **settings,
    )
    checks = read.sink
    checks.finish(lambda wanted: _places(path, read, wanted, reading))
    for fault in held_out.faults:
        checks.refuse(fault)
    return checks.review(path, read.detected, read.num_rows, read.notes)


def _stream_or_fault(path: Path, make: Callable[[], AnySink], **settings: Any) -> Streamed[AnySink]:
    """As `stream_rows`, with the one fault of a file that cannot be opened beside the others."""
    try:
        return stream_rows(path, make, **settings)
    except DataError as error:
        sink = make()
        sink.refuse(error)
        return Streamed(sink, None, 0)


class _HeldOut:
    """Test rows: their digests and faults."""

    def __init__(self) -> None:
        self.digests, self.faults = Digests(), list[DataError]()
        self.refuse = self.faults.append

    def take(self, conversation: Conversation) -> None:
        self.digests.add(conversation)


class _Checks:
    """All that is looked for in rows, and what a summary of them says. A conversation costs 28 bytes."""

    def __init__(
        self,
        held_out: Digests,
        *,
        private: bool,
        near: bool,
        tokens: TokenSettings | str | None,
        keep_faults: bool,
    ) -> None:
        self._faults: list[DataError] | None = [] if keep_faults else None
        self._ended = False
        self._findings = Findings()
        self._warnings = Warnings(self._findings, held_out=held_out, private=private, near=near)
        self._not_checked = [tokens] if isinstance(tokens, str) else []
        self._tokens = (
            None if tokens is None or isinstance(tokens, str) else _token_checks(tokens, self._findings)
        )
        self._token_counts: TokenCounts | None = None
        self._lengths = array("I")
        self._longest: Conversation | None = None
        self._num_turns = self._answered = self._num_characters = self._most = 0
        self._scripts = Counter[str]()

    def take(self, conversation: Conversation) -> None:
        messages = conversation.messages
        text = "\n".join([one.text if one.calls else one.content for one in messages])
        length = len(text) - len(messages) + 1
        self._lengths.append(min(length, LONGEST))
        self._num_characters += length
        self._num_turns += len(messages)
        for one in messages:
            if one.role == "assistant" and one.trained:
                self._answered += len(one.text if one.calls else one.content)
        if length > self._most:
            self._most, self._longest = length, conversation
        scripts = scripts_of(text)
        for script in scripts:
            self._scripts[script] += 1
        self._warnings.look(conversation, text, scripts)
        if self._tokens is not None:
            self._tokens.look(conversation)

    def refuse(self, fault: DataError) -> None:
        if self._faults is not None:
            self._faults.append(fault)
        self._ended = self._ended or fault.ends_reading
        self._findings.refuse(fault)

    def finish(self, places: Callable[[Sequence[int]], Mapping[int, Place | None]]) -> None:
        if self._tokens is not None:
            self._token_counts = self._tokens.finish()
        digests = self._warnings.digests
        if digests.has_parts:
            self._warnings.finish(places)
        else:
            self._warnings.finish(lambda wanted: {index: digests.place(index) for index in wanted})

    def review(self, path: Path, detected: Detected | None, num_rows: int, notes: tuple[str, ...]) -> Review:
        """What was found, where the rows were read in the shape `detected`."""
        shape = format_named(detected.name) if detected else None
        num_conversations = len(self._lengths) if detected else 0
        return Review(
            path=str(path),
            shape=shape.title if shape else "of no known shape",
            confidence=detected.confidence if detected else 0.0,
            ignored=detected.ignored if detected else (),
            num_rows=num_rows,
            num_conversations=num_conversations,
            num_turns=self._num_turns,
            num_characters=self._num_characters,
            share_answered=self._answered / max(1, self._num_characters),
            middle=_middle(self._lengths),
            longest=self._most,
            longest_place=str(self._longest.place) if self._longest else "",
            scripts=dict(self._scripts.most_common()),
            findings=tuple(self._findings),
            not_checked=(*self._warnings.not_checked, *self._not_checked),
            tokens=self._token_counts,
            trained=shape is None or shape.trained,
            usable=num_conversations > 0 and not self._ended,
            faults=tuple(self._faults or ()),
            notes=notes,
        )


def _token_checks(settings: TokenSettings, findings: Findings) -> TokenChecks:
    from myna.data.token_checks import TokenChecks

    return TokenChecks(settings, findings)


class _Places:
    """The places of some conversations, by their number."""

    def __init__(self, wanted: Sequence[int]) -> None:
        self.found: dict[int, Place | None] = {}
        self._wanted, self._number = frozenset(wanted), 0

    def take(self, conversation: Conversation) -> None:
        if self._number in self._wanted:
            self.found[self._number] = conversation.place
        self._number += 1

    def refuse(self, fault: DataError) -> None:
        pass


def _places(
    path: Path, read: Streamed[Any], wanted: Sequence[int], reading: Reading
) -> Mapping[int, Place | None]:
    """Where conversations stand in their rows; the rows are read once more for it, and it is asked for a few alone."""
    assert read.detected
    again = stream_rows(
        path,
        lambda: _Places(wanted),
        format_name=read.detected.name,
        columns=read.detected.keys,
        reading=reading,
    )
    return again.sink.found


def _middle(lengths: array[int]) -> int:
    if not lengths:
        return 0
    import numpy as np

    half = len(lengths) // 2
    return int(np.partition(np.frombuffer(lengths, np.uint32), half)[half])


def scripts_of(text: str) -> tuple[str, ...]:
    """The scripts that a text has letters of."""
    if text.isascii():
        return ONLY_LATIN if LATIN.search(text) else ()
    others = "".join(set("".join(NOT_ASCII.findall(text))))  # few, however long the text is
    return tuple(
        name
        for name, letters in SCRIPTS
        if letters.search(others) or (letters is LATIN and LATIN.search(text))
    )
