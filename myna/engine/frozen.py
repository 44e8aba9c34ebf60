"""Frozen weights behind one seam: LoRA asks for two products and does not know how a weight is stored.

Shapes: T tokens · K in · N out · R the ranks of all adapters on it together.

The low-rank part rides along: an input comes as [T, K + R], x with h = x Aᵀ beside it, an incoming gradient as
[T, N + R], g with gh = g (sB) beside it, so that one product gives x Wᵀ + h (sB)ᵀ, and one gives g W + gh A.
"""

from __future__ import annotations

from typing import Final, Literal, Protocol

import torch

from myna.engine.kernels import Kernels, LowRankTerm

Int8Products = Literal["int8", "fp32"]  # what int8 weights are multiplied in
Blocks = tuple[tuple[slice, slice], ...]  # output rows and ranks, part by part

INT8_MOST = 127
SMALLEST = 1e-5  # of a column's largest value, so that one of zeros divides by something


class LowRank:
    """The adapters on a weight as the products read them: in the compute dtype, b scaled.

    a stands twice, once turned, and b too where `both_ways`: a kernel wants the columns of its answer side by side.
    Each part has output rows and ranks of its own, `blocks`; outside of them b is zero.
    """

    def __init__(
        self, a_RK: torch.Tensor, b_NR: torch.Tensor, blocks: Blocks | None, *, both_ways: bool = False
    ) -> None:
        self.a_RK, self.b_NR = a_RK, b_NR
        self.a_KR = a_RK.T.contiguous()
        self.b_RN = b_NR.T.contiguous() if both_ways else None
        self.blocks = blocks or ((slice(0, len(b_NR)), slice(0, len(a_RK))),)

    def put(self, rows: slice, ranks: slice, a: torch.Tensor, b: torch.Tensor) -> None:
        """One part's a [r, K] and scaled b [n, r]."""
        self.a_RK[ranks], self.b_NR[rows, ranks] = a, b
        self.a_KR[:, ranks] = self.a_RK[ranks].T
        if self.b_RN is not None:
            self.b_RN[ranks, rows] = self.b_NR[rows, ranks].T


