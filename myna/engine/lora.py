"""LoRA linears that read one input, as one product forward and one back.

Shapes: T tokens · K in · N out · R ranks of the group together. Hu et al. 2021, "LoRA", section 4.1: y = x Wᵀ + s (x Aᵀ) Bᵀ
with s = alpha / r. The modules, their names and their weights are peft's; here they are only read.

With dropout each adapter reads x through a mask of its own (`engine.dropout`), so h is made part by part, and the low-rank
gradient in x, which goes back through the mask, is added after the frozen product instead of riding in it.

    q, k, v     one group: their weights stacked, h = x [Aq; Ak; Av]ᵀ, the Bs on the diagonal blocks of one b
    gate, up    another
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from myna.engine.dropout import DropoutMask, PackMasks
from myna.engine.frozen import DenseWeight, FrozenWeight
from myna.engine.kernels import Kernels

ADAPTER_NAME = "default"


@dataclass(frozen=True)
class LoraPart:
    """One adapter of a group: its two parameters, and where its output rows and its ranks lie."""

    a: torch.nn.Parameter  # [r, K]
    b: torch.nn.Parameter  # [n, r]
    scaling: float
    rows: slice
    ranks: slice


class LoraGroup:
    """Linear layers with one input, and the adapters' `parameters`."""

    frozen: FrozenWeight
    first_adapter = 0  # of the model's adapters in the order of the forward; the decoder counts them

    def __init__(self, modules: Sequence[Any]) -> None:
        bases = [getattr(module, "base_layer", module) for module in modules]
        parts, row, rank = [], 0, 0
        for module, base in zip(modules, bases, strict=True):
            num_rows = base.weight.shape[0]
            if base is not module:
                a, b = module.lora_A[ADAPTER_NAME].weight, module.lora_B[ADAPTER_NAME].weight
                ranks = slice(rank, rank + a.shape[0])
                parts.append(LoraPart(a, b, module.scaling[ADAPTER_NAME], slice(row, row + num_rows), ranks))
                rank = ranks.stop
            row += num_rows
        self.parts = tuple(parts)
        rates = {_dropout(module) for module, base in zip(modules, bases, strict=True) if base is not module}
        assert len(rates) <= 1, "adapters of one group with different dropout"
        self.dropout = rates.pop() if rates else 0.0
        self.parameters = tuple(p for part in parts for p in (part.a, part.b))
        weight = (
            torch.cat([base.weight.detach() for base in bases])
            if len(bases) > 1
            else bases[0].weight.detach()
        )
        blocks = tuple((part.rows, part.ranks) for part in parts)
        self.frozen = DenseWeight(weight, _bias(bases), rank, blocks)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the adapter's present values into the products; after every change of them."""
        for part in self.parts:
            self.frozen.low.put(part.rows, part.ranks, part.a, part.b * part.scaling)

    def input_buffer(self, like: torch.Tensor) -> torch.Tensor:
        """[T, K + R] for T rows of `like`; its first K columns are to be filled with x."""
        return like.new_empty(len(like), self.frozen.num_in + self.frozen.rank)

    def gradient_buffer(self, like: torch.Tensor) -> torch.Tensor:
        """[T, N + R] for T rows of `like`; its first N columns are to be filled with the incoming gradient."""
        return like.new_empty(len(like), self.frozen.num_out + self.frozen.rank)

    def forward(self, xh: torch.Tensor, kernels: Kernels, masks: PackMasks | None = None) -> torch.Tensor:
        """[T, N]; fills the last R columns of `xh` with h. With `masks` the group's dropout is on."""
        num_in = self.frozen.num_in
        if masks is not None and self.dropout:
            for part, x in self._dropped(xh[:, :num_in], kernels, masks):
                h = xh[:, num_in + part.ranks.start : num_in + part.ranks.stop]
                kernels.low_rank(x, self.frozen.low.a_KR[:, part.ranks], h)
        elif self.frozen.rank:
            kernels.low_rank(xh[:, :num_in], self.frozen.low.a_KR, xh[:, num_in:])
        return self.frozen.product(xh, kernels)

    def low_gradient(self, ggh: torch.Tensor, kernels: Kernels) -> None:
        """Fills the last R columns of `ggh` with the gradient in h: first of the three parts of a backward."""
        num_out = self.frozen.num_out
        for part in self.parts:
            gh = ggh[:, num_out + part.ranks.start : num_out + part.ranks.stop]
            kernels.low_rank(ggh[:, part.rows], self.frozen.low.b_NR[part.rows, part.ranks], gh)

    def input_gradient(
        self, ggh: torch.Tensor, kernels: Kernels, masks: PackMasks | None = None
    ) -> torch.Tensor:
        """The gradient in x, [T, K]; left out where nobody needs it."""
        if masks is None or not self.dropout:
            return self.frozen.product_back(ggh, kernels)
        num_out = self.frozen.num_out
        gx = self.frozen.product_back(ggh[:, :num_out], kernels)
        for part, mask in self._masks(masks):
            gh = ggh[:, num_out + part.ranks.start : num_out + part.ranks.stop]
            low = kernels.products.back(gh, self.frozen.low.a_RK[part.ranks])
            kernels.drop(low, mask, gx, add=True)
        return gx

    def add_adapter_gradients(
        self, ggh: torch.Tensor, xh: torch.Tensor, kernels: Kernels, masks: PackMasks | None = None
    ) -> None:
        """Adds the gradients in `parameters` to what stands in their `grad`."""
        num_out, num_in = self.frozen.num_out, self.frozen.num_in
        if masks is not None and self.dropout:
            for part, x in self._dropped(xh[:, :num_in], kernels, masks):
                gh = ggh[:, num_out + part.ranks.start : num_out + part.ranks.stop]
                kernels.add_outer(gh, x, [_gradient_of(part.a)], 1.0)
        elif self.parts:
            gradients = [_gradient_of(part.a) for part in self.parts]
            kernels.add_outer(ggh[:, num_out:], xh[:, :num_in], gradients, 1.0)
        for part in self.parts:
            h = xh[:, num_in + part.ranks.start : num_in + part.ranks.stop]
            kernels.add_outer(ggh[:, part.rows], h, [_gradient_of(part.b)], part.scaling)

    def _masks(self, masks: PackMasks) -> Iterator[tuple[LoraPart, DropoutMask]]:
        for number, part in enumerate(self.parts, self.first_adapter):
            yield part, masks.of(number, self.frozen.num_in, self.dropout)

    def _dropped(
        self, x: torch.Tensor, kernels: Kernels, masks: PackMasks
    ) -> Iterator[tuple[LoraPart, torch.Tensor]]:
        """Each part with x as it reads it, [T, K], until the next is asked for."""
        room = torch.empty_like(x, memory_format=torch.contiguous_format)
        for part, mask in self._masks(masks):
            kernels.drop(x, mask, room)
            yield part, room


def _gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What a backward adds to."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _dropout(module: Any) -> float:
    """peft has an Identity where nothing is dropped."""
    return float(getattr(module.lora_dropout[ADAPTER_NAME], "p", 0.0))


def _bias(bases: Sequence[Any]) -> torch.Tensor | None:
    if all(base.bias is None for base in bases):
        return None
    return torch.cat(
        [
            base.weight.new_zeros(base.weight.shape[0]) if base.bias is None else base.bias.detach()
            for base in bases
        ]
    )
