"""Frozen weights behind one seam: LoRA asks for two products and does not know how a weight is stored.

Shapes: T tokens · K in · N out · R the ranks of all adapters on it together.

The low-rank part rides along: an input comes as [T, K + R], x with h = x Aᵀ beside it, an incoming gradient as
[T, N + R], g with gh = g (sB) beside it, so that one product gives x Wᵀ + h (sB)ᵀ, and one gives g W + gh A.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from myna.engine.kernels import Kernels

INT8_MOST = 127


class FrozenWeight(Protocol):
    """`a_RK` and `b_NR` are the adapter as the products read it: in the compute dtype, b scaled."""

    num_out: int
    num_in: int
    rank: int
    a_RK: torch.Tensor
    b_NR: torch.Tensor

    def product(self, xh: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        """x Wᵀ + h bᵀ + bias: [T, K + R] to [T, N]."""

    def product_back(self, ggh: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        """g W + gh a: [T, N + R] to [T, K]."""


class DenseWeight:
    """A weight in the compute dtype with the adapter at its edges, in one tensor that both products read.

        [ W  sB ]  N
        [ A   0 ]  R
          K   R
    """

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, rank: int) -> None:
        self.num_out, self.num_in = weight_NK.shape
        self.rank = rank
        store = weight_NK.new_zeros(self.num_out + rank, self.num_in + rank)
        store[: self.num_out, : self.num_in] = weight_NK
        self.weight_NK = store[: self.num_out, : self.num_in]
        self.a_RK = store[self.num_out :, : self.num_in]
        self.b_NR = store[: self.num_out, self.num_in :]
        self._forward = store[: self.num_out]
        self._backward = store[:, : self.num_in]
        self._bias = bias_N

    def product(self, xh: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        return F.linear(xh, self._forward, self._bias)

    def product_back(self, ggh: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        return ggh @ self._backward


class Int8Weight:
    """A weight as int8 with one scale an output row: one copy for both directions.

    The activation is quantized per token. In the backward the weight's scales are folded into the gradient before it
    is quantized, so the same int8 serves. The idea of per-token, per-output-channel int8: Dettmers et al. 2022,
    "LLM.int8()", section 2 (vector-wise quantization); here without its outlier decomposition.
    """

    def __init__(
        self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, rank: int, dtype: torch.dtype
    ) -> None:
        self.num_out, self.num_in = weight_NK.shape
        self.rank = rank
        self.quants_NK, self.scale_N = quantize_weight(weight_NK)
        self.a_RK = torch.zeros(rank, self.num_in, dtype=dtype)
        self.b_NR = torch.zeros(self.num_out, rank, dtype=dtype)
        self._bias = None if bias_N is None else bias_N.to(dtype)

    def product(self, xh: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        quants_TK, scale_T = kernels.quantize_rows(xh[:, : self.num_in], None)
        low_TN = xh[:, self.num_in :] @ self.b_NR.T if self.rank else None
        sums_TN = torch._int_mm(quants_TK, self.quants_NK.T)
        return kernels.dequantize(sums_TN, scale_T, self.scale_N, low_TN, self._bias, xh.dtype)

    def product_back(self, ggh: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        quants_TN, scale_T = kernels.quantize_rows(ggh[:, : self.num_out], self.scale_N)
        low_TK = ggh[:, self.num_out :] @ self.a_RK if self.rank else None
        sums_TK = torch._int_mm(quants_TN, self.quants_NK)
        return kernels.dequantize(sums_TK, scale_T, None, low_TK, None, ggh.dtype)


def quantize_weight(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 by output row: W ≈ quants · scale, scale = max |row| / 127 (0 for a row of zeros)."""
    largest_N = weight_NK.abs().amax(1).float()
    scale_N = largest_N / INT8_MOST
    inverse_N = torch.where(scale_N > 0, 1 / scale_N, 0.0)
    return (weight_NK.float() * inverse_N[:, None]).round_().to(torch.int8), scale_N
