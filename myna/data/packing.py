"""Examples → batches: which rows make a step, which lie side by side in a pack, and the first tensors.

Shapes: T tokens of a pack · D documents of a pack · N target tokens of a pack.

    documents      [a a a a] [b b] [c c c]
    input_ids_T     a a a a   b b   c c c        one row of tokens, no padding
    position_ids_T  0 1 2 3   0 1   0 1 2        positions restart
    starts_D        0         4     6            attention stays inside [start, start + length)
    targets_N       the labels moved one to the left inside each document; target_index_N says where
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from myna.data.render import IGNORE, Example

Pack = tuple[int, ...]
Step = tuple[Pack, ...]


@dataclass(frozen=True)
class Batch:
    """One pack as tensors. `hidden_T[target_index_N]` predicts `targets_N`."""

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    target_index_N: torch.Tensor
    targets_N: torch.Tensor
    starts: tuple[int, ...]
    lengths: tuple[int, ...]


def num_steps_an_epoch(num_rows: int, batch_size: int) -> int:
    return -(-num_rows // batch_size)


def plan_packs(
    lengths: Sequence[int], *, seed: int, epoch: int, batch_size: int, pack_tokens: int
) -> list[Step]:
    """The steps of one epoch: rows in an order drawn from (seed, epoch), `batch_size` a step, cut into packs.

    A pure function: the same arguments give the same plan, so a position in the data is (epoch, step).
    A pack holds at most `pack_tokens` tokens, or one row that alone is longer.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    steps = []
    for start in range(0, len(order), batch_size):
        rows = [int(row) for row in order[start : start + batch_size]]
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


def collate(examples: Sequence[Example]) -> Batch:
    """Lays examples side by side in one row of tokens."""
    lengths = tuple(len(example.input_ids_T) for example in examples)
    starts = tuple(int(s) for s in np.cumsum((0, *lengths[:-1])))
    next_labels = [np.append(example.labels_T[1:], IGNORE) for example in examples]
    labels_T = torch.from_numpy(np.concatenate(next_labels))
    target_index_N = (labels_T != IGNORE).nonzero()[:, 0]
    return Batch(
        input_ids_T=torch.from_numpy(np.concatenate([example.input_ids_T for example in examples])),
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        target_index_N=target_index_N,
        targets_N=labels_T[target_index_N],
        starts=starts,
        lengths=lengths,
    )
