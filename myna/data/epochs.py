"""Which rows an epoch has, and in which order: pure functions of the seed and the epoch's number.

    files, each with its weight ─► rows of epoch e ─► shuffled · by length · as in the files ─► steps of batch_size rows

A file of weight 2 has every row twice an epoch. One of weight 0.5 has half of its rows in the first epoch and the other half
in the second: its rows are dealt in an order drawn once from the seed, on and on from where the last epoch ended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Order = Literal["shuffled", "length", "file"]


@dataclass(frozen=True)
class Part:
    """The rows of one file among those of all: how many, and how often each is seen an epoch."""

    num_rows: int
    weight: float = 1.0

    @property
    def rows_an_epoch(self) -> int:
        return self._whole * self.num_rows + self._dealt

    @property
    def _whole(self) -> int:
        return int(self.weight)

    @property
    def _dealt(self) -> int:
        """How many rows an epoch has besides the whole file; of a small file with a small weight one at least."""
        rest = round((self.weight - self._whole) * self.num_rows)
        return max(rest, 1) if not self._whole and self.num_rows else rest

    def rows(self, *, seed: int, epoch: int, number: int) -> np.ndarray:
        """The rows of an epoch in the file's order; `number` is the file's among all."""
        whole = np.repeat(np.arange(self.num_rows), self._whole)
        if not self._dealt:
            return whole
        deck = np.random.default_rng([seed, number, 0]).permutation(self.num_rows)
        dealt = deck[(epoch * self._dealt + np.arange(self._dealt)) % self.num_rows]
        return np.sort(np.concatenate([whole, dealt]), kind="stable")


def rows_an_epoch(parts: Sequence[Part]) -> int:
    return sum(part.rows_an_epoch for part in parts)


def epoch_rows(
    lengths: Sequence[int], parts: Sequence[Part], *, seed: int, epoch: int, order: Order = "shuffled"
) -> np.ndarray:
    """The rows of an epoch, in the order in which they are trained on; `lengths` are of all files, one after another."""
    assert sum(part.num_rows for part in parts) == len(lengths)
    rows, first = [np.empty(0, np.int64)], 0
    for number, part in enumerate(parts):
        rows.append(first + part.rows(seed=seed, epoch=epoch, number=number))
        first += part.num_rows
    found = np.concatenate(rows)
    if order == "shuffled":
        return found[np.random.default_rng([seed, epoch]).permutation(len(found))]
    if order == "length":
        return found[np.argsort(np.asarray(lengths, np.int64)[found], kind="stable")]
    return found


def lengths_at_most(lengths: Sequence[int], parts: Sequence[Part]) -> list[int]:
    """Each row's length as often as one epoch may have the row."""
    found: list[int] = []
    first = 0
    for part in parts:
        times = max(1, math.ceil(part.weight))
        found += np.repeat(np.asarray(lengths[first : first + part.num_rows], np.int64), times).tolist()
        first += part.num_rows
    return found
