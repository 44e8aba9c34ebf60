"""Attention for packs: causal, and inside each document only.

Shapes: T tokens of the pack · H query heads · K key/value heads · D head width · G documents of a group · L its longest.

Documents of like length are laid out as one padded [G, L] block and answered by one causal scaled-dot-product call.
The padding is at the end of each document, where a causal query never looks, so no mask is needed and nothing leaks.
It computes in float32: on a CPU the float32 kernel is the faster one, and the exact one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from myna.data.packing import Batch

ATTENTION_NAME = "myna_packed"
MAX_PADDING = 1.25  # a group's padded size over its own tokens: the point where a second call is cheaper


@dataclass(frozen=True)
class DocumentGroup:
    """`gather_F` (flat, F = G·L) indexes the pack's tokens, T standing for padding; `keep_N` indexes F."""

    gather_F: torch.Tensor
    keep_N: torch.Tensor
    num_documents: int
    longest: int


@dataclass(frozen=True)
class PackLayout:
    """The groups of a pack and, for each of its tokens, where the concatenated groups hold it."""

    groups: tuple[DocumentGroup, ...]
    restore_T: torch.Tensor


def plan_layout(batch: Batch, device: torch.device | str = "cpu") -> PackLayout:
    """Groups a pack's documents by length; made once a pack, used by every layer."""
    num_tokens = sum(batch.lengths)
    groups, token_order = [], []
    for members in _group_by_length(batch.lengths):
        longest = max(batch.lengths[m] for m in members)
        gather_GL = torch.full((len(members), longest), num_tokens)
        for row, member in enumerate(members):
            start, length = batch.starts[member], batch.lengths[member]
            gather_GL[row, :length] = torch.arange(start, start + length)
        flat = gather_GL.flatten()
        keep_N = (flat < num_tokens).nonzero()[:, 0]
        token_order.append(flat[keep_N])
        groups.append(DocumentGroup(flat.to(device), keep_N.to(device), len(members), longest))
    return PackLayout(tuple(groups), torch.argsort(torch.cat(token_order)).to(device))


def _group_by_length(lengths: Sequence[int]) -> list[list[int]]:
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


def packed_attention(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    pack_layout: PackLayout | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over a pack; returns [1, T, H, D] and no weights."""
    assert pack_layout is not None and attention_mask is None
    assert dropout == 0.0, "models with attention dropout take the reference path"
    query_THD, key_TKD, value_TKD = (_with_padding(x) for x in (query_1HTD, key_1KTD, value_1KTD))
    outputs = []
    for group in pack_layout.groups:
        query, key, value = (_as_block(x, group) for x in (query_THD, key_TKD, value_TKD))
        window = sliding_window if sliding_window and sliding_window < group.longest else None
        mask_LL = None if window is None else _window_mask(group.longest, window, query_THD.device)
        out_GHLD = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask_LL, is_causal=mask_LL is None, scale=scaling, enable_gqa=True
        )
        flat = out_GHLD.transpose(1, 2).reshape(group.num_documents * group.longest, *out_GHLD.shape[1::2])
        outputs.append(flat.index_select(0, group.keep_N))
    together = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    out_THD = together.index_select(0, pack_layout.restore_T)
    return out_THD.to(query_1HTD.dtype).unsqueeze(0), None


def _with_padding(x_1HTD: torch.Tensor) -> torch.Tensor:
    """[T + 1, H, D] in float32, the last row zeros: what padding gathers."""
    x_THD = x_1HTD[0].transpose(0, 1)
    x_THD = x_THD if x_THD.dtype == torch.float64 else x_THD.float()
    return F.pad(x_THD, (0, 0, 0, 0, 0, 1))


def _as_block(x_THD: torch.Tensor, group: DocumentGroup) -> torch.Tensor:
    block = x_THD.index_select(0, group.gather_F)
    return block.view(group.num_documents, group.longest, *x_THD.shape[1:]).transpose(1, 2)


def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """True where a query may look: itself and the `window` - 1 tokens before it."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def register_attention() -> None:
    """Makes ATTENTION_NAME known to transformers; the mask it would build is left out, the layout says it all."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    return None
