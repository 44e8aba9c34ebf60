"""The two blocks of a decoder layer. Their backward, written by hand, keeps little and gives no frozen weight a gradient.

Shapes: T tokens of the pack · d width.

    attention   x + post(o(attend(qkv(norm x))))
    mlp         x + post(down(act(gate_up(norm x))))

`post` is a second norm in some families. Normed inputs and activations are made again in the backward: they cost one pass
over memory, and to keep them would cost half as much memory again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from myna.engine.dropout import PackMasks
from myna.engine.kernels import ActivationName, AttentionSpec, Kernels, Norm, Rope
from myna.engine.layout import PackLayout
from myna.engine.lora import LoraGroup


@dataclass(frozen=True)
class AttentionBlock:
    norm: Norm
    inner: LoraGroup  # q, k, v
    spec: AttentionSpec
    outer: LoraGroup
    post_norm: Norm | None = None
    rope_name: str = ""


@dataclass(frozen=True)
class MlpBlock:
    norm: Norm
    inner: LoraGroup  # gate, up; or the one that there is
    activation: ActivationName
    gated: bool
    outer: LoraGroup
    post_norm: Norm | None = None


@dataclass(frozen=True)
class PackTools:
    """What every block of a pack's forward and backward uses."""

    kernels: Kernels
    rope: Rope
    layout: PackLayout
    masks: PackMasks | None = None  # where something is dropped


def run_block(
    x_Td: torch.Tensor, block: AttentionBlock | MlpBlock, tools: PackTools, *, residual: bool = True
) -> torch.Tensor:
    """x and what the block adds to it (that alone without `residual`), [T, d], with a gradient to x.

    The adapters' parameters are inputs of the graph, so that it reaches down to the lowest of them; to autograd they have no
    gradient: the backward adds it to their `grad` itself, in float32, without a tensor in between.
    """
    parameters = (*block.inner.parameters, *block.outer.parameters)
    y_Td = _Block.apply(x_Td, block, tools, residual, *parameters)
    assert isinstance(y_Td, torch.Tensor)
    return y_Td


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        block: AttentionBlock | MlpBlock,
        tools: PackTools,
        residual: bool,
        *_: torch.Tensor,
    ) -> torch.Tensor:
        kernels = tools.kernels
        xh = block.inner.input_buffer(x)
        stats = kernels.norm(x, block.norm, xh[:, : x.shape[1]])
        middle = block.inner.forward(xh, kernels, tools.masks)
        answer = block.outer.input_buffer(x)
        inside = answer[:, : block.outer.frozen.num_in]
        attended = None
        if isinstance(block, AttentionBlock):
            attended = kernels.attention(middle, block.spec, tools.rope, tools.layout, inside)
        else:
            kernels.gate(middle, block.activation, block.gated, inside)
        y = block.outer.forward(answer, kernels, tools.masks)
        post_stats, raw = None, None
        if block.post_norm is not None:
            raw, y = y, torch.empty_like(y)
            post_stats = kernels.norm(raw, block.post_norm, y)
        ctx.block, ctx.tools, ctx.residual = block, tools, residual
        ctx.x, ctx.stats, ctx.middle, ctx.attended = x, stats, middle, attended
        ctx.h = xh[:, x.shape[1] :].clone()
        # an activation is made again from `middle`, an attention's answer is kept: its backward reads it
        ctx.answer = answer if isinstance(block, AttentionBlock) else answer[:, inside.shape[1] :].clone()
        ctx.raw, ctx.post_stats = raw, post_stats
        return y.add_(x) if residual else y  # y is new: a product's answer, or a norm's

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        block, tools, x, middle = ctx.block, ctx.tools, ctx.x, ctx.middle
        kernels = tools.kernels
        nothing = (None,) * len(ctx.needs_input_grad)
        g = coming = gradients[0]
        if block.post_norm is not None:
            g = kernels.norm_back(g, ctx.raw, block.post_norm, ctx.post_stats, None)
        ggh = block.outer.gradient_buffer(x)
        ggh[:, : block.outer.frozen.num_out] = g
        block.outer.low_gradient(ggh, kernels)
        if not (ctx.needs_input_grad[0] or block.inner.parts):
            block.outer.add_adapter_gradients(ggh, _answer_again(ctx, kernels), kernels, tools.masks)
            return nothing
        g_answer = block.outer.input_gradient(ggh, kernels, tools.masks)
        inner_ggh = block.inner.gradient_buffer(x)
        g_middle = inner_ggh[:, : block.inner.frozen.num_out]
        if isinstance(block, AttentionBlock):
            answer = ctx.answer
            inside = answer[:, : block.outer.frozen.num_in]
            kernels.attention_back(
                g_answer, middle, inside, ctx.attended, block.spec, tools.rope, tools.layout, g_middle
            )
        else:
            answer = _answer_buffer(ctx)
            inside = answer[:, : block.outer.frozen.num_in]
            kernels.gate_back(g_answer, middle, block.activation, block.gated, g_middle, inside)
        block.outer.add_adapter_gradients(ggh, answer, kernels, tools.masks)
        block.inner.low_gradient(inner_ggh, kernels)
        xh = block.inner.input_buffer(x)
        xh[:, x.shape[1] :] = ctx.h
        kernels.norm(x, block.norm, xh[:, : x.shape[1]])
        gx = None
        if ctx.needs_input_grad[0]:
            gx = block.inner.input_gradient(inner_ggh, kernels, tools.masks)
            gx = kernels.norm_back(gx, x, block.norm, ctx.stats, coming if ctx.residual else None)
        block.inner.add_adapter_gradients(inner_ggh, xh, kernels, tools.masks)
        ctx.x = ctx.middle = ctx.attended = ctx.answer = ctx.h = ctx.raw = None
        return gx, *nothing[1:]


def _answer_buffer(ctx: Any) -> torch.Tensor:
    """The outer product's input of an MLP, with h in its last columns and the rest to be filled."""
    outer = ctx.block.outer
    answer = outer.input_buffer(ctx.x)
    answer[:, outer.frozen.num_in :] = ctx.answer
    return answer  # type: ignore[no-any-return]


def _answer_again(ctx: Any, kernels: Kernels) -> torch.Tensor:
    """The outer product's input as it was in the forward."""
    block = ctx.block
    if isinstance(block, AttentionBlock):
        return ctx.answer  # type: ignore[no-any-return]
    answer = _answer_buffer(ctx)
    kernels.gate(ctx.middle, block.activation, block.gated, answer[:, : block.outer.frozen.num_in])
    return answer
