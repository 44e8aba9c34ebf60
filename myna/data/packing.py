"""Examples → batches: which rows make a step, which lie side by side in a pack, and the first tensors.

Shapes: T tokens of a pack · N target tokens of a pack.

    rows            a b c d e     a b f g     h i
    segments        [a b] [c d e] [f g] [h i]             a shared beginning lies in the pack once
    documents       (0, 1) (0, 2) (3,)                    each row as its segments
    position_ids_T   0 1   2 3 4   2 3   0 1              positions go on where the parent ends
    targets_N       the labels moved one to the left inside each document; target_index_N says where

A pack without shared beginnings has one segment a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from myna.data.epochs import Order, Part, epoch_rows
from myna.data.render import IGNORE, Example

Pack = tuple[int, ...]
Step = tuple[Pack, ...]

MIN_SHARED = 4  # tokens; a shorter common beginning saves less than another segment costs
MOST_NESTED = 256  # beginnings of beginnings; rows that have still more in common repeat it


@dataclass(frozen=True)
class Segment:
    """Tokens [start, start + length) of a pack, standing after those of segment `parent` (-1: at a row's beginning)."""

    start: int
    length: int
    parent: int = -1


@dataclass(frozen=True)
class Batch:
    """One pack as tensors. `hidden_T[target_index_N]` predicts `targets_N`. A parent stands before its children."""

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    target_index_N: torch.Tensor
    targets_N: torch.Tensor
    segments: tuple[Segment, ...]
    documents: tuple[tuple[int, ...], ...]
    draw: tuple[int, ...] | None = None  # what its dropout masks are drawn from; None: nothing is dropped

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row, shared ones counted in each."""
        return tuple(sum(self.segments[s].length for s in path) for path in self.documents)

    def tokens_of(self, document: int) -> torch.Tensor:
        """Where the tokens of a row stand in the pack, in the row's order."""
        path = (self.segments[s] for s in self.documents[document])
        return torch.cat([torch.arange(s.start, s.start + s.length) for s in path])


def num_steps_an_epoch(num_rows: int, batch_size: int) -> int:
    return -(-num_rows // batch_size)


def plan_packs(
    lengths: Sequence[int],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    pack_tokens: int,
    parts: Sequence[Part] = (),
    order: Order = "shuffled",
) -> list[Step]:
    """The steps of one epoch: rows in an order drawn from (seed, epoch), `batch_size` a step, cut into packs.

    A pure function: the same arguments give the same plan, so a position in the data is (epoch, step). `parts` are the
    files that the rows are of, where they are several; `order` is another than a shuffled one.
    A pack holds at most `pack_tokens` tokens, or one row that alone is longer.
    """
    every = epoch_rows(lengths, parts or (Part(len(lengths)),), seed=seed, epoch=epoch, order=order)
    steps = []
    for start in range(0, len(every), batch_size):
        rows = [int(row) for row in every[start : start + batch_size]]
        steps.append(_fill_packs(rows, lengths, pack_tokens))
    return steps


def _fill_packs(rows: Sequence[int], lengths: Sequence[int], pack_tokens: int) -> Step:
    """First-fit decreasing; rows of like length come to lie together, which attention likes."""
    packs: list[list[int]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda r: (-lengths[r], r)):
        for index, free in enumerate(room):
            if lengths[row] <= free:
                packs[index].append(row)
                room[index] -= lengths[row]
                break
        else:
            packs.append([row])
            room.append(pack_tokens - lengths[row])
    return tuple(tuple(pack) for pack in packs)


def collate(
    examples: Sequence[Example], *, share: bool = False, draw: tuple[int, ...] | None = None
) -> Batch:
    """Lays examples side by side in one row of tokens; with `share`, beginnings that several have in common once.

    With dropout each row draws for itself, so a pack has a `draw` or shares, not both.
    """
    assert draw is None or not share
    ids = [np.asarray(example.input_ids_T) for example in examples]
    segments, documents = _tree(ids) if share else _flat(ids)
    place = [np.concatenate([_span(segments[s]) for s in path]) for path in documents]
    num_tokens = segments[-1].start + segments[-1].length
    input_ids, positions = np.empty(num_tokens, np.int64), np.empty(num_tokens, np.int64)
    index, targets = [], []
    for example, tokens in zip(examples, place, strict=True):
        input_ids[tokens] = example.input_ids_T
        positions[tokens] = np.arange(len(tokens))
        labels = example.labels_T[1:]
        trained = labels != IGNORE
        index.append(tokens[:-1][trained])
        targets.append(labels[trained])
    return Batch(
        input_ids_T=torch.from_numpy(input_ids),
        position_ids_T=torch.from_numpy(positions),
        target_index_N=torch.from_numpy(np.concatenate(index)),
        targets_N=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        segments=tuple(segments),
        documents=tuple(documents),
        draw=draw,
    )


def _span(segment: Segment) -> np.ndarray:
    return np.arange(segment.start, segment.start + segment.length)


def _flat(ids: Sequence[np.ndarray]) -> tuple[list[Segment], list[tuple[int, ...]]]:
    starts = np.cumsum([0, *(len(row) for row in ids[:-1])])
    segments = [Segment(int(start), len(row)) for start, row in zip(starts, ids, strict=True)]
    return segments, [(number,) for number in range(len(ids))]


def _tree(ids: Sequence[np.ndarray]) -> tuple[list[Segment], list[tuple[int, ...]]]:
    """The rows as a tree of their common beginnings (a radix tree): segments parents first, and each row's path.

    A row's last token always stands in a segment of its own or of rows equal to it, never inside a longer one's.
    """
    order = sorted(range(len(ids)), key=lambda row: ids[row].tolist())
    common = [_common(ids[a], ids[b]) for a, b in itertools.pairwise(order)]
    segments: list[Segment] = []
    paths: dict[int, tuple[int, ...]] = {}

    def lay(first: int, last: int, depth: int, path: tuple[int, ...]) -> None:
        """Lays the rows order[first:last], which have their first `depth` tokens, those of `path`, in common."""
        start = first
        while start < last:
            end = start + 1
            while end < last and len(path) < MOST_NESTED and common[end - 1] >= depth + MIN_SHARED:
                end += 1
            shared = min((common[k] for k in range(start, end - 1)), default=len(ids[order[start]]))
            number = len(segments)
            begins = segments[-1].start + segments[-1].length if segments else 0
            segments.append(Segment(begins, shared - depth, path[-1] if path else -1))
            below = (*path, number)
            ends_here = [k for k in range(start, end) if len(ids[order[k]]) == shared]
            for k in ends_here:  # sorted: they come first
                paths[order[k]] = below
            if start + len(ends_here) < end:
                lay(start + len(ends_here), end, shared, below)
            start = end

    lay(0, len(order), 0, ())
    return segments, [paths[row] for row in range(len(ids))]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two rows begin with alike."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
