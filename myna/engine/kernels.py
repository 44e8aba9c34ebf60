"""The small work around the frozen products: norms, activations, attention, int8 rows, low-rank products. One protocol,
here in plain torch.

Shapes: T tokens of the pack · d width · N columns. `out` arguments are views that may have a longer row stride.
The same functions in C are in `native`; what they compute is what these say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F

from myna.engine.dropout import DropoutMask
from myna.engine.layout import PackLayout
from myna.engine.products import PlainProducts, Products

ActivationName = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class Norm:
    """RMSNorm (Zhang & Sennrich 2019), or LayerNorm where `centred`; `weight_d` has in it what a family adds."""

    weight_d: torch.Tensor
    bias_d: torch.Tensor | None
    eps: float
    centred: bool = False


@dataclass(frozen=True)
class AttentionSpec:
    """How one layer attends. Head h of the queries lies at column query_at + h · query_step of the product, and so on."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    scale: float
    query_at: int
    query_step: int
    key_at: int
    value_at: int
    kv_step: int
    window: int | None = None
    softcap: float | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) of a pack, in the halves form of transformers: [T, rotary_dim]."""

    cos_TR: torch.Tensor
    sin_TR: torch.Tensor


@dataclass(frozen=True)
class LowRankTerm:
    """h m, [T, N], that is to be added to a product.

    `blocks_B4`, on the CPU: the columns [0] to [1] and ranks [2] to [3] of each block of m; outside of them m is zero.
    """

    h_TR: torch.Tensor
    m_RN: torch.Tensor
    blocks_B4: torch.Tensor


class Kernels(Protocol):
    """What the blocks call. Every function is pure but for its `out` and `into`."""

    name: str
    products: Products

    def norm(self, x: torch.Tensor, norm: Norm, out: torch.Tensor) -> Any:
        """Writes the normed x into `out`; returns what `norm_back` needs of it."""

    def norm_back(
        self, g: torch.Tensor, x: torch.Tensor, norm: Norm, stats: Any, plus: torch.Tensor | None
    ) -> torch.Tensor:
        """The gradient in x, plus `plus`."""

    def gate(self, h: torch.Tensor, activation: ActivationName, gated: bool, out: torch.Tensor) -> None:
        """act(h[:, :I]) · h[:, I:] where gated, else act(h), into `out`."""

    def gate_back(
        self,
        g: torch.Tensor,
        h: torch.Tensor,
        activation: ActivationName,
        gated: bool,
        out: torch.Tensor,
        again: torch.Tensor,
    ) -> None:
        """The gradient in h into `out`, and once more what `gate` writes, into `again`."""

    def attention(
        self, qkv: torch.Tensor, spec: AttentionSpec, rope: Rope, layout: PackLayout, out: torch.Tensor
    ) -> Any:
        """Writes the heads' answers into `out` [T, H · D]; returns what `attention_back` needs."""

    def attention_back(
        self,
        g: torch.Tensor,
        qkv: torch.Tensor,
        answer: torch.Tensor,
        saved: Any,
        spec: AttentionSpec,
        rope: Rope,
        layout: PackLayout,
        out: torch.Tensor,
    ) -> None:
        """The gradient in qkv into `out`; `answer` is what `attention` wrote."""

    def drop(self, x: torch.Tensor, mask: DropoutMask, out: torch.Tensor, *, add: bool = False) -> None:
        """x with the mask on it into `out`, or with `add` onto what is there."""

    def quantize_rows(self, x: torch.Tensor, fold: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """x (· fold, by column) as int8 with one scale a row: x ≈ quants · scale."""

    def dequantize(
        self,
        sums: torch.Tensor,
        row_scale: torch.Tensor,
        column_scale: torch.Tensor | None,
        low: LowRankTerm | None,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """int32 sums · row_scale (· column_scale) (+ low) (+ bias), in `dtype`."""

    def low_rank(self, x: torch.Tensor, m: torch.Tensor, out: torch.Tensor) -> None:
        """x m, [T, R], into `out`; m, [K, R], is narrow."""

    def add_outer(self, g: torch.Tensor, x: torch.Tensor, into: Sequence[torch.Tensor], scale: float) -> None:
        """Adds scale · gᵀ x, [N, K], to `into`: its rows, in one tensor or several, one after another."""

    def loss_back(
        self, logits: torch.Tensor, targets: torch.Tensor, softcap: float | None, scale: float = 1.0
    ) -> torch.Tensor:
        """Sum of -log softmax(logits)[target] over rows; `logits` become its gradient in themselves, in place.

        With `softcap` c the softmax is of c · tanh(logits / c), the gradient still in the logits. `scale` multiplies the
        gradient, not the sum, before it is rounded to the logits' format: fp16 holds nothing below 6e-8.
        """


class TorchKernels:
    """The protocol in torch operations: runs everywhere, in every number format."""

    name = "torch"

    def __init__(self, products: Products | None = None) -> None:
        self.products = products or PlainProducts()

    def norm(self, x: torch.Tensor, norm: Norm, out: torch.Tensor) -> Any:
        high = _exact(x)
        centre = high.mean(-1, keepdim=True) if norm.centred else None
        high = high if centre is None else high - centre
        inverse = torch.rsqrt(high.square().mean(-1, keepdim=True) + norm.eps)
        y = high * inverse * norm.weight_d
        out.copy_(y if norm.bias_d is None else y + norm.bias_d)
        return centre, inverse

    def norm_back(
        self, g: torch.Tensor, x: torch.Tensor, norm: Norm, stats: Any, plus: torch.Tensor | None
    ) -> torch.Tensor:
        centre, inverse = stats
        high = _exact(x)
        unit = (high if centre is None else high - centre) * inverse
        gy = _exact(g) * norm.weight_d
        gx = gy - unit * (gy * unit).mean(-1, keepdim=True)
        if norm.centred:
            gx -= gy.mean(-1, keepdim=True)
        gx *= inverse
        gx = gx if plus is None else gx + plus
        answer: torch.Tensor = gx.to(x.dtype)
        return answer

    def gate(self, h: torch.Tensor, activation: ActivationName, gated: bool, out: torch.Tensor) -> None:
        if not gated:
            out.copy_(_act(h, activation))
            return
        gate, up = h.chunk(2, dim=-1)
        torch.mul(_act(gate, activation), up, out=out)

    def gate_back(
        self,
        g: torch.Tensor,
        h: torch.Tensor,
        activation: ActivationName,
        gated: bool,
        out: torch.Tensor,
        again: torch.Tensor,
    ) -> None:
        self.gate(h, activation, gated, again)
        if not gated:
            out.copy_(_act_back(g, h, activation))
            return
        gate, up = h.chunk(2, dim=-1)
        width = gate.shape[-1]
        out[:, :width] = _act_back(g * up, gate, activation)
        torch.mul(g, _act(gate, activation), out=out[:, width:])

    def attention(
        self, qkv: torch.Tensor, spec: AttentionSpec, rope: Rope, layout: PackLayout, out: torch.Tensor
    ) -> Any:
        with torch.enable_grad():
            leaf = qkv.detach().requires_grad_()
            answer = plain_attention(leaf, spec, rope, layout)
        out.copy_(answer.detach())
        return leaf, answer

    def attention_back(
        self,
        g: torch.Tensor,
        qkv: torch.Tensor,
        answer: torch.Tensor,
        saved: Any,
        spec: AttentionSpec,
        rope: Rope,
        layout: PackLayout,
        out: torch.Tensor,
    ) -> None:
        leaf, answer_with_graph = saved
        (gradient,) = torch.autograd.grad(answer_with_graph, leaf, g.to(answer_with_graph.dtype))
        out.copy_(gradient)

    def drop(self, x: torch.Tensor, mask: DropoutMask, out: torch.Tensor, *, add: bool = False) -> None:
        kept = x * mask.keep().view(
            torch.int8
        )  # times 0: what is not a number stays none; as bool it is slower
        if add:
            out.add_(kept, alpha=mask.scale)
        else:
            torch.mul(kept, mask.scale, out=out)

    def quantize_rows(self, x: torch.Tensor, fold: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        high = x.float() if fold is None else x.float() * fold
        scale = high.abs().amax(1) / 127
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        return high.mul(inverse[:, None]).round_().to(torch.int8), scale

    def dequantize(
        self,
        sums: torch.Tensor,
        row_scale: torch.Tensor,
        column_scale: torch.Tensor | None,
        low: LowRankTerm | None,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        y = sums * row_scale[:, None]
        if column_scale is not None:
            y *= column_scale
        if low is not None:
            y += self.products.back(low.h_TR, low.m_RN)
        if bias is not None:
            y += bias
        return y.to(dtype)

    def low_rank(self, x: torch.Tensor, m: torch.Tensor, out: torch.Tensor) -> None:
        self.products.back(x, m, out=out)

    def add_outer(self, g: torch.Tensor, x: torch.Tensor, into: Sequence[torch.Tensor], scale: float) -> None:
        product_NK = self.products.outer(g, x)
        for rows, part in zip(into, product_NK.split([len(rows) for rows in into]), strict=True):
            rows.add_(part, alpha=scale)

    def loss_back(
        self, logits: torch.Tensor, targets: torch.Tensor, softcap: float | None, scale: float = 1.0
    ) -> torch.Tensor:
        high = _exact(logits)
        slope = None
        if softcap is not None:
            high = torch.tanh(high / softcap)
            slope = 1 - high.square()
            high = high.mul_(softcap)
        targets = targets[:, None]
        log_norm = high.logsumexp(-1, keepdim=True)
        loss = (log_norm - high.gather(1, targets)).sum()
        gradient = high.sub(log_norm).exp_()
        gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, -1.0))
        gradient = gradient if slope is None else gradient.mul_(slope)
        logits.copy_(gradient if scale == 1 else gradient.mul_(scale))
        return loss


def plain_attention(qkv: torch.Tensor, spec: AttentionSpec, rope: Rope, layout: PackLayout) -> torch.Tensor:
    """Rotary embedding and causal attention inside documents, with a gradient: [T, ...] to [T, H · D] in float32."""
    query, key, value = turned_heads(_exact(qkv), spec, rope)
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


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _act(x: torch.Tensor, activation: ActivationName) -> torch.Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _act_back(g: torch.Tensor, x: torch.Tensor, activation: ActivationName) -> torch.Tensor:
    if activation == "silu":
        gradient = torch.ops.aten.silu_backward(g, x)
    else:
        kind = "tanh" if activation == "gelu_tanh" else "none"
        gradient = torch.ops.aten.gelu_backward(g, x, approximate=kind)
    assert isinstance(gradient, torch.Tensor)
    return gradient
