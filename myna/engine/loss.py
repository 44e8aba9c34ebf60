"""Cross-entropy over target tokens alone, in chunks, its gradient computed on the way forward.

Shapes: N target tokens · C of a chunk · d hidden width · V vocabulary.

Full logits [T, V] are never made: only target positions are projected, a chunk at a time, and what the backward
needs of a chunk is its gradient in the hidden states [C, d]. The head is frozen and gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_TOKENS = 256  # 256 x 49,152 float32 logits are 50 MB


class _TargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_Nd: torch.Tensor, head_Vd: torch.Tensor, targets_N: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        exact = torch.float64 if hidden_Nd.dtype == torch.float64 else torch.float32
        loss = hidden_Nd.new_zeros((), dtype=exact)
        gradient_Nd = torch.empty_like(hidden_Nd)
        for start in range(0, len(targets_N), chunk):
            rows = slice(start, start + chunk)
            logits_CV = (hidden_Nd[rows] @ head_Vd.T).to(exact)
            targets_C = targets_N[rows, None]
            log_norm_C = logits_CV.logsumexp(-1, keepdim=True)
            loss += (log_norm_C - logits_CV.gather(1, targets_C)).sum()
            gradient_CV = logits_CV.sub_(log_norm_C).exp_()
            gradient_CV.scatter_add_(1, targets_C, gradient_CV.new_full(targets_C.shape, -1.0))
            gradient_Nd[rows] = gradient_CV.to(hidden_Nd.dtype) @ head_Vd
        ctx.save_for_backward(gradient_Nd)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient_Nd,) = ctx.saved_tensors
        return gradient_Nd * grad_outputs[0].to(gradient_Nd.dtype), None, None, None


def target_loss(
    hidden_Nd: torch.Tensor, head_Vd: torch.Tensor, targets_N: torch.Tensor, chunk: int = CHUNK_TOKENS
) -> torch.Tensor:
    """Sum over target tokens of -log softmax(hidden · headᵀ)[target]; a scalar, float32 (float64 for float64)."""
    loss = _TargetLoss.apply(hidden_Nd, head_Vd, targets_N, chunk)
    assert isinstance(loss, torch.Tensor)
    return loss
