"""Cross-entropy over target tokens alone, in chunks, its gradient computed on the way forward.

Shapes: N target tokens · C of a chunk · d hidden width · V vocabulary.

Full logits [T, V] are never made: only target positions are projected, a chunk at a time, and what the backward
needs of a chunk is its gradient in the hidden states [C, d]. The head is frozen and gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch

from myna.engine.kernels import Kernels

CHUNK_BYTES = 25_000_000  # of logits: 256 tokens of a vocabulary of 49,152 in bfloat16
FEWEST_TOKENS = 16


def chunk_tokens(vocabulary: int, itemsize: int) -> int:
    """Target tokens to project at a time, so that their logits take about CHUNK_BYTES."""
    return max(FEWEST_TOKENS, CHUNK_BYTES // (vocabulary * itemsize))


class _TargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_Nd: torch.Tensor,
        head_Vd: torch.Tensor,
        targets_N: torch.Tensor,
        chunk: int,
        softcap: float | None,
        kernels: Kernels,
        scale: float,
    ) -> torch.Tensor:
        exact = torch.float64 if hidden_Nd.dtype == torch.float64 else torch.float32
        loss = hidden_Nd.new_zeros((), dtype=exact)
        gradient_Nd = torch.empty_like(hidden_Nd)
        for start in range(0, len(targets_N), chunk):
            rows = slice(start, start + chunk)
            logits_CV = kernels.products.linear(hidden_Nd[rows], head_Vd)
            loss += kernels.loss_back(logits_CV, targets_N[rows], softcap, scale)
            kernels.products.back(logits_CV, head_Vd, out=gradient_Nd[rows])
        ctx.save_for_backward(gradient_Nd)
        return loss if scale == 1 else loss * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_Nd,) = ctx.saved_tensors
        return gradient_Nd * grad_outputs[0].to(gradient_Nd.dtype), None, None, None, None, None, None


def target_loss(
    hidden_Nd: torch.Tensor,
    head_Vd: torch.Tensor,
    targets_N: torch.Tensor,
    kernels: Kernels,
    *,
    chunk: int | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """`scale` times the sum over target tokens of -log softmax(hidden · headᵀ)[target]; float32 (float64 for float64).

    `softcap` c: the logits are c · tanh(logits / c) (Gemma 2).
    """
    chunk = chunk or chunk_tokens(len(head_Vd), head_Vd.element_size())
    loss = _TargetLoss.apply(hidden_Nd, head_Vd, targets_N, chunk, softcap, kernels, scale)
    assert isinstance(loss, torch.Tensor)
    return loss
