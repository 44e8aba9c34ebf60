"""Conversations that are nearly the same: MinHash over runs of three words, by the library rensa.

Broder, On the resemblance and containment of documents (1997): the share of equal minima estimates the share of runs that
two texts have in common, with 128 of them to 0.03 (standard error at 0.85). Candidates come out of 16 bands of 8 minima
each, which leave out 1 % of those with 85 % in common. Words that all rows begin with, an instruction above each question,
are not compared: they would make rows alike that are not. For the same reason the end of the prompt and the beginning of the
answer have to be alike too: many questions may be asked of one text.

Where a hundred rows have most of their words in common and are not alike for all that (a long instruction under a number
of its own), further ones are compared with these alone: comparing each with each would take the square of their number.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from myna.data.check import SHOWN_PLACES
from myna.data.conversation import Conversation

NUM_MINIMA, NUM_BANDS, SEED = 128, 16, 42
ALIKE = 0.85  # the part of their runs of words that two rows have in common
RUN = 3  # words
FEWEST_WORDS = 8  # of shorter rows three words of each are too many to tell by
BORDER = 12  # words on either side of where the answer begins
BORDER_ALIKE = 0.6  # the part of these words, whatever their order
AT_ONCE = 1000
MOST_RELATED = 100  # rows with most words in common that later ones are compared with
MOST_ROWS = 300_000  # about 3 kB of memory each, most of it the index


class _Row:
    """A conversation: its number, the hash of its text, those of the words where its answer begins, its minima."""

    __slots__ = ("border", "minima", "number", "text")

    def __init__(self, number: int, text: int, border: array[int]) -> None:
        self.number, self.text, self.border = number, text, border
        self.minima: Any = None


@dataclass(frozen=True)
class NearFound:
    """How many rows are nearly another, and the first of them, each with the one that it is like.

    `num_crowded` rows are such that later ones were not compared with, `is_whole` is whether all rows were looked at.
    """

    count: int
    first: tuple[tuple[int, int], ...]
    num_crowded: int
    is_whole: bool


class NearDuplicates:
    """Looks at conversations one after another; each is compared with the first of its like."""

    def __init__(self) -> None:
        import rensa

        self._minhash, self._index = rensa.RMinHash, rensa.RMinHashLSH(0.5, NUM_MINIMA, NUM_BANDS)
        self._kept: dict[int, _Row] = {}
        self._waiting: list[tuple[_Row, list[str]]] = []
        self._num_common: int | None = None
        self._number = 0
        self.count = 0
        self.num_crowded = 0  # rows that later ones were not compared with
        self.first: list[tuple[int, int]] = []  # the first ones, each with the one that it is like

    def look(self, conversation: Conversation) -> None:
        if self._number < MOST_ROWS:
            turns = [m.text for m in conversation.messages if m.role != "system"]
            text = "\n".join(turns)
            asked = turns[-2].split()[-BORDER:] if len(turns) > 1 else []
            border = _hashes(asked + turns[-1].split()[:BORDER])
            self._waiting.append((_Row(self._number, hash(text), border), text.split()))
            if len(self._waiting) == AT_ONCE:
                self._compare()
        self._number += 1

    def found(self) -> NearFound:
        """What was found in all of them."""
        self._compare()
        return NearFound(self.count, tuple(self.first), self.num_crowded, self._number <= MOST_ROWS)

    def _compare(self) -> None:
        if self._num_common is None:
            self._num_common = _num_common_words([words for _, words in self._waiting])
        rows = [(row, words[self._num_common :]) for row, words in self._waiting]
        rows = [(row, words) for row, words in rows if len(words) >= FEWEST_WORDS]
        self._waiting.clear()
        minima = self._minhash.from_token_sets([_runs(words) for _, words in rows], NUM_MINIMA, SEED)
        for (row, _), found in zip(rows, minima, strict=True):
            related = self._index.query(found)
            alike = (key for key in related if self._is_like(row, found, self._kept[key]))
            like = min(alike, default=None)
            if like is None and len(related) >= MOST_RELATED:
                self.num_crowded += 1
            elif like is None:
                self._index.insert(row.number, found)
                row.minima = found
                self._kept[row.number] = row
            elif self._kept[like].text != row.text:  # what is the same to the letter is told of by itself
                self.count += 1
                if len(self.first) < SHOWN_PLACES:
                    self.first.append((row.number, like))

    def _is_like(self, row: _Row, minima: Any, other: _Row) -> bool:
        own, others = set(row.border), set(other.border)
        return len(own & others) >= BORDER_ALIKE * len(own | others) and minima.jaccard(other.minima) >= ALIKE


def _hashes(words: Sequence[str]) -> array[int]:
    """4 bytes of each word: a set of them would take ten times as much."""
    return array("I", (hash(word) & 0xFFFFFFFF for word in words))


def _runs(words: Sequence[str]) -> list[str]:
    return [" ".join(words[n : n + RUN]) for n in range(len(words) - RUN + 1)]


def _num_common_words(rows: Sequence[list[str]]) -> int:
    """How many words all of several rows begin with."""
    if len(rows) < 2:
        return 0
    both = zip(min(rows), max(rows), strict=False)  # between these two lie all the others
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