class FrozenWeight(Protocol):
    """[N, K], and the adapters on it."""

    num_out: int
    num_in: int
    rank: int
    low: LowRank

    def product(self, xh: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        """x Wᵀ + h bᵀ + bias: [T, K + R] to [T, N]."""

    def product_back(self, ggh: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        """g W + gh a: [T, N + R] to [T, K]; of [T, N] g W alone."""


class DenseWeight:
    """A weight in the compute dtype with the adapter at its edges, in one tensor that both products read.

    [ W  sB ]  N
    [ A   0 ]  R
      K   R
    """

    def __init__(
        self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, rank: int, blocks: Blocks | None = None
    ) -> None:
        self.num_out, self.num_in = weight_NK.shape
        self.rank = rank
        store = weight_NK.new_zeros(self.num_out + rank, self.num_in + rank)
        store[: self.num_out, : self.num_in] = weight_NK
        self.weight_NK = store[: self.num_out, : self.num_in]
        self.low = LowRank(store[self.num_out :, : self.num_in], store[: self.num_out, self.num_in :], blocks)
        self._forward = store[: self.num_out]
        self._backward = store[:, : self.num_in]
        self.bias_N = bias_N

    def product(self, xh: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        return kernels.products.linear(xh, self._forward, self.bias_N)

    def product_back(self, ggh: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        return kernels.products.back(ggh, self._backward[: ggh.shape[1]])


class Int8Weight:
    """A weight as int8 with one scale an output row: one copy for both directions.

    The activation is quantized per token (vector-wise quantization: Dettmers et al. 2022, "LLM.int8()", section 2). A few
    input columns of a language model are many times larger than the rest and would take the whole range; where
    `largest_K`, the largest |x| by column, is known, part of it is moved into the weight first (Xiao et al. 2023,
    "SmoothQuant", equation 4): x W = (x / s)(s W). In the backward the weight's scales are folded into the gradient before
    it is quantized, so the same int8 serves.
    """

    def __init__(self, dense: DenseWeight, largest_K: torch.Tensor | None = None) -> None:
        self.num_out, self.num_in, self.rank = dense.num_out, dense.num_in, dense.rank
        weight_NK = dense.weight_NK
        self._evened_K = None
        if largest_K is not None:
            smooth_K = smoothing(largest_K, weight_NK)
            weight_NK, self._evened_K = weight_NK * smooth_K, 1 / smooth_K
        self.quants_NK, self.scale_N = quantize_weight(weight_NK)
        self.low = LowRank(dense.low.a_RK.clone(), dense.low.b_NR.clone(), dense.low.blocks, both_ways=True)
        # of the two products' low-rank parts: b in its blocks, a whole
        self._blocks_B4 = _as_tensor(self.low.blocks)
        self._whole_B4 = _as_tensor(((slice(0, self.num_in), slice(0, self.rank)),))
        self._bias = dense.bias_N

    def product(self, xh: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        quants_TK, scale_T = kernels.quantize_rows(xh[:, : self.num_in], self._evened_K)
        sums_TN = torch._int_mm(quants_TK, self.quants_NK.T)
        return kernels.dequantize(sums_TN, scale_T, self.scale_N, self._low_of(xh), self._bias, xh.dtype)

    def product_back(self, ggh: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        quants_TN, scale_T = kernels.quantize_rows(ggh[:, : self.num_out], self.scale_N)
        sums_TK = torch._int_mm(quants_TN, self.quants_NK)
        return kernels.dequantize(sums_TK, scale_T, self._evened_K, self._low_back(ggh), None, ggh.dtype)

    def _low_of(self, xh: torch.Tensor) -> LowRankTerm | None:
        if not self.rank:
            return None
        assert self.low.b_RN is not None
        return LowRankTerm(xh[:, self.num_in :], self.low.b_RN, self._blocks_B4)

    def _low_back(self, ggh: torch.Tensor) -> LowRankTerm | None:
        if ggh.shape[1] == self.num_out:
            return None
        return LowRankTerm(ggh[:, self.num_out :], self.low.a_RK, self._whole_B4)


class WidenedInt8Weight(Int8Weight):
    """The same int8 weight on a CPU that is slow at integers: it is multiplied in float32, activations are not rounded."""

    def product(self, xh: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        x, low = xh[:, : self.num_in], self._low_of(xh)
        return kernels.product_int8(
            x, self.quants_NK, self._evened_K, self.scale_N, low, self._bias, back=False
        )

    def product_back(self, ggh: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        g, low = ggh[:, : self.num_out], self._low_back(ggh)
        return kernels.product_int8(g, self.quants_NK, self.scale_N, self._evened_K, low, None, back=True)


INT8_WEIGHTS: Final[dict[Int8Products, type[Int8Weight]]] = {"int8": Int8Weight, "fp32": WidenedInt8Weight}


class WatchedWeight:
    """A weight that notes the largest |x| of each input column while products are asked of it."""

    def __init__(self, dense: DenseWeight) -> None:
        self.dense = dense
        self.num_out, self.num_in, self.rank = dense.num_out, dense.num_in, dense.rank
        self.low = dense.low
        self.largest_K = torch.zeros(dense.num_in, device=dense.weight_NK.device)

    def product(self, xh: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        largest_K = xh[:, : self.num_in].abs().amax(0).float()
        self.largest_K = torch.maximum(self.largest_K, largest_K)
        return self.dense.product(xh, kernels)

    def product_back(self, ggh: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        return self.dense.product_back(ggh, kernels)


def _as_tensor(blocks: Blocks) -> torch.Tensor:
    """As LowRankTerm has them."""
    return torch.tensor([(rows.start, rows.stop, ranks.start, ranks.stop) for rows, ranks in blocks])


def smoothing(largest_K: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """By how much each input column is divided, and the weight's column multiplied: √(largest |x| / largest |w|)."""
    weight_K = weight_NK.abs().amax(0).float().clamp(min=SMALLEST)
    return (largest_K.clamp(min=SMALLEST) / weight_K).sqrt()


def quantize_weight(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 by output row: W ≈ quants · scale, scale = max |row| / 127 (0 for a row of zeros)."""
    largest_N = weight_NK.abs().amax(1).float()
    scale_N = largest_N / INT8_MOST
    inverse_N = torch.where(scale_N > 0, 1 / scale_N, 0.0)
    return (weight_NK.float() * inverse_N[:, None]).round_().to(torch.int8), scale_N
