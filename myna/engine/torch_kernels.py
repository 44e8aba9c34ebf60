"""The kernels in torch operations: they run everywhere, in every number format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from myna.engine.dropout import DropoutMask
from myna.engine.kernels import ActivationName, AttentionSpec, LowRankTerm, Norm, Rope
from myna.engine.layout import PackLayout
from myna.engine.plain_attention import exact, plain_attention
from myna.engine.products import PlainProducts, Products, widened_product


class TorchKernels:
    """The protocol in torch operations: runs everywhere, in every number format."""

    name = "torch"

    def __init__(self, products: Products | None = None) -> None:
        self.products = products or PlainProducts()

    def norm(self, x: torch.Tensor, norm: Norm, out: torch.Tensor) -> Any:
        high = exact(x)
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
        high = exact(x)
        unit = (high if centre is None else high - centre) * inverse
        gy = exact(g) * norm.weight_d
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
        return self._finish(sums * row_scale[:, None], column_scale, low, bias).to(dtype)

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
        high = x.float() if fold is None else x.float() * fold
        sums = widened_product(high, quants_NK, back=back)
        return self._finish(sums, column_scale, low, bias).to(x.dtype)

    def _finish(
        self,
        y: torch.Tensor,
        column_scale: torch.Tensor | None,
        low: LowRankTerm | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """What comes to the sums of an int8 product, in place."""
        if column_scale is not None:
            y *= column_scale
        if low is not None:
            y += self.products.back(low.h_TR, low.m_RN)
        if bias is not None:
            y += bias
        return y

    def low_rank(self, x: torch.Tensor, m: torch.Tensor, out: torch.Tensor) -> None:
        self.products.back(x, m, out=out)

    def add_outer(self, g: torch.Tensor, x: torch.Tensor, into: Sequence[torch.Tensor], scale: float) -> None:
        product_NK = self.products.outer(g, x)
        for rows, part in zip(into, product_NK.split([len(rows) for rows in into]), strict=True):
            rows.add_(part, alpha=scale)

    def loss_back(
        self, logits: torch.Tensor, targets: torch.Tensor, softcap: float | None, scale: float = 1.0
    ) -> torch.Tensor:
        high = exact(logits)
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
