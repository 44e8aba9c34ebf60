"""Products in float32, in C: a weight in bfloat16 is widened a panel at a time, in the nearest caches.

What `WideProducts` does with torch's product and copies of parts of the weight, in one pass (`native_products.h`).
"""

from __future__ import annotations

import torch

from myna.engine.native_call import NativeCall, in_rows, whole_vectors
from myna.engine.native_library import NativeLibrary
from myna.engine.products import WideProducts

COMPILED = (torch.bfloat16, torch.float32)


class NativeProducts(WideProducts):
    """The protocol of products in C, on a CPU; tensors of other dtypes are torch's.

    The threads are those of the kernels made of the same library.
    """

    def __init__(self, library: NativeLibrary) -> None:
        super().__init__()
        self._call = NativeCall(library)

    def linear(
        self,
        x_TK: torch.Tensor,
        weight_NK: torch.Tensor,
        bias_N: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if x_TK.dtype not in COMPILED:
            return super().linear(x_TK, weight_NK, bias_N, out)
        out = x_TK.new_empty(len(x_TK), len(weight_NK)) if out is None else out
        return self._product(x_TK, weight_NK, bias_N, out, turned=True)

    def back(
        self, g_TN: torch.Tensor, weight_NK: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if g_TN.dtype not in COMPILED:
            return super().back(g_TN, weight_NK, out)
        out = g_TN.new_empty(len(g_TN), weight_NK.shape[1]) if out is None else out
        return self._product(g_TN, weight_NK, None, out, turned=False)

    def _product(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        *,
        turned: bool,
    ) -> torch.Tensor:
        assert bias is None or bias.dtype == x.dtype
        assert min(*x.shape, out.shape[1]) > 0, "a product of nothing"
        assert weight.dtype == out.dtype == x.dtype and weight.stride(1) == out.stride(1) == 1
        x, bias = in_rows(x), None if bias is None else bias.contiguous()
        wide = self._room("x", len(x), whole_vectors(x.shape[1]))
        tensors = (x, x.stride(0), weight, weight.stride(0), int(turned), bias, wide, out, out.stride(0))
        self._call("myna_product", x, *tensors, *x.shape, out.shape[1])
        return out
