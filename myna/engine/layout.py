"""Where the documents of a pack lie, as attention needs it; made once a pack, used by every layer.

Shapes: T tokens of the pack · G documents of a group · L its longest · S segments.

For plain torch, documents of like length become one padded [G, L] block, answered by one causal call. The padding is at the
end of each document, where a causal query never looks, so no mask is needed and nothing leaks. A document that shares its
beginning with others is gathered whole; of the answers to a shared token, all equal, the first is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from myna.data.packing import Batch

MAX_PADDING = 1.25  # a group's padded size over its own tokens: the point where a second call is cheaper
DEEPEST_TREE = 4096  # DEEPEST in native_attention.h; every level of a tree is one more row of the pack
QUERY_TILE = 32  # tokens of a segment that the C kernels take at a time: TILE in native_attention.h
KEY_CHUNK = 64  # CHUNK there: as many of a segment's keys lie together, as columns


@dataclass(frozen=True)
class DocumentGroup:
    """`gather_F` (flat, F = G·L) indexes the pack's tokens, T standing for padding; `keep_N` indexes F."""

    gather_F: torch.Tensor
    keep_N: torch.Tensor
    num_documents: int


@dataclass(frozen=True, eq=False)
class PackLayout:
    """Where a pack's tokens lie, in the form that plain torch asks for and in the one that the C kernels ask for."""

    batch: Batch
    device: torch.device

    @cached_property
    def groups(self) -> tuple[DocumentGroup, ...]:
        """Documents grouped by length."""
        return self._grouped[0]

    @cached_property
    def restore_T(self) -> torch.Tensor:
        """For each token of the pack, where the concatenated groups hold it."""
        return self._grouped[1]

    @cached_property
    def _grouped(self) -> tuple[tuple[DocumentGroup, ...], torch.Tensor]:
        batch = self.batch
        num_tokens = len(batch.input_ids_T)
        seen_T = torch.zeros(num_tokens + 1, dtype=torch.bool)
        seen_T[num_tokens] = True
        groups, token_order = [], []
        for members in group_by_length(batch.lengths):
            longest = max(batch.lengths[m] for m in members)
            gather_GL = torch.full((len(members), longest), num_tokens)
            keep_GL = torch.zeros((len(members), longest), dtype=torch.bool)
            for row, member in enumerate(members):
                tokens = batch.tokens_of(member)
                gather_GL[row, : len(tokens)] = tokens
                keep_GL[row, : len(tokens)] = ~seen_T[tokens]
                seen_T[tokens] = True
            flat = gather_GL.flatten()
            keep_N = keep_GL.flatten().nonzero()[:, 0]
            token_order.append(flat[keep_N])
            groups.append(DocumentGroup(flat.to(self.device), keep_N.to(self.device), len(members)))
        return tuple(groups), torch.argsort(torch.cat(token_order)).to(self.device)

    @cached_property
    def tree(self) -> SegmentTree:
        """The segments and their order as arrays of int64."""
        segments = self.batch.segments
        position: list[int] = []
        above: list[list[int]] = []
        for segment in segments:
            parent = segment.parent
            position.append(position[parent] + segments[parent].length if parent >= 0 else 0)
            above.append([*above[parent], parent] if parent >= 0 else [])
        assert max(map(len, above)) < DEEPEST_TREE
        below: list[list[int]] = [[] for _ in segments]
        for number, chain in enumerate(above):
            for ancestor in chain:
                below[ancestor].append(number)
        starts, places = [0], [0]
        for segment in segments:
            places.append(places[-1] - -segment.length // KEY_CHUNK * KEY_CHUNK)
        for members in below:
            starts.append(starts[-1] + len(members))
        blocks = [
            (number, segment.start + first, min(QUERY_TILE, segment.length - first))
            for number, segment in enumerate(segments)
            for first in range(0, segment.length, QUERY_TILE)
        ]
        return SegmentTree(
            segments=torch.tensor(
                [(s.start, s.length, p, s.parent) for s, p in zip(segments, position, strict=True)]
            ),
            blocks=torch.tensor(blocks),
            below=torch.tensor([member for members in below for member in members] or [0]),
            below_at=torch.tensor(starts),
            places=torch.tensor(places[:-1]),
            num_places=places[-1],
            roots=torch.tensor([number for number, s in enumerate(segments) if s.parent < 0]),
        )


@dataclass(frozen=True)
class SegmentTree:
    """`segments` [S, 4]: start, length, position of the first token, parent. `blocks` [B, 3]: segment, first token, tokens.

    `below[below_at[s] : below_at[s + 1]]` are the descendants of segment s, `roots` the segments without a parent. As
    columns the keys of s lie from `places[s]` on, `num_places` in all.
    """

    segments: torch.Tensor
    blocks: torch.Tensor
    below: torch.Tensor
    below_at: torch.Tensor
    places: torch.Tensor
    num_places: int
    roots: torch.Tensor


def plan_layout(batch: Batch, device: torch.device | str = "cpu") -> PackLayout:
    return PackLayout(batch, torch.device(device))


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Members of each group, the longest first."""
    groups: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens += lengths[index]
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= MAX_PADDING * tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
            tokens = lengths[index]
    return groups
