"""One LoRA linear: y = x Wᵀ + s (x Aᵀ) Bᵀ, with a backward that never asks for the frozen weight's gradient.

Shapes: T tokens · i in · o out · r rank. Hu et al. 2021, "LoRA", section 4.1; s = alpha / r.
The modules, their names and their weights are peft's; only the forward of each is replaced.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F

ADAPTER_NAME = "default"


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_Ti: torch.Tensor,
        weight_oi: torch.Tensor,
        bias_o: torch.Tensor | None,
        a_ri: torch.Tensor,
        b_or: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        low_a_ri = a_ri.to(x_Ti.dtype)
        low_b_or = (b_or * scaling).to(x_Ti.dtype)
        h_Tr = x_Ti @ low_a_ri.T
        # not in place: bfloat16 addmm_ leaves the fast kernel on CPU
        y_To = torch.addmm(F.linear(x_Ti, weight_oi, bias_o), h_Tr, low_b_or.T)
        ctx.save_for_backward(x_Ti, weight_oi, low_a_ri, low_b_or, h_Tr)
        ctx.scaling = scaling
        return y_To

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_Ti, weight_oi, low_a_ri, low_b_or, h_Tr = ctx.saved_tensors
        gy_To = grad_outputs[0].contiguous()
        gh_Tr = gy_To @ low_b_or
        gx_Ti = None
        if ctx.needs_input_grad[0]:
            gx_Ti = torch.addmm(gy_To @ weight_oi, gh_Tr, low_a_ri)
        exact = torch.float64 if x_Ti.dtype == torch.float64 else torch.float32
        ga_ri = (gh_Tr.T @ x_Ti).to(exact)
        gb_or = (gy_To.T @ h_Tr).to(exact) * ctx.scaling
        return gx_Ti, None, None, ga_ri, gb_or, None


def _forward(self: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    base = self.base_layer
    flat = _LoraLinear.apply(
        x.reshape(-1, x.shape[-1]),
        base.weight,
        base.bias,
        self.lora_A[ADAPTER_NAME].weight,
        self.lora_B[ADAPTER_NAME].weight,
        self.scaling[ADAPTER_NAME],
    )
    assert isinstance(flat, torch.Tensor)
    return flat.view(*x.shape[:-1], -1)


def use_fast_lora(model: torch.nn.Module) -> int:
    """Replaces the forward of every LoRA linear of a peft model; returns how many there are."""
    from peft.tuners.lora import Linear

    layers = [module for module in model.modules() if isinstance(module, Linear)]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return len(layers)
