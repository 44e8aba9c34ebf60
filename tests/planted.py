"""Faults to plant into the engine, in memory: by replacing a name of it, or in a stepper that is made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import myna.engine.decoder
import myna.engine.families
import myna.engine.lora
import myna.engine.plain_attention
import myna.engine.step
from myna.data.packing import Batch, Segment
from myna.engine.kernels import Kernels
from myna.engine.lora import LoraGroup
from myna.engine.step import FastStepper
from myna.engine.torch_kernels import TorchKernels

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]


# Faults that are planted by replacing a name of the engine


def wrapped(module: Any, name: str, change: Callable[..., Any]) -> Plant:
    """`change` is called with the honest function and its arguments."""

    def plant(patch: Patch) -> None:
        patch.setattr(module, name, functools.partial(change, getattr(module, name)))

    return plant


def spec_with(**changes: Any) -> Plant:
    """Every attention's spec with values changed; a callable is given the honest value."""

    def change(honest: Callable[..., Any], x: Any, block: Any, tools: Any, **more: Any) -> Any:
        if hasattr(block, "spec"):
            new = {k: v(getattr(block.spec, k)) if callable(v) else v for k, v in changes.items()}
            block = replace(block, spec=replace(block.spec, **new))
        return honest(x, block, tools, **more)

    return wrapped(myna.engine.decoder, "run_block", change)


def block_with(**changes: Any) -> Plant:
    """Every block with attributes changed, where it has them."""

    def change(honest: Callable[..., Any], x: Any, block: Any, tools: Any, **more: Any) -> Any:
        own = {k: v for k, v in changes.items() if hasattr(block, k)}
        return honest(x, replace(block, **own), tools, **more)

    return wrapped(myna.engine.decoder, "run_block", change)


def batch_with(change: Callable[[Batch], Batch]) -> Plant:
    return wrapped(myna.engine.step, "round_up", lambda honest, batch, *more: change(honest(batch, *more)))


def positions_go_on(batch: Batch) -> Batch:
    return replace(batch, position_ids_T=torch.arange(len(batch.input_ids_T)))


def one_target_late(batch: Batch) -> Batch:
    return replace(batch, target_index_N=batch.target_index_N + 1)


def filler_is_trained(batch: Batch) -> Batch:
    filler = torch.tensor([batch.segments[-1].start])
    return replace(
        batch,
        target_index_N=torch.cat([batch.target_index_N, filler]),
        targets_N=torch.cat([batch.targets_N, torch.tensor([0])]),
    )


def neighbours_are_seen(honest: Callable[..., Any], batch: Batch, device: Any) -> Any:
    one = replace(batch, segments=(Segment(0, len(batch.input_ids_T)),), documents=((0,),))
    return honest(one, device)


def scaling_is_forgotten(patch: Patch) -> None:
    def refresh(group: LoraGroup) -> None:
        for part in group.parts:
            group.frozen.low.put(part.rows, part.ranks, part.a.detach(), part.b.detach())

    patch.setattr(LoraGroup, "refresh", refresh)


def b_lies_in_another_part(patch: Patch) -> None:
    honest = LoraGroup.refresh

    def refresh(group: LoraGroup) -> None:
        honest(group)
        if len(group.parts) > 1:
            last = group.parts[-1]
            group.frozen.low.b_NR[last.rows, group.parts[0].ranks] = last.b.detach() * last.scaling

    patch.setattr(LoraGroup, "refresh", refresh)


def causal_is_forgotten(patch: Patch) -> None:
    honest = torch.nn.functional.scaled_dot_product_attention
    patch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: honest(*a, **(k | {"is_causal": False})),
    )


def turned_in_pairs(honest: Callable[..., Any], x: torch.Tensor, rope: Any, width: int) -> Any:
    """The other form of rotary embedding: neighbours instead of halves."""
    order = torch.arange(width).view(2, -1).T.flatten()
    turned = honest(x[..., :width][..., order.argsort()], rope, width)[..., order]
    return torch.cat([turned, x[..., width:]], dim=-1)


def bias_is_forgotten(patch: Patch) -> None:
    patch.setattr(myna.engine.lora, "_bias", lambda bases: None)


def plus_one_is_forgotten(honest: Callable[..., Any], module: Any, plus_one: bool = False) -> Any:
    return honest(module)


# Faults that are planted in a made stepper


def gradient_of_b_is_not_scaled(stepper: FastStepper) -> None:
    for group in stepper.decoder.groups():
        group.parts = tuple(replace(part, scaling=1.0) for part in group.parts)


def last_norm_is_skipped(stepper: FastStepper) -> None:
    final = stepper.decoder._final
    stepper.decoder._final = replace(final, weight_d=torch.ones_like(final.weight_d))


def parallel_is_serial(stepper: FastStepper) -> None:
    stepper.decoder.layers = [replace(layer, parallel=False) for layer in stepper.decoder.layers]


def last_layer_runs_twice(stepper: FastStepper) -> None:
    stepper.decoder.layers = [*stepper.decoder.layers, stepper.decoder.layers[-1]]


