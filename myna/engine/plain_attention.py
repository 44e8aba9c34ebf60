"""Attention inside documents in torch operations, with a gradient: for every device and number format.

Shapes: T tokens of the pack · H heads · K key and value heads · D of a head · G documents of a group · L its longest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from myna.engine.kernels import AttentionSpec, Norm, Rope
from myna.engine.layout import PackLayout


def plain_attention(qkv: torch.Tensor, spec: AttentionSpec, rope: Rope, layout: PackLayout) -> torch.Tensor:
    """Rotary embedding and causal attention inside documents, with a gradient: [T, ...] to [T, H · D] in float32."""
    query, key, value = turned_heads(exact(qkv), spec, rope)
    query, key, value = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (query, key, value))
    answers = []
    for group in layout.groups:
        q, k, v = (_as_block(x, group.gather_F, group.num_documents) for x in (query, key, value))
        answer_GHLD = _causal(q, k, v, spec)
        flat = answer_GHLD.transpose(1, 2).flatten(0, 1).flatten(1)
        answers.append(flat.index_select(0, group.keep_N))
    return torch.cat(answers).index_select(0, layout.restore_T)


def turned_heads(
    qkv: torch.Tensor, spec: AttentionSpec, rope: Rope
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [T, H, D], keys and values [T, K, D] of the fused product; queries and keys normed and turned by position."""
    query = _heads(qkv, spec.query_at, spec.query_step, spec.num_heads, spec.head_dim)
    key = _heads(qkv, spec.key_at, spec.kv_step, spec.num_kv_heads, spec.head_dim)
    value = _heads(qkv, spec.value_at, spec.kv_step, spec.num_kv_heads, spec.head_dim)
    query = _rotate(_head_norm(query, spec.query_norm), rope, spec.rotary_dim)
    key = _rotate(_head_norm(key, spec.key_norm), rope, spec.rotary_dim)
    return query, key, value


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    longest = q.shape[2]
    window = spec.window if spec.window and spec.window < longest else None
    mask = None if window is None else _window_mask(longest, window, q.device)
    if spec.softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=spec.scale, enable_gqa=True
        )
    repeat = spec.num_heads // spec.num_kv_heads
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    scores = torch.tanh(q @ k.transpose(-1, -2) * (spec.scale / spec.softcap)) * spec.softcap
    seen = _window_mask(longest, window or longest, q.device)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """True where a query may look: itself and the `window` - 1 tokens before it."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _as_block(x_THD: torch.Tensor, gather_F: torch.Tensor, num_documents: int) -> torch.Tensor:
    block = x_THD.index_select(0, gather_F)
    return block.view(num_documents, -1, *x_THD.shape[1:]).transpose(1, 2)


def _heads(x: torch.Tensor, at: int, step: int, num_heads: int, head_dim: int) -> torch.Tensor:
    """[T, heads, head_dim], a view."""
    return x.as_strided((len(x), num_heads, head_dim), (x.stride(0), step, 1), x.storage_offset() + at)


def _head_norm(x_THD: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    if norm is None:
        return x_THD
    return x_THD * torch.rsqrt(x_THD.square().mean(-1, keepdim=True) + norm.eps) * norm.weight_d


def _rotate(x_THD: torch.Tensor, rope: Rope, rotary_dim: int) -> torch.Tensor:
    turned, kept = x_THD[..., :rotary_dim], x_THD[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    half = torch.cat((-second, first), dim=-1)
    turned = turned * rope.cos_TR[:, None] + half * rope.sin_TR[:, None]
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


def exact(x: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()
