"""The float matrix products of the step: in the number format of their tensors, or widened to float32 first.

Shapes: T tokens · K in · N out. A weight is [N, K], rows may have any stride.

Some processors are slower in bfloat16 than in float32: those without instructions for it, and Intel's with AVX512-BF16 but
no AMX (half as fast, measured). There a weight that is kept in bfloat16 is turned to float32 on its way into the product,
which costs one pass over it: half the memory of a float32 base at nearly its speed.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

WIDE_NUMBERS = (
    1 << 20
)  # of a weight that stand in float32 at once: 4 MB; a quarter and twice of it are as fast


class Products(Protocol):
    """Every float product of the step but attention's own."""

    def linear(
        self,
        x_TK: torch.Tensor,
        weight_NK: torch.Tensor,
        bias_N: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x Wᵀ + bias: [T, N], in x's dtype."""

    def back(
        self, g_TN: torch.Tensor, weight_NK: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """g W: [T, K], in g's dtype."""

    def outer(self, g_TN: torch.Tensor, x_TK: torch.Tensor) -> torch.Tensor:
        """gᵀ x: [N, K], in float32 at least."""


class PlainProducts:
    """As torch multiplies tensors of this dtype."""

    def linear(
        self,
        x_TK: torch.Tensor,
        weight_NK: torch.Tensor,
        bias_N: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if out is not None:
            assert bias_N is None
            return torch.mm(x_TK, weight_NK.T, out=out)
        return F.linear(x_TK, weight_NK, bias_N)

    def back(
        self, g_TN: torch.Tensor, weight_NK: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.mm(g_TN, weight_NK, out=out)

    def outer(self, g_TN: torch.Tensor, x_TK: torch.Tensor) -> torch.Tensor:
        product = g_TN.T @ x_TK
        return product if product.dtype == torch.float64 else product.float()


class WideProducts:
    """Factors that are narrower than float32 are widened to it, the answer is rounded once."""

    def __init__(self) -> None:
        self._scratch: dict[str, torch.Tensor] = {}

    def linear(
        self,
        x_TK: torch.Tensor,
        weight_NK: torch.Tensor,
        bias_N: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = x_TK.new_empty(len(x_TK), len(weight_NK)) if out is None else out
        x = self._wide("x", x_TK)
        for rows in _blocks(weight_NK):
            weight = self._wide("weight", weight_NK[rows])
            y = torch.mm(x, weight.T, out=self._room("answer", len(x), len(weight)))
            if bias_N is not None:
                y += bias_N[rows]
            out[:, rows] = y
        return out

    def back(
        self, g_TN: torch.Tensor, weight_NK: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        gx = self._room("answer", len(g_TN), weight_NK.shape[1])
        for number, rows in enumerate(_blocks(weight_NK)):
            g, weight = self._wide("x", g_TN[:, rows]), self._wide("weight", weight_NK[rows])
            gx = gx.addmm_(g, weight) if number else torch.mm(g, weight, out=gx)
        return gx.to(g_TN.dtype) if out is None else out.copy_(gx)

    def outer(self, g_TN: torch.Tensor, x_TK: torch.Tensor) -> torch.Tensor:
        return self._wide("x", g_TN).T @ self._wide("weight", x_TK)

    def _wide(self, name: str, narrow: torch.Tensor) -> torch.Tensor:
        return self._room(name, *narrow.shape).copy_(narrow)

    def _room(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """Memory kept from call to call; what is in it is not."""
        held = self._scratch.get(name)
        if held is None or held.numel() < rows * columns:
            held = self._scratch[name] = torch.empty(rows * columns)
        return held[: rows * columns].view(rows, columns)


def _blocks(weight_NK: torch.Tensor) -> list[slice]:
    """The weight's rows in parts of about WIDE_NUMBERS numbers."""
    rows = len(weight_NK)
    step = -(-rows // max(1, round(weight_NK.numel() / WIDE_NUMBERS)))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def widened_product(x: torch.Tensor, weight_NK: torch.Tensor, *, back: bool) -> torch.Tensor:
    """x Wᵀ, or x W `back`, in x's dtype: a weight of another one is turned to it, WIDE_NUMBERS at once."""
    out = x.new_zeros(len(x), weight_NK.shape[1] if back else len(weight_NK))
    for rows in _blocks(weight_NK):
        weight = weight_NK[rows].to(x.dtype)
        if back:
            out.addmm_(x[:, rows], weight)
        else:
            out[:, rows] = x @ weight.T
    return out
