"""Rows looked at before anything is trained: every fault and every warning, grouped by code, and the rows in one screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from myna.data.check import named
from myna.data.conversation import Conversation, Place
from myna.data.detect import NO_COLUMNS, Detected
from myna.data.findings import Finding
from myna.data.formats import format_named
from myna.data.repeats import Digests
from myna.data.row_checks import RowChecks
from myna.data.shapes import AS_THEY_COME, Reading
from myna.data.spans import check_spans
from myna.data.stream import AnySink, Streamed, stream_rows
from myna.errors import DataError

if TYPE_CHECKING:
    from myna.data.token_checks import TokenCounts, TokenSettings

OF_TRAINING = ("D040", "D042")


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

    Large files of JSON lines are read by a process a core, where no tokens are counted, with the same answer.

    `test` are held-out rows, whose prompts should not stand in `path` too. `private` also looks for secrets and personal
    data, `near` for near duplicates. With `tokens` they are counted (4 bytes more of each; a text says why they are not).
    `keep_faults` gives every single fault too. RecipeError where `format_name` or `columns` cannot be; what is wrong with
    rows is in the answer.
    """
    settings: dict[str, Any] = {"format_name": format_name, "columns": columns, "reading": reading}
    held_out = _stream_or_fault(test, _HeldOut, **settings).sink if test else _HeldOut()

    def make() -> RowChecks:
        return RowChecks(held_out.digests, private=private, near=near, tokens=tokens, keep_faults=keep_faults)

    read = None
    if tokens is None or isinstance(tokens, str):
        read = check_spans(path, make, private=private, keep_faults=keep_faults, **settings)
    if read is None:
        read = _stream_or_fault(path, make, **settings)
    checks = read.sink
    checks.finish(lambda wanted: _places(path, read, wanted, reading))
    for fault in held_out.faults:
        checks.refuse(fault)
    return _review(checks, path, read.detected, read.num_rows, read.notes)


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


def _review(
    checks: RowChecks, path: Path, detected: Detected | None, num_rows: int, notes: tuple[str, ...]
) -> Review:
    """What was found, where the rows were read in the shape `detected`."""
    shape = format_named(detected.name) if detected else None
    num_conversations = len(checks.lengths) if detected else 0
    return Review(
        path=str(path),
        shape=shape.title if shape else "of no known shape",
        confidence=detected.confidence if detected else 0.0,
        ignored=detected.ignored if detected else (),
        num_rows=num_rows,
        num_conversations=num_conversations,
        num_turns=checks.num_turns,
        num_characters=checks.num_characters,
        share_answered=checks.answered / max(1, checks.num_characters),
        middle=checks.middle(),
        longest=checks.most,
        longest_place=str(checks.longest.place) if checks.longest else "",
        scripts=dict(checks.scripts.most_common()),
        findings=tuple(checks.findings),
        not_checked=(*checks.warnings.not_checked, *checks.not_checked),
        tokens=checks.token_counts,
        trained=shape is None or shape.trained,
        usable=num_conversations > 0 and not checks.ended,
        faults=tuple(checks.faults or ()),
        notes=notes,
    )


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
