"""The small work around the frozen products: norms, activations, attention, int8 rows, low-rank products, as one protocol.

Shapes: T tokens of the pack · d width · N columns. `out` arguments are views that may have a longer row stride.
It is kept in plain torch by `torch_kernels` and in C by `native`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from myna.engine.dropout import DropoutMask
from myna.engine.layout import PackLayout
from myna.engine.products import Products

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

    def product_int8(
        self,
        x: torch.Tensor,
        quants_NK: torch.Tensor,
        fold: torch.Tensor | None,
        column_scale: torch.Tensor | None,
        low: LowRankTerm | None,
        bias: torch.Tensor | None,
        *,
        back: bool,
    ) -> torch.Tensor:
        """(x · fold) Wᵀ · column_scale (+ low) (+ bias), or `back`, with W for Wᵀ, in x's dtype.

        W is int8 and becomes float32 a part at a time; products and sums are float32.
        """

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