def layers_turn_alike(stepper: FastStepper) -> None:
    layers = stepper.decoder.layers
    stepper.decoder.layers = [
        replace(layer, attention=replace(layer.attention, rope_name="full_attention")) for layer in layers
    ]


def kernels_with(**methods: Callable[..., Any]) -> Callable[[FastStepper], None]:
    """Torch's kernels with methods replaced; each is given the honest ones first."""

    def spoil(stepper: FastStepper) -> None:
        honest, faulty = TorchKernels(), TorchKernels()
        for name, method in methods.items():
            setattr(faulty, name, functools.partial(method, honest))
        stepper.decoder.kernels = faulty

    return spoil


def loss_back_without_slope(
    honest: Kernels, logits: torch.Tensor, targets: torch.Tensor, cap: float | None, scale: float
) -> Any:
    slope = 1 if cap is None else 1 - torch.tanh(logits / cap).square()
    loss = honest.loss_back(logits, targets, cap, scale)
    logits.div_(slope)
    return loss


def loss_without_cap(
    honest: Kernels, logits: torch.Tensor, targets: torch.Tensor, cap: float | None, scale: float
) -> Any:
    return honest.loss_back(logits, targets, None, scale)


def residual_gradient_lost(honest: Kernels, g: Any, x: Any, norm: Any, stats: Any, plus: Any) -> Any:
    return honest.norm_back(g, x, norm, stats, None)


def other_gelu(honest: Kernels, h: Any, activation: str, gated: bool, out: Any) -> None:
    other = {"gelu_tanh": "gelu", "gelu": "gelu_tanh", "silu": "gelu"}[activation]
    honest.gate(h, other, gated, out)  # type: ignore[arg-type]


def gradients_change_places(honest: Kernels, g: Any, x: Any, into: Any, scale: float) -> None:
    """Of the As of q, k and v, and of gate and up."""
    honest.add_outer(g, x, into[::-1], scale)


def gradient_is_overwritten(honest: Kernels, g: Any, x: Any, into: Any, scale: float) -> None:
    """As if a pack were the first of its step."""
    for rows in into:
        rows.zero_()
    honest.add_outer(g, x, into, scale)


def one_window_more(window: int | None) -> int | None:
    return None if window is None else window + 1


def cap_is_looser(cap: float | None) -> float | None:
    return None if cap is None else cap * 1.001


# by what goes wrong: the family on which it shows, and how it is planted
PLANTED: dict[str, tuple[str, Plant]] = {
    "positions do not restart": ("phi3", batch_with(positions_go_on)),
    "a target stands one token late": ("llama", batch_with(one_target_late)),
    "the filling tokens are in the loss": ("llama", batch_with(filler_is_trained)),
    "attention sees the neighbours": (
        "llama",
        wrapped(myna.engine.decoder, "plan_layout", neighbours_are_seen),
    ),
    "attention sees what comes later": ("llama", causal_is_forgotten),
    "alpha / r is forgotten": ("llama", scaling_is_forgotten),
    "one part's B stands in another's place": ("llama", b_lies_in_another_part),
    "a bias is forgotten": ("llama-bias", bias_is_forgotten),
    "the window is one too long": ("mistral-window", spec_with(window=one_window_more)),
    "there is no window": ("gemma3_text-window", spec_with(window=None)),
    "attention's cap is a little off": ("gemma2", spec_with(softcap=cap_is_looser)),
    "attention's scale is that of the head's width": ("gemma2", spec_with(scale=64**-0.5)),
    "the queries are not normed": ("qwen3", spec_with(query_norm=None)),
    "q, k and v of a head are looked for one above the other": (
        "gpt_neox",
        spec_with(query_step=16, key_at=64, value_at=128, kv_step=16),
    ),
    "neighbours are turned instead of halves": (
        "llama",
        wrapped(myna.engine.plain_attention, "_rotate", turned_in_pairs),
    ),
    "Gemma's norms do not add one": (
        "gemma",
        wrapped(myna.engine.families, "rms_norm", plus_one_is_forgotten),
    ),
    "the second norm is left out": ("gemma2", block_with(post_norm=None)),
}

SPOILED: dict[str, tuple[str, Callable[[FastStepper], None]]] = {
    "the gradient of B is not scaled": ("llama", gradient_of_b_is_not_scaled),
    "the last norm is skipped": ("llama", last_norm_is_skipped),
    "parallel blocks run one after another": ("gpt_neox", parallel_is_serial),
    "a layer runs twice": ("llama", last_layer_runs_twice),
    "all layers turn alike": ("gemma3_text", layers_turn_alike),
    "the gradient of the head's cap is missing": ("gemma2", kernels_with(loss_back=loss_back_without_slope)),
    "the head's cap is missing": ("gemma2", kernels_with(loss_back=loss_without_cap)),
    "the residual's gradient is lost": ("llama", kernels_with(norm_back=residual_gradient_lost)),
    "the gradients of A change places": ("llama", kernels_with(add_outer=gradients_change_places)),
    "gelu is the other gelu": ("gemma", kernels_with(gate=other_gelu)),
}
