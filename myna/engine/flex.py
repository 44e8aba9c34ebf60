"""The kernels for a GPU: attention by torch's flex_attention over the pack as it lies, the rest as in plain torch.

He et al. 2024, "Flex Attention". The block mask says which tokens see which: those of the same document that stand at or
before them, inside the window. A document is a path in the tree of segments: all branches see a shared beginning.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from myna.engine.compiler import NotNative, find_compiler
from myna.engine.kernels import AttentionSpec, Rope
from myna.engine.layout import PackLayout
from myna.engine.plain_attention import exact, turned_heads
from myna.engine.torch_kernels import TorchKernels

# what flex_attention is compiled by on a GPU
COMPILER_PACKAGE = "triton"
Mask = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def flex_missing(device: str) -> str:
    """Why attention by block masks can't be had on this device, in words for the user; "" where it can."""
    if device == "cpu":
        return "torch's flex_attention has no backward on a CPU"
    if importlib.util.find_spec(COMPILER_PACKAGE) is None:
        return f"flex_attention is compiled by {COMPILER_PACKAGE}, which is not installed"
    try:
        find_compiler()  # triton's own small pieces are C
    except NotNative as error:
        return f"flex_attention: {error}"
    return ""


class FlexKernels(TorchKernels):
    """Attention in the activations' own number format, without padding and without gathering."""

    name = "flex"

    def attention(
        self, qkv: torch.Tensor, spec: AttentionSpec, rope: Rope, layout: PackLayout, out: torch.Tensor
    ) -> Any:
        with torch.enable_grad():
            leaf = qkv.detach().requires_grad_(_has_backward(qkv))
            answer = packed_flex(leaf, spec, rope, layout)
        out.copy_(answer.detach())
        return leaf, answer


def _has_backward(x: torch.Tensor) -> bool:
    """On a CPU flex_attention has none, and refuses what asks for a gradient."""
    return x.is_cuda


def packed_flex(qkv: torch.Tensor, spec: AttentionSpec, rope: Rope, layout: PackLayout) -> torch.Tensor:
    """Rotary embedding and attention inside documents: [T, …] to [T, H · D]."""
    # normed and turned in float32: the square of what fp16 holds it does not hold
    heads = turned_heads(exact(qkv), spec, rope)
    query, key, value = (x.to(qkv.dtype).transpose(0, 1)[None] for x in heads)
    attend: Any = _compiled() if qkv.is_cuda else flex_attention
    answer = attend(
        query,
        key,
        value,
        score_mod=None if spec.softcap is None else _softcap(spec.softcap),
        block_mask=block_mask(layout, spec.window),
        scale=spec.scale,
        enable_gqa=spec.num_heads != spec.num_kv_heads,
    )
    assert isinstance(answer, torch.Tensor)
    return answer[0].transpose(0, 1).flatten(1)


@functools.lru_cache(maxsize=8)
def block_mask(layout: PackLayout, window: int | None) -> BlockMask:
    """Which blocks of the pack's [T, T] are looked at; made once a pack and window."""
    num_tokens = len(layout.batch.input_ids_T)
    return create_block_mask(
        seen_by(layout, window), None, None, num_tokens, num_tokens, device=str(layout.device)
    )


def seen_by(layout: PackLayout, window: int | None) -> Mask:
    """mask(batch, head, query, key): whether a query token sees a key token."""
    segments = layout.batch.segments
    lengths = torch.tensor([segment.length for segment in segments])
    # [T, T] of the distances is made at once: 32 bits suffice
    segment_T = torch.repeat_interleave(torch.arange(len(segments)), lengths).int().to(layout.device)
    above_SS = torch.eye(len(segments), dtype=torch.bool)
    for number, segment in enumerate(segments):
        if segment.parent >= 0:
            above_SS[number] |= above_SS[segment.parent]
    above_SS = above_SS.to(layout.device)
    starts_S, first_S = layout.tree.segments[:, 0], layout.tree.segments[:, 2]
    place = torch.arange(int(lengths.sum())) - torch.repeat_interleave(starts_S - first_S, lengths)
    position_T = place.int().to(layout.device)

    def seen(_batch: torch.Tensor, _head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        distance = position_T[q] - position_T[k]
        inside = above_SS[segment_T[q], segment_T[k]] & (distance >= 0)
        return inside if window is None else inside & (distance < window)

    return seen


def _softcap(cap: float) -> Callable[..., torch.Tensor]:
    def capped(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.tanh(score / cap) * cap

    return capped


@functools.cache
def _compiled() -> Callable[..., Any]:
    """Triton kernels are made for a length at first sight; lengths are rounded, so they are few."""
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled
