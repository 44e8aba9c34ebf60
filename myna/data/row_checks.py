"""All that is looked for in the conversations of rows, and what is counted of them; of each a few bytes are held."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from myna.data.conversation import Conversation, Place
from myna.data.findings import Findings
from myna.data.repeats import Digests
from myna.data.warned import Warnings
from myna.errors import DataError

if TYPE_CHECKING:
    from myna.data.token_checks import TokenChecks, TokenCounts, TokenSettings

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


class RowChecks:
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
        self.faults: list[DataError] | None = [] if keep_faults else None
        self.ended = False
        self.findings = Findings()
        self.warnings = Warnings(self.findings, held_out=held_out, private=private, near=near)
        self.not_checked = [tokens] if isinstance(tokens, str) else []
        self._tokens = (
            None if tokens is None or isinstance(tokens, str) else _token_checks(tokens, self.findings)
        )
        self.token_counts: TokenCounts | None = None
        self.lengths = array("I")
        self.longest: Conversation | None = None
        self.num_turns = self.answered = self.num_characters = self.most = 0
        self.scripts = Counter[str]()

    def take(self, conversation: Conversation) -> None:
        messages = conversation.messages
        text = "\n".join([one.text if one.calls else one.content for one in messages])
        length = len(text) - len(messages) + 1
        self.lengths.append(min(length, LONGEST))
        self.num_characters += length
        self.num_turns += len(messages)
        for one in messages:
            if one.role == "assistant" and one.trained:
                self.answered += len(one.text if one.calls else one.content)
        if length > self.most:
            self.most, self.longest = length, conversation
        scripts = scripts_of(text)
        for script in scripts:
            self.scripts[script] += 1
        self.warnings.look(conversation, text, scripts)
        if self._tokens is not None:
            self._tokens.look(conversation)

    def refuse(self, fault: DataError) -> None:
        if self.faults is not None:
            self.faults.append(fault)
        self.ended = self.ended or fault.ends_reading
        self.findings.refuse(fault)

    def join(self, later: RowChecks) -> None:
        """Adds what was found in rows behind these."""
        if self.faults is not None:
            self.faults += later.faults or ()
        self.ended = self.ended or later.ended
        self.findings.join(later.findings)
        self.warnings.join(later.warnings)
        self.lengths += later.lengths
        if later.most > self.most:
            self.most, self.longest = later.most, later.longest
        self.num_turns += later.num_turns
        self.answered += later.answered
        self.num_characters += later.num_characters
        self.scripts.update(later.scripts)

    def finish(self, places: Callable[[Sequence[int]], Mapping[int, Place | None]]) -> None:
        if self._tokens is not None:
            self.token_counts = self._tokens.finish()
        digests = self.warnings.digests
        if digests.has_parts:
            self.warnings.finish(places)
        else:
            self.warnings.finish(lambda wanted: {index: digests.place(index) for index in wanted})

    def middle(self) -> int:
        """The length that half the conversations do not reach."""
        if not self.lengths:
            return 0
        import numpy as np

        half = len(self.lengths) // 2
        return int(np.partition(np.frombuffer(self.lengths, np.uint32), half)[half])


def _token_checks(settings: TokenSettings, findings: Findings) -> TokenChecks:
    from myna.data.token_checks import TokenChecks

    return TokenChecks(settings, findings)


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
