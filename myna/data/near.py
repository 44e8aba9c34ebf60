"""Conversations that are nearly the same: MinHash over runs of three words, by the library rensa.

Broder, On the resemblance and containment of documents (1997): the share of equal minima estimates the share of runs that
two texts have in common, with 128 of them to 0.03 (standard error at 0.85). Candidates come out of 16 bands of 8 minima
each, which leave out 1 % of those with 85 % in common. Words that all rows begin with, an instruction above each question,
are not compared: they would make rows alike that are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from myna.data.check import SHOWN_PLACES
from myna.data.conversation import Conversation

NUM_MINIMA, NUM_BANDS, SEED = 128, 16, 42
ALIKE = 0.85  # the part of their runs of words that two rows have in common
RUN = 3  # words
FEWEST_WORDS = 8  # of shorter rows three words of each are too many to tell by
AT_ONCE = 1000
MOST_ROWS = 1_000_000  # about 1 kB of memory each


class NearDuplicates:
    """Looks at conversations one after another; each is compared with the first of its like."""

    def __init__(self) -> None:
        import rensa

        self._minhash, self._index = rensa.RMinHash, rensa.RMinHashLSH(0.5, NUM_MINIMA, NUM_BANDS)
        self._kept: dict[int, tuple[Any, int]] = {}  # by number: the minima and the text's hash
        self._waiting: list[tuple[int, list[str], int]] = []
        self._num_common: int | None = None
        self._number = 0
        self.count = 0
        self.first: list[tuple[int, int]] = []  # the first ones, each with the one that it is like

    @property
    def is_whole(self) -> bool:
        """Whether all rows were looked at."""
        return self._number <= MOST_ROWS

    def look(self, conversation: Conversation) -> None:
        if self._number < MOST_ROWS:
            text = "\n".join([m.content for m in conversation.messages if m.role != "system"])
            self._waiting.append((self._number, text.split(), hash(text)))
            if len(self._waiting) == AT_ONCE:
                self._compare()
        self._number += 1

    def finish(self) -> None:
        self._compare()

    def _compare(self) -> None:
        if self._num_common is None:
            self._num_common = _num_common_words([words for _, words, _ in self._waiting])
        rows = [(n, words[self._num_common :], text) for n, words, text in self._waiting]
        rows = [row for row in rows if len(row[1]) >= FEWEST_WORDS]
        self._waiting.clear()
        minima = self._minhash.from_token_sets([_runs(words) for _, words, _ in rows], NUM_MINIMA, SEED)
        for (number, _, text), found in zip(rows, minima, strict=True):
            like = min((key for key in self._index.query(found) if self._is_like(found, key)), default=None)
            if like is None:
                self._index.insert(number, found)
                self._kept[number] = (found, text)
            elif self._kept[like][1] != text:  # what is the same to the letter is told of by itself
                self.count += 1
                if len(self.first) < SHOWN_PLACES:
                    self.first.append((number, like))

    def _is_like(self, minima: Any, key: int) -> bool:
        return bool(minima.jaccard(self._kept[key][0]) >= ALIKE)


def _runs(words: Sequence[str]) -> list[str]:
    return [" ".join(words[n : n + RUN]) for n in range(len(words) - RUN + 1)]


def _num_common_words(rows: Sequence[list[str]]) -> int:
    """How many words all of several rows begin with."""
    if len(rows) < 2:
        return 0
    both = zip(min(rows), max(rows), strict=False)  # between these two lie all the others
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
