"""Rows counted in tokens before anything is trained: how long, how much is learnt, which are cut or teach nothing."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from myna.data.check import fault
from myna.data.conversation import Conversation
from myna.data.findings import Findings
from myna.data.frames import Frames
from myna.data.render import ChatTokenizer, load_chat_tokenizer
from myna.data.render_many import AT_ONCE, Rendered, render_many
from myna.errors import DataError, ModelError
from myna.settings import DataSettings

ALLOWED_CUT = 0.01  # the part of the rows that may be cut without being asked for
FIRST_BAR = 32  # tokens; each bar reaches twice as far as the one before
BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class TokenSettings:
    """Whose tokens are counted, and what of a recipe decides about them."""

    base: str
    tokenizer_dir: Path
    max_length: int
    data: DataSettings


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of the rows as they are trained; `histogram` has (at most so many tokens, rows)."""

    base: str
    max_length: int
    total: int
    learnt: int
    middle: int
    longest: int
    longest_place: str
    num_cut: int
    num_masked: int
    histogram: tuple[tuple[int, int], ...]

    def as_json(self) -> Mapping[str, Any]:
        return asdict(self)

    def as_lines(self) -> Iterator[tuple[str, str]]:
        share = self.learnt / max(1, self.total)
        yield "tokens", f"{self.total:,} as {self.base} has them, {share:.0%} of them learnt"
        yield (
            "row",
            f"{self.middle:,} tokens in the middle, {self.longest:,} at most ({self.longest_place}); "
            f"data.max_length is {self.max_length:,}: {self.num_cut:,} cut, {self.num_masked:,} wholly masked",
        )
        most = max((count for _, count in self.histogram), default=0)
        bars = (f"≤{upper:,} {_bar(count, most)} {count:,}" for upper, count in self.histogram)
        if most:
            yield "histogram", "  ".join(bars)


class TokenChecks:
    """Looks at conversations one after another; 4 bytes of each are held."""

    def __init__(self, settings: TokenSettings, findings: Findings) -> None:
        self._settings, self._findings = settings, findings
        self._tokenizer: ChatTokenizer = load_chat_tokenizer(settings.tokenizer_dir)
        self._frames = Frames(self._tokenizer)
        self._waiting: list[Conversation] = []
        self._lengths = array("I")
        self._longest = ""
        self._total = self._learnt = self._most = self._num_cut = self._num_masked = 0
        self._refused = False

    def look(self, conversation: Conversation) -> None:
        if self._settings.data.train_on == "last":
            conversation = conversation.last_turn_trained()
        self._waiting.append(conversation.with_system(self._settings.data.system))
        if len(self._waiting) == AT_ONCE:
            self._count()

    def finish(self) -> TokenCounts:
        self._count()
        settings, num_rows = self._settings, len(self._lengths)
        if self._num_cut > ALLOWED_CUT * num_rows and not settings.data.cut_long:
            message = f"{self._num_cut:,} of {num_rows:,} rows are longer than {settings.max_length:,} tokens"
            cure = f"--set data.max_length={self._most} keeps them whole; --set data.cut_long=true cuts them"
            self._findings.refuse(fault("D040", message, where=self._longest, help=cure))
        lengths = np.frombuffer(self._lengths, np.uint32) if num_rows else np.zeros(0, np.uint32)
        return TokenCounts(
            base=settings.base,
            max_length=settings.max_length,
            total=self._total,
            learnt=self._learnt,
            middle=int(np.partition(lengths, num_rows // 2)[num_rows // 2]) if num_rows else 0,
            longest=self._most,
            longest_place=self._longest,
            num_cut=self._num_cut,
            num_masked=self._num_masked,
            histogram=tuple(_histogram(lengths)),
        )

    def _count(self) -> None:
        batch, self._waiting = self._waiting, []
        try:
            for row in self._rendered(batch):
                self._add(row)
        except (ModelError, DataError):
            for conversation in batch:
                self._add_alone(conversation)

    def _add_alone(self, conversation: Conversation) -> None:
        """One of a batch in which the template refuses a row."""
        try:
            rows = self._rendered([conversation])
        except (ModelError, DataError) as error:
            where = conversation.place or "rows"
            self._findings.refuse(fault("D042", error.message, where=where, help=error.help or OTHER_BASE))
        else:
            for row in rows:
                self._add(row)

    def _rendered(self, batch: list[Conversation]) -> list[Rendered]:
        return list(render_many(batch, self._tokenizer, self._settings.max_length, self._frames))

    def _add(self, row: Rendered) -> None:
        length = len(row.input_ids_T) + row.num_cut
        self._lengths.append(length)
        self._total += len(row.input_ids_T)
        self._learnt += row.num_targets
        if length > self._most:
            self._most, self._longest = length, str(row.place)
        if row.num_cut:
            self._num_cut += 1
            message = f"{length:,} tokens, of which {row.num_cut:,} are cut from its end"
            self._findings.warn("D040", row.place, message, LONGER)
        if not row.num_targets:
            self._num_masked += 1
            message = "no token of it is learnt: what is left of it is prompt, or every answer has weight 0"
            self._findings.warn("D041", row.place, message, "it is left out of training: shorten its prompt")


LONGER = "a larger data.max_length keeps it whole, as far as the base reads"
OTHER_BASE = "change the row, or take a base whose template takes it"


def _histogram(lengths: np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    """Rows by length, from the shortest bar that has any to the longest."""
    upper, below, bars = FIRST_BAR, 0, []
    while below < len(lengths):
        upto = int(np.count_nonzero(lengths <= upper))
        bars.append((upper, upto - below))
        upper, below = 2 * upper, upto
    first = next((n for n, (_, count) in enumerate(bars) if count), 0)
    yield from bars[first:]


def _bar(count: int, most: int) -> str:
    """A character as high as its share of the most; what is there at all is seen."""
    return BARS[max(1, round(count / most * (len(BARS) - 1)))] if count else BARS[0]
